"""`illada chat`: turns, commands, end of input and interrupts, through a pipe and through a terminal."""

import json
import os
import re
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from processes import heed_interrupts
from tiny_models import random_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from illada import EMBEDDED_MODEL, FrozenCache, ILLaDAConfig, ILLaDAModel
from illada.commands.conversation import Conversation
from illada.commands.main import app
from illada.text.prompts import encode_prompt, sent_messages, turn_segments

TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] + ' ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a ' }}{% endif %}"
)
SETTINGS = ["--max-new-tokens", "8", "--block-length", "4"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random model with a chat template that takes a system message."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = random_model(4, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_and_tokenizer(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)


def reply_to(model, tokenizer, messages: list[dict]) -> str:
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(inputs["input_ids"], max_new_tokens=8, block_length=4)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def converse(checkpoint, lines: list[str], *options: str):
    arguments = ["chat", "--model", str(checkpoint), *SETTINGS, *options]
    return CliRunner().invoke(app, arguments, input="".join(line + "\n" for line in lines))


def test_answers_are_generates_with_the_history_before_them(checkpoint, model_and_tokenizer, tmp_path):
    saved, lines = tmp_path / "chat.json", ["ab", "cd e", "/reset", "ab", "/system x", "ab"]
    result = converse(checkpoint, [*lines[:2], f"/save {saved}", *lines[2:], "/exit", "not read"])
    assert result.exit_code == 0 and not result.stderr
    history, expected = [], []
    for line in lines:
        if line.startswith("/"):
            history = [] if line == "/reset" else [{"role": "system", "content": "x"}, *history]
            continue
        history.append({"role": "user", "content": line})
        expected.append(reply_to(*model_and_tokenizer, history))
        history.append({"role": "assistant", "content": expected[-1]})
        if line == "cd e":
            assert json.loads(saved.read_text()) == history
    assert expected[0] == expected[2] and len(set(expected)) == 3
    assert [line for line in result.stdout.splitlines() if not line.startswith("Saved")] == expected


def test_a_frozen_cache_goes_from_turn_to_turn(checkpoint, monkeypatch):
    """What was computed for an earlier turn is not computed again, and the answers are those of an empty cache."""
    computed, real = [], ILLaDAModel.forward

    def forward(self, input_ids=None, **arguments):
        computed.append(input_ids.numel())
        return real(self, input_ids=input_ids, **arguments)

    monkeypatch.setattr(ILLaDAModel, "forward", forward)
    lines = ["ab", "cd e", "/retry", "ab c", "/undo", "f"]
    found = converse(checkpoint, lines, "--block-cache", "frozen")
    assert found.exit_code == 0 and not found.stderr
    num_found = sum(computed)
    computed.clear()
    monkeypatch.setattr(FrozenCache, "find", lambda *_: None)
    empty = converse(checkpoint, lines, "--block-cache", "frozen")
    assert found.stdout == empty.stdout and len(set(found.stdout.splitlines())) >= 3
    assert num_found < sum(computed) - 40


def test_a_conversation_is_cut_where_answers_begin_and_end(model_and_tokenizer):
    _, tokenizer = model_and_tokenizer
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "ab"}]
    lengths = [len(encode_prompt(tokenizer, messages))]
    assert turn_segments(tokenizer, messages, encode_prompt(tokenizer, messages), 4) == []
    messages += [{"role": "assistant", "content": "efghi"}, {"role": "user", "content": "j"}]
    prompt = encode_prompt(tokenizer, messages)
    lengths += [4, 2]  # five letters and a line break
    assert turn_segments(tokenizer, messages, prompt, 4) == lengths
    rest = len(prompt) - sum(lengths)
    messages += [{"role": "assistant", "content": "kl"}, {"role": "user", "content": "m"}]
    assert turn_segments(tokenizer, messages, encode_prompt(tokenizer, messages), 4) == [*lengths, rest, 3]


