"""Sampling through Transformers' own processors, on a model whose probabilities the test writes down."""

import math

import pytest
import torch
from tiny_models import EOS, MASK, TableModel, pad_left, prompt_of, random_model, table_of
from transformers import LogitsProcessor, LogitsProcessorList

A, B, C, D = 6, 7, 8, 9
PROBABILITIES = {A: 0.4, B: 0.3, C: 0.2, D: 0.1}
NUM_SAMPLES = 400

# One pass predicts and commits 400 independent positions of the same distribution.
AT_ONCE = {"max_new_tokens": NUM_SAMPLES, "block_length": NUM_SAMPLES, "max_denoising_steps": 1, "do_sample": True}


@pytest.fixture(scope="module")
def model():
    return TableModel(table_of(dict.fromkeys(range(NUM_SAMPLES + 4), PROBABILITIES), NUM_SAMPLES + 4))


def _sample(model, **arguments):
    """Shares of the tokens among the samples, and the output."""
    output = model.generate(
        **{
            "inputs": prompt_of(1),
            **AT_ONCE,
            "generator": torch.Generator().manual_seed(0),
            "return_dict_in_generate": True,
            "output_trace": True,
            **arguments,
        }
    )
    tokens, counts = output.sequences[0, 1:].unique(return_counts=True)
    return dict(zip(tokens.tolist(), (counts / NUM_SAMPLES).tolist())), output


@pytest.mark.parametrize(
    ("arguments", "shares"),
    [
        ({}, {A: 0.4, B: 0.3, C: 0.2, D: 0.1}),
        # p ** (1 / 2) = .632 .548 .447 .316, in sum 1.943
        ({"temperature": 2.0}, {A: 0.325, B: 0.282, C: 0.230, D: 0.163}),
        ({"temperature": 1e-3}, {A: 1.0}),
        ({"temperature": 1e6}, {A: 0.25, B: 0.25, C: 0.25, D: 0.25}),
        ({"top_k": 1}, {A: 1.0}),
        ({"top_k": 2}, {A: 4 / 7, B: 3 / 7}),
        # The fewest of the likeliest that hold .65, and .75
        ({"top_p": 0.65}, {A: 4 / 7, B: 3 / 7}),
        ({"top_p": 0.75}, {A: 4 / 9, B: 3 / 9, C: 2 / 9}),
        # At least .6 of the best: .24; and .4 of it: .16
        ({"min_p": 0.6}, {A: 4 / 7, B: 3 / 7}),
        ({"min_p": 0.4}, {A: 4 / 9, B: 3 / 9, C: 2 / 9}),
        # Entropy H = 1.280; |-ln p - H| = .364 .076 .330 1.023: B, then C, then A
        ({"typical_p": 0.25}, {B: 1.0}),
        ({"typical_p": 0.45}, {B: 3 / 5, C: 2 / 5}),
        # One after the other: temperature .5 squares: .16 .09 .04 .01, and top_k takes two of them
        ({"temperature": 0.5, "top_k": 2}, {A: 16 / 25, B: 9 / 25}),
        ({"suppress_tokens": [A, D]}, {B: 3 / 5, C: 2 / 5}),
        ({"suppress_tokens": [A], "top_k": 1}, {B: 1.0}),
        ({"bad_words_ids": [[A], [D]]}, {B: 3 / 5, C: 2 / 5}),
        # exp(log 2) doubles .2: .4 .3 .4 .1, in sum 1.2
        ({"sequence_bias": {(C,): math.log(2)}}, {A: 4 / 12, B: 3 / 12, C: 4 / 12, D: 1 / 12}),
        ({"sequence_bias": [[[C], math.log(2)], [[A], -math.inf]]}, {B: 3 / 8, C: 4 / 8, D: 1 / 8}),
        # Biases come before sampling: temperature .5 squares .4 .3 .4 .1, and top_k takes two of them
        ({"sequence_bias": {(C,): math.log(2)}, "temperature": 0.5, "top_k": 2}, {A: 1 / 2, C: 1 / 2}),
    ],
    ids=str,
)
def test_samples_have_the_right_shares(model, arguments, shares):
    sampled, _ = _sample(model, **arguments)
    assert sampled.keys() == shares.keys()
    for token, share in shares.items():
        # Four standard deviations of a share of 400 samples are at most 4 * sqrt(.25 / 400) = .1.
        assert abs(sampled[token] - share) <= 4 * (share * (1 - share) / NUM_SAMPLES) ** 0.5


