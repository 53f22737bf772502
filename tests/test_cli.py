"""The command: answers, machine-readable output, errors in one line with their exit codes."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import illada
from illada import EMBEDDED_MODEL
from illada.commands.main import app, main
from illada.text.blanks import encode_with_blanks
from illada.text.prompts import encode_prompt

QUESTION = "Tom has 7 apples. He buys 5 more. How many apples does Tom have now?"
SENTENCE = "Today Tom has 3 pears and<[MASK]> cups. 3 + 4 = 7, so Tom has 7 things in all."


def run(capsys, monkeypatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["illada", *arguments])
    capsys.readouterr()  # what the test printed before is not the command's
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def test_installed_command_answers_offline():
    """The README's command, as a process: piped output is the answer alone."""
    result = subprocess.run(
        [sys.executable, "-m", "illada", "generate", QUESTION], capture_output=True, text=True, check=True
    )
    assert result.stdout.endswith("\n") and "\x1b" not in result.stdout
    assert len(result.stdout.splitlines()) == 1 and result.stdout.strip()


def test_generate_equals_the_model(capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "generate", QUESTION, "--json", "--max-new-tokens", "40")
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)
    messages = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=40, return_dict_in_generate=True)
    response = expected.sequences[0, inputs["input_ids"].shape[1] :]
    figures = json.loads(out)
    assert code == 0
    assert figures["text"] == tokenizer.decode(response, skip_special_tokens=True).strip()
    assert figures["num_forward_passes"] == expected.num_forward_passes[0]


def test_seeded_sampling_repeats(capsys, monkeypatch):
    arguments = ("generate", QUESTION, "--temperature", "20", "--max-new-tokens", "16", "--seed")
    outputs = [run(capsys, monkeypatch, *arguments, seed)[1] for seed in ("1", "1", "2")]
    assert outputs[0] == outputs[1] != outputs[2]


def test_live_denoising_ends_with_the_settled_text(capsys, monkeypatch):
    plain = run(capsys, monkeypatch, "generate", QUESTION, "--no-live")[1]
    live = run(capsys, monkeypatch, "generate", QUESTION, "--live")[1]
    assert live.endswith(plain)


def test_infill_keeps_the_text_around_a_blank(capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "infill", SENTENCE)
    before, after = SENTENCE.split("<[MASK]>")
    assert code == 0 and out.startswith(before) and out.rstrip("\n").endswith(after)


def test_revise_reports_changes(capsys, monkeypatch):
    text = "Today Tom has 3 pears and 4 cups. 3 + 4 = 9, so Tom has 7 things in all."
    code, out, _ = run(capsys, monkeypatch, "revise", text, "--fraction", "0.2", "--json")
    result = json.loads(out)
    assert code == 0 and (result["text"] != text) == bool(result["changes"])


def test_revise_does_not_ask_the_checkpoint_about_a_response(capsys, monkeypatch, tmp_path):
    folder = shutil.copytree(EMBEDDED_MODEL, tmp_path / "model")
    settings = json.loads((folder / "generation_config.json").read_text())
    settings |= {"num_return_sequences": 2, "do_sample": True, "min_new_tokens": 4}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    text = "Today Tom has 3 pears and 4 cups."
    assert run(capsys, monkeypatch, "revise", text, "--fraction", "0.2", "--model", str(folder))[0] == 0


@pytest.mark.parametrize("suffix, start", [(".html", b"<!doctype html>"), (".png", b"\x89PNG")])
def test_trace_is_written(capsys, monkeypatch, tmp_path, suffix, start):
    path = tmp_path / f"trace{suffix}"
    assert run(capsys, monkeypatch, "generate", QUESTION, "--trace", str(path))[0] == 0
    assert path.read_bytes().startswith(start)