def test_options_reach_generate(checkpoint, model_and_tokenizer):
    by_option = converse(checkpoint, ["ab"], "--system", "y")
    messages = [{"role": "system", "content": "y"}, {"role": "user", "content": "ab"}]
    assert by_option.stdout.strip() == reply_to(*model_and_tokenizer, messages)
    sampled = [converse(checkpoint, ["ab"], "--temperature", "9", "--seed", seed).stdout for seed in ("1", "1", "2")]
    assert sampled[0] == sampled[1] != sampled[2]


def test_what_fails_is_one_line_and_the_chat_goes_on(checkpoint, tmp_path):
    taken = tmp_path / "taken.json"
    taken.write_text("kept")
    lines = ["/nonsense", "/save", f"/save {taken}", "ab " * 40, "/help", "ab"]
    result = converse(checkpoint, lines)
    assert result.exit_code == 0 and taken.read_text() == "kept"
    errors = result.stderr.splitlines()
    assert len(errors) == 4 and all(error.startswith("illada: ") for error in errors)
    for error, named in zip(errors, ["/nonsense", "/save", "taken.json", "64 positions"], strict=True):
        assert named in error
    *help_lines, answer = result.stdout.splitlines()
    for command in ("/reset", "/system", "/save", "/help", "/exit"):
        assert any(line.startswith(command) for line in help_lines)
    assert answer == converse(checkpoint, ["ab"]).stdout.strip()  # a question that failed is forgotten


def test_a_template_without_a_system_message_is_named():
    result = CliRunner().invoke(app, ["chat"], input="/system Be brief.\n")
    assert result.exit_code == 0
    (error,) = result.stderr.splitlines()
    assert "chat template takes no system message" in error
    result = CliRunner().invoke(app, ["chat", "--system", "Be brief."])
    assert result.exception.exit_code == 2 and "takes no system message" in str(result.exception)


def test_a_checkpoint_without_a_template_is_refused():
    with pytest.raises(ValueError, match="a checkpoint with a chat template"):
        Conversation(SimpleNamespace(tokenizer=tiny_tokenizer()), {})


QUESTIONS = ["Sort the numbers: 17 4 9", "Tom has 7 apples. He buys 5 more. How many apples does Tom have now?"] * 3


def test_a_model_of_single_turns_is_sent_the_last_message_only(tmp_path):
    """Later answers are those that the questions get by themselves, and the chat says so once."""
    alone = [CliRunner().invoke(app, ["chat"], input=f"{question}\n").stdout for question in QUESTIONS[:2]]
    saved = tmp_path / "chat.json"
    result = CliRunner().invoke(app, ["chat"], input="\n".join([*QUESTIONS, f"/save {saved}", ""]))
    assert result.stdout == "".join(alone * 3) + f"Saved to {saved}.\n"
    (notice,) = result.stderr.splitlines()
    assert "by itself" in notice
    assert [message["content"] for message in json.loads(saved.read_text())[::2]] == QUESTIONS


def test_messages_that_are_sent():
    system, *turns = (
        {"role": role, "content": str(i)} for i, role in enumerate(["system", "user", "assistant", "user"])
    )
    single, multiple = ILLaDAConfig(single_turn=True), ILLaDAConfig()
    assert sent_messages([system, *turns], multiple) == [system, *turns]
    assert sent_messages([system, *turns], single) == [system, turns[-1]]
    assert sent_messages(turns[:1], single) == turns[:1]
    assert AutoConfig.from_pretrained(EMBEDDED_MODEL).single_turn


def test_turns_are_retried_and_undone(checkpoint, model_and_tokenizer, tmp_path):
    lines = [
        "ab",
        "cd e",
        "/retry",
        "/undo",
        "/save one.json",
        "/undo",
        "/undo",
        "/SAVE none.json",
        "/QUIT",
        "not read",
    ]
    with pytest.MonkeyPatch.context() as context:
        context.chdir(tmp_path)
        result = converse(checkpoint, lines)
    assert result.exit_code == 0
    history = [{"role": "user", "content": "ab"}]
    first = reply_to(*model_and_tokenizer, history)
    turn = [*history, {"role": "assistant", "content": first}]
    second = reply_to(*model_and_tokenizer, [*turn, {"role": "user", "content": "cd e"}])
    assert result.stdout.splitlines() == [first, second, second, "Saved to one.json.", "Saved to none.json."]
    assert json.loads((tmp_path / "one.json").read_text()) == turn
    assert json.loads((tmp_path / "none.json").read_text()) == []
    assert "no message" in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_line_goes_on_after_a_backslash(checkpoint, model_and_tokenizer):
    result = converse(checkpoint, ["ab\\", "cd"])
    assert result.stdout.strip() == reply_to(*model_and_tokenizer, [{"role": "user", "content": "ab\ncd"}])


