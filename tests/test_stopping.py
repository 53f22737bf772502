"""Where a text ends: EOS ids, stop strings, criteria, time and lengths."""

import itertools

import pytest
import torch
from tiny_models import EOS, MASK, PAD, TableModel, pad_left, prompt_of, random_model, table_of, tiny_tokenizer
from transformers import GenerationConfig, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation import stopping_criteria as transformers_criteria

A, B, C, D = 6, 7, 8, 9  # "a", "b", "c", "d"
AB, CD = 33, 34  # "ab", "cd"


def writer_of(tokens: list[int], prompt_length: int = 1, confidences: list[float] | None = None) -> TableModel:
    """A model that writes these tokens after the prompt, and then EOS."""
    confidences = confidences or [0.9] * len(tokens)
    rows = {prompt_length + i: {token: p} for i, (token, p) in enumerate(zip(tokens, confidences))}
    rows.update({position: {EOS: 0.9} for position in range(prompt_length + len(tokens), 64)})
    return TableModel(table_of(rows, 64, vocab_size=37))


# EOS


@pytest.mark.parametrize("canvas", ["growing", "fixed"])
@pytest.mark.parametrize(
    ("eos_token_id", "response"),
    [(EOS, [A, B, C, D, EOS]), (C, [A, B, C]), ([D, C], [A, B, C]), ([B, D], [A, B]), ([EOS], [A, B, C, D, EOS])],
)
def test_the_first_of_several_eos_ids_ends_the_text(canvas, eos_token_id, response):
    output = writer_of([A, B, C, D]).generate(
        prompt_of(1), max_new_tokens=9, block_length=3, canvas=canvas, eos_token_id=eos_token_id
    )
    assert output.tolist() == [[7, *response]]


def test_without_an_eos_id_the_text_goes_on():
    output = writer_of([A, B]).generate(prompt_of(1), max_new_tokens=5, eos_token_id=None, pad_token_id=PAD)
    assert output.tolist() == [[7, A, B, EOS, EOS, EOS]]


def test_an_eos_of_the_prompt_or_of_a_blank_ends_nothing():
    # Position 1 is a blank that the model fills with EOS.
    model = writer_of([A, B], prompt_length=3)
    model.table[1] = table_of({1: {EOS: 0.9}}, 2, vocab_size=37)[1]
    prompt = torch.tensor([[EOS, MASK, D]])
    assert model.generate(prompt, max_new_tokens=4).tolist() == [[EOS, EOS, D, A, B, EOS]]


def test_a_row_waits_for_what_stands_before_its_eos():
    # The four EOS (.9) are surer than A (.7) and B (.6), without which the text has not come to its end.
    model = writer_of([A, B], confidences=[0.7, 0.6])
    steps = []
    output = model.generate(
        prompt_of(1), max_new_tokens=6, block_length=6, on_step=steps.append, return_dict_in_generate=True
    )
    assert [step.committed.nonzero().flatten().tolist() for step in steps] == [[2], [3], [4], [5], [0], [1]]
    assert output.sequences.tolist() == [[7, A, B, EOS]]
    # The other way round confidence falls along the text: EOS comes third, and what follows it is never decided.
    model = TableModel(table_of({1: {A: 0.9}, 2: {B: 0.8}, 3: {EOS: 0.7}, 4: {C: 0.6}, 5: {C: 0.6}}, 6, vocab_size=37))
    output = model.generate(prompt_of(1), max_new_tokens=5, return_dict_in_generate=True)
    assert output.sequences.tolist() == [[7, A, B, EOS]]
    assert output.num_forward_passes.tolist() == [3]
    assert output.tokens_per_forward.tolist() == [1.0]


def test_what_follows_the_end_is_padding():
    model = random_model(0)
    prompts = [[7], [8, 9], [10, 11, 12], [13]]
    output = model.generate(**pad_left(prompts), max_new_tokens=20, eos_token_id=[EOS, 15], pad_token_id=4)
    ends = [next((i + 1 for i in range(3, output.shape[1]) if row[i] in (EOS, 15)), None) for row in output.tolist()]
    assert len(set(ends)) > 1  # the rows do end at different places
    for row, end in zip(output.tolist(), ends):
        assert end is None or row[end:] == [4] * (len(row) - end)
    assert output.shape[1] == max(end or 23 for end in ends)