def test_info(capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "info", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["architecture"] == "ILLaDAForCausalLM"
    assert facts["special ids"] == {"bos": 0, "pad": 1, "eos": 2, "mask": 5}
    code, out, _ = run(capsys, monkeypatch, "info")
    assert code == 0 and f"{facts['parameters']:,}" in out


COMMANDS = sorted(typer.main.get_command(app).commands)


def test_the_overview_names_commands_and_exit_codes(capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "--help")
    assert code == 0 and all(command in out for command in COMMANDS)
    assert {"generate", "infill", "revise", "chat", "serve", "info", "convert", "export", "eval"} <= set(COMMANDS)
    for exit_code in ("0 done", "1 the work failed", "2 wrong usage", "130 interrupted"):
        assert exit_code in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_and_exit_codes(capsys, monkeypatch, command):
    code, out, _ = run(capsys, monkeypatch, command, "--help")
    text = " ".join(out.split())
    assert code == 0 and f"Example: illada {command}" in text.replace("`", "")
    assert "Exit codes: 0 done" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_are_well_formed(command):
    """The command line of an example is parsed: its options exist, and their values are of the right type."""
    info = typer.main.get_command(app).commands[command]
    (example,) = re.findall(rf"Example: `?illada {command}([^`\n]*)", info.help)
    info.make_context(command, shlex.split(example))


def test_version(capsys, monkeypatch):
    assert run(capsys, monkeypatch, "--version") == (0, f"illada {illada.__version__}\n", "")


def test_a_shell_completes_commands():
    environment = {**os.environ, "_ILLADA_COMPLETE": "complete_bash", "COMP_WORDS": "illada inf", "COMP_CWORD": "1"}
    command = [
        sys.executable,
        "-c",
        "import sys; sys.argv[0] = 'illada'; from illada.commands.main import main; main()",
    ]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.stdout.split() == ["infill", "info"] or result.stdout.split() == ["infill"], result


def test_blanks_of_a_prompt_are_filled(capsys, monkeypatch):
    prompt = "Tom has<[MASK]*2> pears."
    settings = ["--no-chat", "--max-new-tokens", "3", "--json"]
    code, out, _ = run(capsys, monkeypatch, "generate", prompt, *settings)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)
    input_ids = torch.tensor([encode_with_blanks(tokenizer, prompt, model.config.mask_token_id)])
    expected = model.generate(input_ids, max_new_tokens=3)[0]
    result = json.loads(out)
    assert code == 0
    assert result["prompt"] == tokenizer.decode(expected[: input_ids.shape[1]], skip_special_tokens=True)
    assert result["text"] == tokenizer.decode(expected[input_ids.shape[1] :], skip_special_tokens=True).strip()


def test_blanks_are_filled_and_shown_where_nothing_is_appended(capsys, monkeypatch):
    settings = ["--no-chat", "--max-new-tokens", "0"]
    infilled = run(capsys, monkeypatch, "infill", SENTENCE)[1]
    code, out, err = run(capsys, monkeypatch, "generate", SENTENCE, *settings)
    assert (code, out, err) == (0, infilled, "") and "MASK" not in out and len(out) > 40
    result = json.loads(run(capsys, monkeypatch, "generate", SENTENCE, *settings, "--json")[1])
    assert (result["text"], result["finish_reason"]) == (infilled.removesuffix("\n"), "stop")