def test_sampling_is_from_the_whole_distribution_by_default():
    """Transformers' default of `top_k=50` would cut a vocabulary of 200 short."""
    # Nearly flat: equal logits would all be among the first 50.
    flat = TableModel(torch.linspace(0, 0.1, 200).expand(NUM_SAMPLES + 1, 200))
    shares, _ = _sample(flat, eos_token_id=None)
    assert len(shares) > 100


@pytest.mark.parametrize(
    "warpers", [{}, {"temperature": 3.0}, {"temperature": 0.1, "top_k": 3}, {"top_p": 0.5}, {"min_p": 0.4}], ids=str
)
def test_confidence_is_that_of_the_distribution_before_warping(model, warpers):
    _, output = _sample(model, **warpers)
    expected = torch.tensor([PROBABILITIES[token] for token in output.sequences[0, 1:].tolist()])
    torch.testing.assert_close(output.commit_confidences[0, 1:], expected)


def test_confidence_is_that_of_the_distribution_after_processing(model):
    # Without A: B .3 / .6, C .2 / .6, D .1 / .6
    _, output = _sample(model, suppress_tokens=[A])
    expected = torch.tensor([PROBABILITIES[token] / 0.6 for token in output.sequences[0, 1:].tolist()])
    torch.testing.assert_close(output.commit_confidences[0, 1:], expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"bad_words_ids": [[A], [D], [MASK]]}, {B: 3 / 5, C: 2 / 5}),
        ({"sequence_bias": {(B,): math.log(2), (C,): -math.log(2)}}, {A: 4 / 12, B: 6 / 12, C: 1 / 12, D: 1 / 12}),
    ],
    ids=str,
)
def test_confidence_counts_bad_words_and_biases(model, arguments, expected):
    _, output = _sample(model, **arguments)
    confidences = torch.tensor([expected[token] for token in output.sequences[0, 1:].tolist()])
    torch.testing.assert_close(output.commit_confidences[0, 1:], confidences)


@pytest.mark.parametrize("blanks", [(), (0, 2)], ids=["no blanks", "blanks"])
def test_bad_words_and_biases_of_a_greedy_call(model, blanks):
    prompt = prompt_of(3, blanks)
    arguments = {"inputs": prompt, "max_new_tokens": 2, "block_length": 2}
    for settings, best in (
        ({}, A),
        ({"bad_words_ids": [[A]]}, B),
        ({"bad_words_ids": [[A], [B]]}, C),
        ({"sequence_bias": {(B,): 0.28}}, A),  # log(.4 / .3) = .2877
        ({"sequence_bias": {(B,): 0.29}}, B),
        ({"sequence_bias": [[[MASK], 50.0], [[D], 1.5]]}, D),  # [MASK] is never a prediction
    ):
        expected = torch.cat([prompt.masked_fill(prompt == MASK, best), torch.tensor([[best, best]])], 1)
        assert torch.equal(model.generate(**arguments, **settings), expected)


def test_an_eos_among_the_bad_words_is_never_written():
    model = TableModel(table_of(dict.fromkeys(range(4), {EOS: 0.9, A: 0.06}), 4))
    assert model.generate(prompt_of(1), max_new_tokens=3).tolist() == [[7, EOS]]
    assert model.generate(prompt_of(1), max_new_tokens=3, bad_words_ids=[[EOS]]).tolist() == [[7, A, A, A]]


def test_suppressed_tokens_of_a_greedy_call(model):
    output = model.generate(prompt_of(1), max_new_tokens=3, suppress_tokens=[A, B])
    assert output.tolist() == [[7, C, C, C]]


def test_warpers_do_not_touch_a_greedy_call(model):
    output = model.generate(
        prompt_of(1), max_new_tokens=2, temperature=5.0, top_k=1, return_dict_in_generate=True, output_trace=True
    )
    torch.testing.assert_close(output.commit_confidences[0, 1:], torch.tensor([0.4, 0.4]))


