"""The record of a denoising as a page and a picture, and the live view."""

import json
import re

import pytest
import torch
from rich.console import Console
from rich.text import Text

from illada.commands.live import COMMITTED_STYLE, DRAFT_STYLE, LiveDenoising, run_generate
from illada.text.trace import check_trace_path, trace_tokens, write_trace
from illada.tiny.tokenizer import train_tokenizer

PROMPT = torch.tensor([[0, 40, 5, 42]])


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(num_examples=200)


@pytest.fixture
def output(tiny_model):
    return tiny_model.generate(
        PROMPT, max_new_tokens=8, block_length=4, return_dict_in_generate=True, output_trace=True
    )


def test_trace_replays_to_the_sequence(tokenizer, output):
    tokens = trace_tokens(tokenizer, output)
    assert "".join(token["text"] for token in tokens) == tokenizer.decode(output.sequences[0][: len(tokens)])
    given = [index for index, token in enumerate(tokens) if not token["step"]]
    assert given == [0, 1, 3] and all(tokens[index]["confidence"] is None for index in given)
    steps = sorted(token["step"] for token in tokens if token["step"])
    assert steps == sorted(set(steps)) and steps[0] == 1  # one token per forward pass
    assert all(0 < token["confidence"] <= 1 for token in tokens if token["step"])


def test_page_is_self_contained_and_holds_the_trace(tmp_path, tokenizer, output):
    write_trace(tmp_path / "page.html", tokenizer, output)
    page = (tmp_path / "page.html").read_text()
    assert not re.search(r"(src|href)=", page)
    data = json.loads(re.search(r"const tokens = (.*);", page)[1].replace("<\\/", "</"))
    assert data == trace_tokens(tokenizer, output)


def test_text_cannot_break_out_of_the_page(tmp_path, tokenizer, output):
    ids = tokenizer("</script><b>", add_special_tokens=False, return_tensors="pt").input_ids
    hostile = type(output)(
        sequences=ids, commit_steps=torch.zeros_like(ids), commit_confidences=torch.full(ids.shape, torch.nan)
    )
    write_trace(tmp_path / "page.html", tokenizer, hostile)
    page = (tmp_path / "page.html").read_text()
    assert page.count("</script>") == 1 and "<b>" not in page.split("<script>")[0]


def test_bad_paths(tmp_path, tokenizer, output):
    with pytest.raises(ValueError, match="html"):
        write_trace(tmp_path / "trace.gif", tokenizer, output)
    with pytest.raises(ValueError, match="`path` must be a file in an existing folder"):
        write_trace(tmp_path / "no" / "trace.png", tokenizer, output)


def test_a_picture_without_matplotlib_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("illada.text.trace.find_spec", lambda name: None)
    check_trace_path(tmp_path / "trace.html")
    with pytest.raises(ValueError, match="matplotlib"):
        check_trace_path(tmp_path / "trace.png")


def test_live_view_shows_settled_committed_and_drafted_tokens(tokenizer, tiny_model):
    steps = []
    tiny_model.generate(PROMPT, max_new_tokens=6, block_length=6, eos_token_id=None, on_step=steps.append)
    live = LiveDenoising(tokenizer, PROMPT.shape[1], eos_token_ids=[])
    blank, *response = (live.render(step) for step in steps)
    # the blank of the prompt is shown within its text
    assert [blank.plain[span.start : span.end] for span in blank.spans if span.style == COMMITTED_STYLE] != []
    for count, (step, text) in enumerate(zip(steps[1:], response), start=1):
        assert text.plain == tokenizer.decode(step.proposals, skip_special_tokens=True)
        drafted = step.confidence.isfinite().sum() - step.committed.sum()
        assert drafted == 6 - count
        assert any(span.style == DRAFT_STYLE for span in text.spans) == (drafted > 0)


def test_live_view_of_a_tall_text_shows_its_end(tokenizer):
    live = LiveDenoising(tokenizer, 0, eos_token_ids=[])
    live.console = Console(width=10, height=5)
    words = [f"word{index}" for index in range(30)]
    lines = live._fit(Text(" ".join(words))).plain.splitlines()
    assert len(lines) == 4 and lines[-1].strip() == "word29" and lines[0].strip() == "word26"


def test_live_view_waits_after_each_step(tokenizer, tiny_model, monkeypatch):
    waits = []
    monkeypatch.setattr("illada.commands.live.time.sleep", waits.append)
    run_generate(tiny_model, tokenizer, PROMPT[0].tolist(), 0.25, max_new_tokens=4, eos_token_id=None)
    assert waits == [0.25] * 5  # one for the blank of the prompt