def test_without_a_pad_id_the_first_eos_id_pads():
    model = writer_of([A])
    model.generation_config.pad_token_id = None
    batch = {"inputs": torch.tensor([[7], [8]]), "max_new_tokens": 4}
    # The second row is stopped after its first token, so the first one's EOS stands beside padding.
    output = model.generate(**batch, block_length=1, eos_token_id=[D, EOS], stopping_criteria=[_SecondRow()])
    assert output.tolist() == [[7, A, EOS], [8, A, D]]


class _SecondRow:
    def __call__(self, input_ids, scores):
        return input_ids[:, 0] == 8


# Stop strings


@pytest.mark.parametrize("canvas", ["growing", "fixed"])
@pytest.mark.parametrize("block_length", [1, 2, 3, 8])
@pytest.mark.parametrize(
    ("stop_strings", "response"),
    [
        ("c", [A, B, C]),
        ("bc", [A, B, C]),  # over two tokens
        (["da", "bc"], [A, B, C]),  # the first of several
        ("cda", [A, B, C, D, AB]),  # ends inside a token, which stays whole
        ("aba", [A, B, C, D, AB, A]),
        ("zz", [A, B, C, D, AB, A, EOS]),
        ("ba", [A, B, C, D, AB, A]),
    ],
    ids=str,
)
def test_a_stop_string_ends_the_text_where_it_is_complete(canvas, block_length, stop_strings, response):
    output = writer_of([A, B, C, D, AB, A]).generate(
        torch.tensor([[11]]),
        max_new_tokens=12,
        block_length=block_length,
        canvas=canvas,
        stop_strings=stop_strings,
        tokenizer=tiny_tokenizer(),
        return_dict_in_generate=True,
        output_trace=True,
    )
    assert output.sequences.tolist() == [[11, *response]]
    assert output.commit_steps.shape == output.sequences.shape
    assert (output.commit_steps[0, 1:] > 0).all()


@pytest.mark.parametrize("canvas", ["growing", "fixed"])
@pytest.mark.parametrize("block_length", [1, 2, 8])
@pytest.mark.parametrize(
    ("stop_strings", "response"),
    [
        ("c", [A, D, A, D, EOS]),  # stands in the prompt
        ("ca", [A, D, A, D, EOS]),  # begins in the prompt
        ("cad", [A, D, A, D, EOS]),
        ("bca", [A, D, A, D, EOS]),
        (["cad", "da"], [A, D, A]),
        ("ad", [A, D]),
        ("dad", [A, D, A, D]),  # over three blocks of one token
    ],
    ids=str,
)
def test_a_stop_string_is_searched_in_the_response_only(canvas, block_length, stop_strings, response):
    prompt = torch.tensor([[AB, C]])
    arguments = {"max_new_tokens": 6, "tokenizer": tiny_tokenizer(), "block_length": block_length, "canvas": canvas}
    output = writer_of([A, D, A, D], prompt_length=2).generate(prompt, stop_strings=stop_strings, **arguments)
    assert output.tolist() == [[AB, C, *response]]


def test_a_stop_string_may_end_inside_the_first_token_of_the_response():
    """... and begin inside it; only what stands in the prompt does not count."""
    model = writer_of([AB, D])
    arguments = {"max_new_tokens": 4, "tokenizer": tiny_tokenizer()}
    assert model.generate(torch.tensor([[C]]), stop_strings="b", **arguments).tolist() == [[C, AB]]
    assert model.generate(torch.tensor([[C]]), stop_strings="ca", **arguments).tolist() == [[C, AB, D, EOS]]


def test_a_filled_blank_of_the_prompt_is_not_searched_for_a_stop_string():
    output = writer_of([A, B, C, D]).generate(
        torch.tensor([[7, MASK, MASK]]), max_new_tokens=4, stop_strings=["bc", "cd"], tokenizer=tiny_tokenizer()
    )
    assert output.tolist() == [[7, A, B, C, D]]