def test_a_file_in_the_home_folder_is_saved(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    result = converse(checkpoint, ["ab", "/save ~/chat.json", "/save ~/no/such/folder"])
    assert len(json.loads((tmp_path / "chat.json").read_text())) == 2
    (error,) = result.stderr.splitlines()
    assert "/save cannot write" in error and "Errno" not in error


def test_a_full_context_names_the_way_out(checkpoint):
    result = converse(checkpoint, ["ab " * 12] * 6)
    assert "/reset" in result.stderr and "64 positions" in result.stderr


def test_blanks_of_a_message_are_filled():
    result = CliRunner().invoke(app, ["chat"], input="Sort the numbers: 17<[MASK]> 9\n")
    filled, answer = result.stdout.splitlines()
    assert re.fullmatch(r"Sort the numbers: 17 \d+ 9", filled), filled
    assert answer == CliRunner().invoke(app, ["chat"], input=f"{filled}\n").stdout.strip()


@pytest.fixture
def terminal():
    pexpect = pytest.importorskip("pexpect", reason="needs a pseudo-terminal")

    def spawn(*options):
        return pexpect.spawn(
            sys.executable,
            ["-m", "illada", "chat", *options],
            encoding="utf-8",
            timeout=120,
            env={**os.environ, "TERM": "xterm", "HF_HUB_OFFLINE": "1"},
            preexec_fn=heed_interrupts,
        )

    return spawn


def test_on_a_terminal(terminal, tmp_path):
    """Denoising is shown; Ctrl-C drops the line, or stops the answer; Ctrl-D leaves with exit code 0."""
    import pexpect

    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)
    model.config.eos_token_id = model.generation_config.eos_token_id = None  # it writes until its budget is used
    model.generation_config.max_new_tokens = 400
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(EMBEDDED_MODEL).save_pretrained(tmp_path)

    chat = terminal("--model", str(tmp_path))
    chat.expect_exact("> ")
    chat.send("half a li")
    # An interrupt empties the terminal's queue; keys that `input` has seen there but not read would leave it deaf.
    chat.expect_exact("half a li")
    for _ in range(10):  # one that comes between two waits of `input` is heeded with the next
        chat.sendintr()
        if chat.expect_exact(["Interrupted", pexpect.TIMEOUT], timeout=12) == 0:
            break
    assert chat.after == "Interrupted"
    chat.expect_exact("> ")
    chat.send("\x1b[200~/nothing\nof\nthe\x1b[201~")  # a paste of three lines sends nothing until Enter is pressed
    chat.sendline(" kind")
    chat.expect_exact("There is no command /nothing of the kind")
    chat.expect_exact("> ")
    chat.sendline("Sort the numbers: 17 4 9")
    chat.expect_exact("\x1b[2K")  # the picture of the first step is drawn over
    stopped = time.monotonic()
    chat.sendintr()
    chat.expect_exact("Interrupted")
    assert time.monotonic() - stopped < 60
    chat.expect_exact("> ")
    chat.sendline(f"/save {tmp_path / 'chat.json'}")
    chat.expect_exact("Saved")
    assert json.loads((tmp_path / "chat.json").read_text()) == []
    chat.expect_exact("> ")
    chat.sendeof()
    chat.wait()
    assert chat.exitstatus == 0 and chat.signalstatus is None
    rest = chat.before or ""
    assert "Traceback" not in rest


def test_an_interrupt_without_a_terminal_ends_it(checkpoint):
    import subprocess

    process = subprocess.Popen(
        [sys.executable, "-m", "illada", "chat", "--model", str(checkpoint)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    process.stdin.write("/help\n")
    process.stdin.flush()
    assert process.stdout.readline().startswith("/reset")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in err
