"""The command: answers, machine-readable output, errors in one line with their exit codes."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import illada
from illada import EMBEDDED_MODEL
from illada.commands.main import app, main
from illada.text.blanks import encode_with_blanks

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


@pytest.mark.parametrize(
    "arguments, code, named",
    [
        (["generate", ""], 1, "PROMPT"),
        (["generate", "hi", "--steps", "0"], 1, "max_denoising_steps"),
        (["generate", "hi", "--confidence-threshold", "2"], 1, "confidence_threshold"),
        (["generate", "hi", "--max-new-tokens", "9999"], 1, "max_new_tokens"),
        (["generate", "hi", "--canvas", "round"], 1, "canvas"),
        (["generate", "hi", "--preset", "faster"], 1, "preset"),
        (["generate", "hi", "--dtype", "int3"], 1, "--dtype"),
        (["generate", "hi", "--model", "./no/such/folder"], 1, "--model"),
        (["chat", "--model", "./no/such/folder"], 1, "--model"),
        (["chat", "--canvas", "round"], 1, "canvas"),
        (["serve", "./no/such/folder"], 1, "no/such/folder"),
        (["generate", "hi", "--trace", "trace.gif"], 1, "--trace"),
        (["generate", "a<[MASK]*0>"], 1, "at least one token"),
        (["generate", "hi", "--temperature", "-1"], 2, "--temperature"),
        (["generate", "hi", "--top-p", "0.9"], 1, "--temperature"),
        (["infill", "a <[MASK]>", "--top-k", "5"], 1, "--temperature"),
        (["generate"], 2, "prompt"),
        (["infill", "no blank"], 1, "blank"),
        (["revise", "text", "--fraction", "3"], 1, "fraction"),
        (["nonsense"], 2, "nonsense"),
    ],
)
def test_errors_are_one_line_with_a_cause(capsys, monkeypatch, arguments, code, named):
    actual, out, err = run(capsys, monkeypatch, *arguments)
    assert actual == code
    assert out == "" and len(err.splitlines()) == 1 and named.lower() in err.lower()


def test_broken_checkpoints_are_one_line_errors(capsys, monkeypatch, tmp_path, tiny_model):
    (tmp_path / "empty").mkdir()
    code, _, err = run(capsys, monkeypatch, "info", "--model", str(tmp_path / "empty"))
    assert code == 1 and len(err.splitlines()) == 1 and "config.json" in err

    tiny_model.save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    code, _, err = run(capsys, monkeypatch, "info", "--model", str(tmp_path / "cut"))
    assert code == 1 and len(err.splitlines()) == 1 and "safetensors file" in err


def test_a_model_of_another_kind_is_refused(capsys, monkeypatch, tmp_path):
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)).save_pretrained(tmp_path)
    code, _, err = run(capsys, monkeypatch, "infill", SENTENCE, "--model", str(tmp_path))
    assert code == 1 and len(err.splitlines()) == 1 and "masked diffusion" in err


def test_interrupt_has_its_own_exit_code(capsys, monkeypatch):
    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "tensor", interrupted)
    assert run(capsys, monkeypatch, "generate", QUESTION)[0] == 130
