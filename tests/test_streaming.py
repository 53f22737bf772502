"""Streamers and `on_step`: what they receive adds up to what is returned."""

import re
from threading import Thread

import pytest
import torch
from tiny_models import EOS, MASK, TableModel, random_model, table_of, tiny_tokenizer
from transformers import TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import TextDiffusionStreamer

A, B, C, D = 6, 7, 8, 9
SPACE, NEWLINE = 32, 35

PROMPTS = [[7, 8, 9], [7, MASK, 9, MASK, MASK], [MASK]]


class Recorder:
    """Keeps the order of everything that a streamer is told, and of the model's calls."""

    def __init__(self):
        self.events = []

    def put(self, value):
        self.events.append(("put", value.flatten().tolist()))

    def put_draft(self, value):
        self.events.append(("draft", value.tolist()))

    def end(self):
        self.events.append(("end", None))

    def of(self, kind: str) -> list:
        return [value for name, value in self.events if name == kind]


@pytest.mark.parametrize("prompt", PROMPTS, ids=str)
@pytest.mark.parametrize("canvas", ["growing", "fixed"])
@pytest.mark.parametrize("block_length", [1, 3, 12])
@pytest.mark.parametrize("eos_token_id", [None, [EOS, 7, 8, 9, 10]])
def test_the_pieces_add_up_to_the_tokens(prompt, canvas, block_length, eos_token_id):
    model = random_model(2)
    recorder = Recorder()
    model.register_forward_pre_hook(lambda *_: recorder.events.append(("forward", None)))
    output = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=10,
        block_length=block_length,
        canvas=canvas,
        eos_token_id=eos_token_id,
        streamer=recorder,
        return_dict_in_generate=True,
        output_trace=True,
    )
    tokens, pieces = output.sequences[0].tolist(), recorder.of("put")
    assert sum(pieces, []) == tokens
    assert pieces[0] == tokens[: len(prompt)]  # the prompt first, in one piece, as `skip_prompt` wants it
    assert all(pieces) and MASK not in tokens
    assert recorder.events[-1] == ("end", None) and len(recorder.of("end")) == 1
    # A draft after each pass, and each piece as soon as it is settled: no pass between its last commit and it.
    assert len(recorder.of("draft")) == len(recorder.of("forward")) == output.num_forward_passes
    passes = written = 0
    for name, value in recorder.events:
        passes += name == "forward"
        if name == "put":
            written += len(value)
            assert output.commit_steps[0, :written].max() <= passes
            block_ends = [*range(len(prompt), len(tokens), block_length), len(tokens)]
            assert written in block_ends
    assert all(MASK not in draft or MASK in prompt for draft in recorder.of("draft"))


def test_a_block_is_streamed_before_the_next_is_begun():
    model = TableModel(table_of({1: {A: 0.9}, 2: {B: 0.9}, 3: {C: 0.9}, 4: {EOS: 0.9}}, 64))
    recorder = Recorder()
    model.generate(torch.tensor([[7]]), max_new_tokens=6, block_length=2, streamer=recorder)
    assert recorder.events == [
        ("put", [7]),
        ("draft", [A, B]),
        ("draft", [A, B]),
        ("put", [A, B]),
        ("draft", [C, EOS]),
        ("draft", [C, EOS]),
        ("put", [C, EOS]),
        ("end", None),
    ]


def test_a_draft_is_the_block_with_predictions_in_place_of_masks():
    model, steps = random_model(3), []
    recorder = Recorder()
    model.generate(
        torch.tensor([[7, MASK, 9]]), max_new_tokens=7, block_length=4, streamer=recorder, on_step=steps.append
    )
    # A blank is shown within the prompt.
    blank, *response = steps
    assert recorder.of("draft")[0] == [7, blank.proposals.item(), 9]
    assert recorder.of("draft")[1:] == [step.proposals.tolist() for step in response]
    for step in steps:
        block = step.tokens[step.columns]
        is_decided = block != MASK
        assert torch.equal(step.proposals[is_decided], block[is_decided])
        assert (step.proposals != MASK).all()