TEXTS = {  # what each command is given besides the option under test
    "generate": ["hi"],
    "infill": [SENTENCE],
    "revise": ["a text"],
    "chat": [],
    "info": [],
    "serve": [],
    "batch": ["in.jsonl", "out.jsonl"],
    "demo": [],
    "convert": ["illada-tiny", "out"],
    "export": ["out"],
    "train": ["illada-tiny"],
    "eval": ["--preset", "tiny-chat"],
}
BAD_VALUES = {
    "--model": ["./no/such/folder", "a/b/c", "", "{empty}"],
    "--device": ["gpu", "meta", "cuda:99", ""],
    "--dtype": ["fp16", "int3", ""],
    "--max-new-tokens": ["-5", "many", "9999"],
    "--canvas": ["grow"],
    "--guidance-scale": ["-1", "nan"],
    "--stop": [""],
    "--preset": ["quick"],
    "--block-length": ["0", "x"],
    "--steps": ["0", "-1"],
    "--remasking": ["foo"],
    "--confidence-threshold": ["2", "0"],
    "--confidence-factor": ["0", "inf"],
    "--entropy-bound": ["-1"],
    "--commit-rule": ["nobody", ""],
    "--frechet-margin": ["-0.1", "1"],
    "--num-drafts": ["0", "-1", "1.5"],
    "--block-cache": ["both"],
    "--cache-refresh-entropy": ["0", "-1", "nan", "0.5"],  # the last without a cache
    "--temperature": ["-1", "nan", "inf", "hot"],
    "--top-p": ["1.5", "0.5"],  # the second without a temperature
    "--top-k": ["-1", "5"],
    "--seed": ["-1", "1e3", "99999999999999999999"],
    "--fraction": ["3", "0"],
    "--threshold": ["5", "nan"],
    "--rounds": ["0"],
    "--pause": ["-1", "nan"],
    "--trace": ["trace.gif", "no/such/folder/trace.html", "{empty}"],
    "--system": ["Be brief."],  # the embedded model's template takes none
    "--host": ["no such host"],
    "--port": ["0", "99999", "http"],
    "--max-waiting": ["0"],
    "--max-cached-tokens": ["0", "x"],
    "--max-rows": ["0", "many"],
    "--max-tokens": ["0", "many"],
    "--timeout": ["0", "soon", "nan"],
    "--stop-timeout": ["-1", "soon", "nan"],
    "--max-body-kib": ["0"],
    "--max-prompt-tokens": ["0", "many"],
    "--to": ["gguf"],
    "--max-shard-size": ["5 parsecs", "0"],
    "--push": ["a/b/c"],
}
# Any text will do for these, or whether it does is known to a server or a file system only.
FREE_TEXT = {"--name", "--api-key", "--allow-origin", "--base-model", "--revision"}
ELSEWHERE = {"--license", "--adapter", "--tokenizer"}  # of export: `test_conversion_arguments.py`
CASES = [
    (name, max(option.opts, key=len), value)
    for name, command in sorted(typer.main.get_command(app).commands.items())
    for option in command.params
    if option.param_type_name == "option" and not option.is_flag
    for value in BAD_VALUES.get(max(option.opts, key=len), ["no value is named for this option"])
    if max(option.opts, key=len) not in FREE_TEXT | ELSEWHERE
]


@pytest.mark.parametrize("command, option, value", CASES)
def test_a_bad_value_is_refused_before_anything_is_loaded(capsys, monkeypatch, tmp_path, command, option, value):
    """One sentence that names the option as it was typed and the value, and exit code 2."""

    def load(*arguments, **settings):
        raise AssertionError("weights were read")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "in.jsonl").write_text('{"prompt": "hi"}')
    value = value.format(empty=tmp_path / "empty")
    code, out, err = run(capsys, monkeypatch, command, *TEXTS[command], option, value)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1, err
    assert option in err and "Traceback" not in err
    assert value in err or "0" in err  # `--top-p` without `--temperature` shows the temperature
    assert not list(tmp_path.glob("out*"))


def test_every_option_has_bad_values():
    """The walk above leaves no option out: a new one must be given values, or be named as free text."""
    untested = {option for _, option, value in CASES if value == "no value is named for this option"}
    assert not untested and {command for command, _, _ in CASES} >= set(TEXTS) - {"train"}


@pytest.mark.parametrize(
    "arguments, code, named",
    [
        (["generate", ""], 2, "PROMPT"),
        (["generate", "a<[MASK]*0>"], 2, "at least one token"),
        (["generate"], 2, "prompt"),
        (["generate", "hi", "--tempurature", "1"], 2, "--tempurature"),
        (["generate", "hi", "--confidence-threshold", "0.9", "--entropy-bound", "1"], 2, "--entropy-bound"),
        (["infill", "no blank"], 2, "TEXT"),
        (["infill", ""], 2, "TEXT"),
        (["revise", " "], 2, "TEXT"),
        (["revise", "text", "--fraction", "0.5", "--threshold", "0.5"], 2, "--threshold"),
        (["generate", "a b " * 500], 2, "512 positions"),
        (["infill", SENTENCE * 40], 2, "512 positions"),
        (["nonsense"], 2, "nonsense"),
        (["eval", "--preset", "nonsense"], 2, "--preset"),
        (["eval"], 2, "--preset"),
        (["eval", "--limt", "2"], 2, "--limt"),
    ],
)
def test_errors_are_one_line_with_a_cause(capsys, monkeypatch, arguments, code, named):
    actual, out, err = run(capsys, monkeypatch, *arguments)
    assert actual == code
    assert out == "" and len(err.splitlines()) == 1 and named.lower() in err.lower()