def test_the_repetition_penalty_counts_the_tokens_of_the_canvas(model):
    # log .4 doubled is log .16: of A .16, B .3, C .2, D .1 (.76 in sum) B is best; then C, .2 of .09 + .16 + .2 + .1.
    output = model.generate(
        torch.tensor([[A]]),
        max_new_tokens=2,
        repetition_penalty=2.0,
        return_dict_in_generate=True,
        output_trace=True,
    )
    assert output.sequences.tolist() == [[A, B, C]]
    torch.testing.assert_close(output.commit_confidences[0, 1:], torch.tensor([0.3 / 0.76, 0.2 / 0.55]))


class _Recorder(LogitsProcessor):
    """Keeps what it is called with, and forbids one token."""

    def __init__(self, forbidden: int):
        self.forbidden, self.calls = forbidden, []

    def __call__(self, input_ids, scores):
        self.calls.append((input_ids.tolist(), tuple(scores.shape)))
        scores = scores.clone()
        scores[:, self.forbidden] = -torch.inf
        return scores


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_users_processor_sees_the_canvas_of_each_masked_position(model, do_sample):
    recorder = _Recorder(A)
    output = model.generate(
        **pad_left([[C, C, C], [D]]),
        max_new_tokens=2,
        do_sample=do_sample,
        top_k=1,
        logits_processor=LogitsProcessorList([recorder]),
    )
    # Each text as it is by itself, without padding.
    M = MASK
    assert recorder.calls[0] == ([[C, C, C, M, M]] * 2, (2, 16))
    assert recorder.calls[1] == ([[D, M, M]] * 2, (2, 16))
    assert recorder.calls[2] == ([[C, C, C, B, M]], (1, 16))
    assert recorder.calls[3] == ([[D, B, M]], (1, 16))
    assert len(recorder.calls) == 4
    assert output[:, 3:].tolist() == [[B, B], [B, B]]


def test_a_users_processor_changes_confidence(model):
    _, output = _sample(model, logits_processor=LogitsProcessorList([_Recorder(A)]), top_k=1)
    torch.testing.assert_close(output.commit_confidences[0, 1:], torch.full((NUM_SAMPLES,), 0.5))


def test_low_confidence_ranks_the_sampled_tokens(model):
    steps = []
    _sample(model, max_new_tokens=40, block_length=40, max_denoising_steps=40, on_step=steps.append)
    step = steps[0]
    best = max(PROBABILITIES[token] for token in step.proposals.tolist())
    (committed,) = step.committed.nonzero().flatten().tolist()
    samples = [PROBABILITIES[token] for token in step.proposals.tolist()]
    assert committed == samples.index(best)


def test_a_threshold_goes_by_the_sampled_tokens(model):
    steps = []
    _sample(
        model,
        max_new_tokens=40,
        block_length=40,
        max_denoising_steps=40,
        confidence_threshold=0.25,
        on_step=steps.append,
    )
    for step in steps:
        is_sure = torch.isin(step.proposals, torch.tensor([A, B])) & step.confidence.isfinite()
        assert torch.equal(step.committed, is_sure) or int(step.committed.sum()) == 1


def test_samples_of_one_prompt_are_those_of_a_batch_of_it():
    model, prompt = random_model(1), torch.tensor([[7, MASK, 8]])
    arguments = {"max_new_tokens": 6, "do_sample": True, "temperature": 3.0, "block_length": 3}
    several = model.generate(prompt, **arguments, num_return_sequences=4, generator=torch.Generator().manual_seed(0))
    batch = model.generate(prompt.repeat(4, 1), **arguments, generator=torch.Generator().manual_seed(0))
    assert torch.equal(several, batch)
    assert len(set(map(tuple, several.tolist()))) > 1


def test_samples_of_two_prompts_stand_next_to_each_other(model):
    output = model.generate(
        **pad_left([[C, C], [D]]), max_new_tokens=2, do_sample=True, num_return_sequences=2, top_k=1
    )
    assert output[:, 1].tolist() == [C, C, D, D]