def test_a_streamer_gets_what_stands_before_a_stop_string_and_no_more():
    model = TableModel(table_of({1: {A: 0.9}, 2: {B: 0.9}, 3: {C: 0.9}, 4: {D: 0.9}}, 64, vocab_size=37))
    recorder = Recorder()
    output = model.generate(
        torch.tensor([[11]]),
        max_new_tokens=8,
        block_length=4,
        stop_strings="b",
        tokenizer=tiny_tokenizer(),
        streamer=recorder,
    )
    assert recorder.of("put") == [[11], [A, B]] and output.tolist() == [[11, A, B]]


# Transformers' own streamers, on a model that writes "ab cd\nad</s>"

RESPONSE = [A, B, SPACE, C, D, NEWLINE, A, D, EOS]
PROMPT = torch.tensor([[D, A, SPACE]])


@pytest.fixture
def writer():
    rows = {position: {EOS: 0.9} for position in range(64)}
    rows.update({3 + i: {token: 0.9} for i, token in enumerate(RESPONSE)})
    return TableModel(table_of(rows, 64, vocab_size=37))


@pytest.mark.parametrize("block_length", [1, 2, 5, 20])
@pytest.mark.parametrize("skip_prompt", [False, True])
def test_text_streamer(writer, capsys, block_length, skip_prompt):
    streamer = TextStreamer(tiny_tokenizer(), skip_prompt=skip_prompt, skip_special_tokens=True)
    writer.generate(PROMPT, max_new_tokens=12, block_length=block_length, streamer=streamer)
    assert capsys.readouterr().out == ("" if skip_prompt else "da ") + "ab cd\nad\n"


@pytest.mark.parametrize("block_length", [1, 2, 5, 20])
def test_text_iterator_streamer(writer, block_length):
    streamer = TextIteratorStreamer(tiny_tokenizer(), skip_prompt=True, timeout=60)
    arguments = {"max_new_tokens": 12, "block_length": block_length, "streamer": streamer}
    thread = Thread(target=writer.generate, args=(PROMPT,), kwargs=arguments)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == "ab cd\nad</s>"


@pytest.mark.parametrize("block_length", [1, 2, 5, 20])
@pytest.mark.parametrize("skip_prompt", [False, True])
def test_text_diffusion_streamer(writer, capsys, block_length, skip_prompt):
    streamer = TextDiffusionStreamer(tiny_tokenizer(), skip_prompt=skip_prompt, skip_special_tokens=True)
    writer.generate(PROMPT, max_new_tokens=12, block_length=block_length, streamer=streamer)
    printed = capsys.readouterr().out
    # A draft is saved cursor, yellow text; it is wiped by the restored cursor before anything else is printed.
    drafts = re.findall("\0337\033\\[33m(.*?)\033\\[0m\0338\033\\[J", printed, flags=re.DOTALL)
    settled = re.sub("\0337.*?\0338\033\\[J", "", printed, flags=re.DOTALL)
    assert settled == ("" if skip_prompt else "da ") + "ab cd\nad\n"
    # One draft per pass; the model's predictions never change, so each of a block shows the block's text.
    blocks = [RESPONSE[i : i + block_length] for i in range(0, 9, block_length)]
    texts = [tiny_tokenizer().decode(block, skip_special_tokens=True) for block in blocks]
    assert list(dict.fromkeys(drafts)) == list(dict.fromkeys(texts))


def test_on_step_receives_the_rows_that_took_part():
    # Rows end after 1 and 3 tokens: the second alone takes part in the later passes.
    model = TableModel(table_of({3: {A: 0.9}, 4: {B: 0.9}, 5: {EOS: 0.9}}, 64))
    steps = []
    prompts = torch.tensor([[7, 7, 7], [1, 1, 7]])
    mask = torch.tensor([[1, 1, 1], [0, 0, 1]])
    model.generate(prompts, attention_mask=mask, max_new_tokens=8, block_length=1, on_step=steps.append)
    # Row 0 writes positions 3, 4, 5: A B EOS. Row 1 writes positions 1, 2 (token 3), then the same.
    assert [step.row for step in steps] == [0, 1] * 3 + [1] * 2
    assert [step.columns.tolist() for step in steps if step.row == 0] == [[3], [4], [5]]
    assert [step.columns.tolist() for step in steps if step.row == 1] == [[1], [2], [3], [4], [5]]
    assert [step.num_forward_passes for step in steps if step.row == 1] == [1, 2, 3, 4, 5]
    assert steps[-1].tokens.tolist() == [7, 3, 3, A, B, EOS]