def test_a_stop_string_before_an_eos_of_the_same_block_comes_first():
    output = writer_of([A, B, C]).generate(
        prompt_of(1), max_new_tokens=8, block_length=8, stop_strings="b", tokenizer=tiny_tokenizer()
    )
    assert output.tolist() == [[7, A, B]]


def test_a_stop_string_after_the_eos_is_not_read():
    # What the block holds behind EOS (position 2) is decided first, since it is surer, and dropped.
    model = TableModel(table_of({1: {A: 0.7}, 2: {EOS: 0.6}, 3: {C: 0.9}, 4: {C: 0.9}}, 5, vocab_size=37))
    output = model.generate(prompt_of(1), max_new_tokens=4, stop_strings="c", tokenizer=tiny_tokenizer())
    assert output.tolist() == [[7, A, EOS]]


def test_rows_stop_each_at_their_own_place():
    """The second row's prompt is shorter, so that it writes what the model writes at earlier positions."""
    output = writer_of([A, B, C, D]).generate(
        torch.tensor([[11, 11], [PAD, 11]]),
        attention_mask=torch.tensor([[1, 1], [0, 1]]),
        max_new_tokens=8,
        block_length=4,
        stop_strings="c",
        tokenizer=tiny_tokenizer(),
    )
    assert output.tolist() == [[11, 11, B, C, PAD], [PAD, 11, A, B, C]]


# Criteria


class _Criterion:
    def __init__(self, answers):
        self.answers, self.seen = iter(answers), []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.tolist())
        return torch.tensor(next(self.answers))


def test_criteria_are_asked_at_the_end_of_each_block():
    criterion = _Criterion([[False], [False], [True]])
    output = writer_of([A, B, C, D, A, B, C, D]).generate(
        prompt_of(1), max_new_tokens=8, block_length=2, stopping_criteria=StoppingCriteriaList([criterion])
    )
    assert criterion.seen == [[[7, A, B]], [[7, A, B, C, D]], [[7, A, B, C, D, A, B]]]
    assert output.tolist() == [[7, A, B, C, D, A, B]]


def test_on_a_fixed_canvas_criteria_see_no_masks():
    criterion = _Criterion([[False], [True]])
    output = writer_of([A, B, C, D, A, B]).generate(
        prompt_of(1), max_new_tokens=6, block_length=2, canvas="fixed", stopping_criteria=[criterion]
    )
    assert criterion.seen == [[[7, A, B]], [[7, A, B, C, D]]]
    assert output.tolist() == [[7, A, B, C, D]]


def test_a_criterion_is_asked_for_each_row_by_itself():
    """With a batch of one, at the end of the row's own blocks: rows are not at the same block at the same time."""
    criterion = _Criterion([[False], [True], [True]])
    output = writer_of([A, B, C, D, A]).generate(
        torch.tensor([[7], [10]]),
        max_new_tokens=5,
        block_length=2,
        stopping_criteria=[criterion],
        return_dict_in_generate=True,
    )
    assert criterion.seen == [[[7, A, B]], [[10, A, B]], [[7, A, B, C, D]]]
    assert output.sequences.tolist() == [[7, A, B, C, D], [10, A, B, PAD, PAD]]
    assert output.num_forward_passes.tolist() == [4, 2]


def test_criteria_are_not_asked_before_there_is_a_response():
    """Or else blanks could stay open."""
    criterion = _Criterion([[True], [True]])
    output = writer_of([A, B, C, D], prompt_length=1).generate(
        torch.tensor([[7, MASK, MASK], [7, 7, 7]]), max_new_tokens=2, block_length=1, stopping_criteria=[criterion]
    )
    assert criterion.seen == [[[7, 7, 7, C]], [[7, A, B, C]]]
    assert output.tolist() == [[7, A, B, C], [7, 7, 7, C]]


def test_a_criterion_that_answers_for_several_texts_is_refused():
    with pytest.raises(ValueError, match="`stopping_criteria` must answer with one bool for each text"):
        writer_of([A] * 9).generate(
            prompt_of(1), max_new_tokens=4, stopping_criteria=[lambda ids, scores: torch.tensor([True, False])]
        )