RUNNING = {name: TEXTS[name] for name in ("generate", "infill", "revise", "chat", "info", "demo", "serve", "batch")}


@pytest.mark.parametrize("command", RUNNING)
def test_a_checkpoint_that_lacks_a_tensor_is_refused(capsys, monkeypatch, tmp_path, command):
    """No command runs a model with random weights in place of those that were saved."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"prompt": "hi"}')
    for file in EMBEDDED_MODEL.iterdir():
        if file.suffix in (".json", ".jinja"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(EMBEDDED_MODEL / "model.safetensors")
    faults = {
        "prefix": {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()},
        "lost": {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"},
        "misshapen": tensors | {"model.norm.weight": torch.ones(3)},
    }
    for fault, stored in faults.items():
        save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
        code, out, err = run(capsys, monkeypatch, command, *RUNNING[command], "--model", str(tmp_path))
        assert code == 1 and out == "" and len(err.splitlines()) == 1, (fault, err)
        assert ("_orig_mod." if fault == "prefix" else "model.norm.weight") in err
        assert {"prefix": "extra", "lost": "missing", "misshapen": "[3] instead of [128]"}[fault] in err


@pytest.mark.parametrize("command", ["generate", "infill", "revise", "chat", "info", "demo", "serve"])
def test_the_embedded_model_has_a_name(capsys, monkeypatch, tmp_path, command):
    """`--model illada-tiny` reads the package's weights, wherever the command is run."""
    monkeypatch.chdir(tmp_path)
    read = []

    class Read(Exception):
        pass

    def load(source, **settings):
        read.append(Path(source))
        raise Read

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    code, out, err = run(capsys, monkeypatch, command, *RUNNING[command], "--model", "illada-tiny")
    if command == "info":
        assert code == 0 and "1,245,824" in out
    else:
        assert code == 1 and read == [EMBEDDED_MODEL]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA adapter of the embedded model, as training saves one, and the answer of the adapted model."""
    peft = pytest.importorskip("peft", reason="needs peft")
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    tokenizer.save_pretrained(folder)
    input_ids = torch.tensor([encode_prompt(tokenizer, QUESTION)])
    output = model.generate(input_ids=input_ids, max_new_tokens=12)
    return folder, tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("base", ["an absolute path", "illada-tiny", "a path from the adapter's folder"])
def test_an_adapter_is_a_model(capsys, monkeypatch, adapter, base, tmp_path):
    folder, answer = adapter
    config = json.loads((folder / "adapter_config.json").read_text())
    if base != "an absolute path":
        beside = os.path.relpath(EMBEDDED_MODEL, folder)
        config["base_model_name_or_path"] = "illada-tiny" if base == "illada-tiny" else beside
        folder = Path(shutil.copytree(folder, folder.parent / f"{tmp_path.name}-adapter"))
        (folder / "adapter_config.json").write_text(json.dumps(config))
    code, out, err = run(
        capsys, monkeypatch, "generate", QUESTION, "--model", str(folder), "--max-new-tokens", "12", "--no-live"
    )
    assert (code, out.strip()) == (0, answer)
    assert answer not in run(capsys, monkeypatch, "generate", QUESTION, "--max-new-tokens", "12")[1]
    code, out, _ = run(capsys, monkeypatch, "info", "--model", str(folder), "--json")
    assert code == 0 and json.loads(out)["adapter"] == str(folder)


def test_a_tensor_of_an_adapter_that_finds_no_place_is_named(capsys, monkeypatch, adapter, tmp_path):
    folder = Path(shutil.copytree(adapter[0], tmp_path / "adapter"))
    tensors = load_file(folder / "adapter_model.safetensors")
    lost = next(name for name in tensors if "layers.3.mlp.down_proj.lora_A" in name)
    tensors[lost.replace("layers.3", "layers.33")] = tensors.pop(lost)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    code, _, err = run(capsys, monkeypatch, "generate", QUESTION, "--model", str(folder))
    assert code == 1 and len(err.splitlines()) == 1 and "layers.33" in err


def test_info_reads_no_weights(capsys, monkeypatch, tmp_path):
    """The headers are enough: the tensors' bytes may be anything, and are never read."""
    import safetensors

    def forbidden(*arguments, **settings):
        raise AssertionError("weights were read")

    expected = json.loads(run(capsys, monkeypatch, "info", "--json")[1])
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)
    assert expected["parameters"] == model.num_parameters()
    assert expected["parameters without embedding"] == model.num_parameters(exclude_embeddings=True)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", forbidden)
    monkeypatch.setattr(safetensors.torch, "load_file", forbidden)
    folder = Path(shutil.copytree(EMBEDDED_MODEL, tmp_path / "sparse"))
    weights = folder / "model.safetensors"
    size = weights.stat().st_size
    with weights.open("r+b") as file:  # a header, and then a hole
        header = 8 + int.from_bytes(file.read(8), "little")
        file.truncate(header)
        file.truncate(size)
    assert json.loads(run(capsys, monkeypatch, "info", "--json", "--model", str(folder))[1]) == expected