def test_a_criterion_may_answer_with_a_plain_bool():
    """As `StoppingCriteriaList` allows."""
    output = writer_of([A] * 9).generate(
        torch.tensor([[7], [10]]),
        max_new_tokens=9,
        block_length=2,
        stopping_criteria=[lambda input_ids, scores: input_ids.shape[1] >= 5],
    )
    assert output.tolist() == [[7, A, A, A, A], [10, A, A, A, A]]


def test_transformers_own_criteria_work():
    output = writer_of([A] * 9).generate(
        prompt_of(2), max_new_tokens=9, block_length=2, stopping_criteria=[MaxLengthCriteria(5)]
    )
    assert output.shape == (1, 6)  # the end of the block in which the length is reached


def test_max_time(monkeypatch):
    """A clock that moves on by a second each time it is read: at the start, and at the end of each block."""
    monkeypatch.setattr(transformers_criteria.time, "time", itertools.count().__next__)
    output = writer_of([A] * 20).generate(prompt_of(1), max_new_tokens=20, block_length=3, max_time=2.5)
    assert output.shape == (1, 1 + 3 * 3)


# Lengths


def test_max_length_counts_the_prompt():
    model = writer_of([A] * 20, prompt_length=3)
    assert model.generate(prompt_of(3), max_length=8).tolist() == [[7] * 3 + [A] * 5]
    # ... and its padding, as in Transformers
    assert model.generate(**pad_left([[7] * 3, [7]]), max_length=8).shape == (2, 8)


def test_max_new_tokens_wins_over_max_length():
    assert writer_of([A] * 9).generate(prompt_of(1), max_length=8, max_new_tokens=2).shape == (1, 3)


def test_the_callers_length_wins_over_the_checkpoints():
    model = writer_of([A] * 20)
    model.generation_config.max_new_tokens = 4
    assert model.generate(prompt_of(1)).shape == (1, 5)
    assert model.generate(prompt_of(1), max_length=9).shape == (1, 9)
    assert model.generate(prompt_of(1), GenerationConfig(max_length=9)).shape == (1, 9)
    assert model.generate(prompt_of(1), max_new_tokens=9).shape == (1, 10)


def test_the_default_length_is_what_the_model_has_room_for():
    assert writer_of([A] * 63).generate(prompt_of(1)).shape == (1, 64)


def test_a_plain_generation_config_on_the_model_leaves_the_defaults():
    model = writer_of([A] * 9)
    model.generation_config = GenerationConfig(max_new_tokens=3, pad_token_id=PAD)
    assert model.generate(prompt_of(1)).tolist() == [[7, A, A, A]]


@pytest.mark.parametrize(
    "arguments", [{"min_new_tokens": 3}, {"min_length": 4}, {"min_new_tokens": 3, "min_length": 2}]
)
@pytest.mark.parametrize("block_length", [1, 2, 8])
def test_no_eos_before_the_least_length(arguments, block_length):
    # The model would write A and EOS. Without EOS (.9) token 3 (.1) is the next.
    output = writer_of([A]).generate(prompt_of(1), max_new_tokens=8, block_length=block_length, **arguments)
    assert output.tolist() == [[7, A, 3, 3, EOS]]


def test_the_least_length_is_the_responses_and_says_nothing_of_blanks():
    model = writer_of([EOS, A])
    output = model.generate(torch.tensor([[7, MASK]]), max_new_tokens=3, min_new_tokens=2, block_length=1)
    assert output.tolist() == [[7, EOS, A, 3, EOS]]


def test_blanks_alone():
    """`max_new_tokens=0` appends nothing; a row without blanks takes part in no pass."""
    output = writer_of([A, B], prompt_length=1).generate(
        torch.tensor([[7, MASK, MASK, 8], [7, 8, 8, 8]]), max_new_tokens=0, return_dict_in_generate=True
    )
    assert output.sequences.tolist() == [[7, A, B, 8], [7, 8, 8, 8]]
    assert output.num_forward_passes.tolist() == [2, 0]
    assert output.tokens_per_forward.tolist() == [1.0, 0.0]