def test_an_answer_that_was_cut_says_so(capsys, monkeypatch):
    reasons = {}
    for budget in ("3", "64"):
        _, out, err = run(capsys, monkeypatch, "generate", QUESTION, "--json", "--max-new-tokens", budget)
        reasons[budget] = json.loads(out)["finish_reason"]
    assert reasons == {"3": "length", "64": "stop"}
    _, out, err = run(capsys, monkeypatch, "generate", QUESTION, "--json", "--stop", "has")
    assert json.loads(out)["finish_reason"] == "stop"
    assert "--max-new-tokens" in run(capsys, monkeypatch, "generate", QUESTION, "--max-new-tokens", "3")[2]
    assert "--max-new-tokens" not in run(capsys, monkeypatch, "generate", QUESTION)[2]


@pytest.mark.parametrize("arguments", [[], ["-h"], ["help"], ["generate", "-h"]])
def test_help_has_short_names(capsys, monkeypatch, arguments):
    code, out, err = run(capsys, monkeypatch, *arguments)
    assert (code, err) == (0, "") and "Usage:" in out


def test_broken_checkpoints_are_one_line_errors(capsys, monkeypatch, tmp_path, tiny_model):
    (tmp_path / "empty").mkdir()
    code, _, err = run(capsys, monkeypatch, "info", "--model", str(tmp_path / "empty"))
    assert code == 2 and len(err.splitlines()) == 1 and "config.json" in err

    tiny_model.save_pretrained(tmp_path / "cut")
    AutoTokenizer.from_pretrained(EMBEDDED_MODEL).save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    for command in ("info", "chat"):
        code, _, err = run(capsys, monkeypatch, command, "--model", str(tmp_path / "cut"))
        assert code == 1 and len(err.splitlines()) == 1 and "safetensors file" in err


def test_a_model_of_another_kind_is_refused(capsys, monkeypatch, tmp_path):
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(EMBEDDED_MODEL).save_pretrained(tmp_path)
    code, _, err = run(capsys, monkeypatch, "infill", SENTENCE, "--model", str(tmp_path))
    assert code == 2 and len(err.splitlines()) == 1 and "masked diffusion" in err


def test_a_repository_that_cannot_be_reached_is_named(capsys, monkeypatch):
    code, _, err = run(capsys, monkeypatch, "generate", "hi", "--model", "nobody/nothing")
    assert code == 1 and len(err.splitlines()) == 1 and "`--model`" in err and "nobody/nothing" in err


def test_interrupt_has_its_own_exit_code(capsys, monkeypatch):
    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "tensor", interrupted)
    assert run(capsys, monkeypatch, "generate", QUESTION)[0] == 130
