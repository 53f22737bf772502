"""Revision of finished text."""

import copy
import math
from fractions import Fraction

import pytest
import torch
from transformers import GenerationConfig

from illada import MaskedDiffusionGenerationConfig
from illada.revision import least_likely, leave_one_out_confidences


@pytest.fixture
def text():
    return torch.randint(6, 64, (1, 9), generator=torch.Generator().manual_seed(0))


def test_confidences_are_those_of_each_token_masked_alone(tiny_model, text):
    asked = torch.ones_like(text, dtype=torch.bool)
    asked[0, 3] = False
    with torch.no_grad():
        confidences = leave_one_out_confidences(tiny_model, text, torch.ones_like(asked), asked, 5)
        for position in range(9):
            masked = text.clone()
            masked[0, position] = 5
            logits = tiny_model(masked).logits[0, position]
            logits[5] = -torch.inf  # [MASK] is no prediction
            expected = logits.softmax(-1)[text[0, position]]
            if position != 3:
                torch.testing.assert_close(confidences[0, position], expected)
    assert confidences[0, 3].isnan()


def test_fewer_passes_mask_tokens_together(tiny_model, text):
    calls = []
    hook = tiny_model.register_forward_pre_hook(lambda m, a, k: calls.append(k["input_ids"]), with_kwargs=True)
    everything = torch.ones_like(text, dtype=torch.bool)
    with torch.no_grad():
        leave_one_out_confidences(tiny_model, text, everything, everything, 5, num_passes=3)
    hook.remove()
    assert [(ids == 5)[0].nonzero().squeeze(-1).tolist() for ids in calls] == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]


def test_least_likely():
    nan = torch.nan
    confidences = torch.tensor([[0.9, 0.1, nan, 0.5], [0.2, 0.2, 0.8, nan]])
    assert least_likely(confidences, threshold=0.5).tolist() == [
        [False, True, False, False],
        [True, True, False, False],
    ]
    # a third of three tokens is one; ties go to the lower position
    assert least_likely(confidences, fraction=1 / 3).tolist() == [
        [False, True, False, False],
        [True, False, False, False],
    ]
    assert torch.equal(least_likely(confidences, fraction=1.0), ~confidences.isnan())


def test_a_fraction_is_an_exact_count():
    """Of all shares in hundredths, and of `k / n` for all k: by exact arithmetic."""
    for n in range(1, 121):
        confidences = torch.rand(1, n, generator=torch.Generator().manual_seed(n))
        for text in (f"{hundredths / 100:.2f}" for hundredths in range(1, 101)):
            expected = math.ceil(Fraction(text) * n)
            assert int(least_likely(confidences, fraction=float(text)).sum()) == expected, (text, n)
        for k in range(1, n + 1):
            assert int(least_likely(confidences, fraction=k / n).sum()) == k, (k, n)


def test_three_tenths_of_fifty_are_fifteen(tiny_model):
    text = torch.randint(6, 64, (1, 50), generator=torch.Generator().manual_seed(0))
    masked = []
    hook = tiny_model.register_forward_pre_hook(
        lambda module, arguments, keywords: masked.append(int((keywords["input_ids"] == 5).sum())), with_kwargs=True
    )
    tiny_model.revise(text, fraction=0.3, num_scoring_passes=1)
    hook.remove()
    assert masked[:2] == [50, 15]  # all are asked at once, then the least likely are filled


def test_revision_changes_only_what_is_least_likely_and_not_protected(tiny_model, text):
    protected = torch.zeros_like(text, dtype=torch.bool)
    protected[0, :4] = True
    output = tiny_model.revise(text, fraction=0.4, protected=protected, block_length=4)
    assert torch.equal(output.sequences[0, :4], text[0, :4])
    assert torch.equal(output.changed, output.sequences != text)
    assert 0 < output.changed.sum() <= 2  # two fifths of five tokens
    chosen = least_likely(output.confidences, fraction=0.4)
    assert not (output.changed & ~chosen).any()
    # what was written anew is what generate writes into these blanks
    filled = tiny_model.generate(text.masked_fill(chosen, 5), max_new_tokens=0, block_length=4)
    assert torch.equal(output.sequences, filled)


def test_more_rounds_end_when_nothing_changes(tiny_model, text):
    once = tiny_model.revise(text, fraction=0.3)
    often = tiny_model.revise(text, fraction=0.3, num_rounds=50)
    assert once.num_rounds == 1 and 1 < often.num_rounds
    again = tiny_model.revise(often.sequences, fraction=0.3)
    if often.num_rounds < 50:
        assert torch.equal(again.sequences, often.sequences)


def test_rows_of_a_padded_batch_are_revised_as_alone(tiny_model, text):
    short = text[:, :5]
    batch = torch.cat([text, torch.cat([torch.ones(1, 4, dtype=torch.long), short], 1)])
    output = tiny_model.revise(batch, fraction=0.5)
    assert torch.equal(output.sequences[:1], tiny_model.revise(text, fraction=0.5).sequences)
    assert torch.equal(output.sequences[1:, 4:], tiny_model.revise(short, fraction=0.5).sequences)


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({}, "fraction"),
        ({"fraction": 0.1, "threshold": 0.1}, "fraction"),
        ({"fraction": 0.0}, "fraction"),
        ({"threshold": 1.5}, "threshold"),
        ({"fraction": "much"}, "fraction"),
        ({"fraction": True}, "fraction"),
        ({"fraction": 0.5, "num_rounds": True}, "num_rounds"),
        ({"fraction": 0.5, "protected": [True] * 9}, "protected"),
        ({"fraction": 0.5, "max_new_tokens": 4}, "max_new_tokens"),
        ({"fraction": 0.5, "do_sample": True, "num_return_sequences": 2}, "num_return_sequences"),
        ({"fraction": 0.5, "min_new_tokens": 1}, "min_new_tokens"),
        ({"fraction": 0.5, "stop_strings": "a"}, "stop_strings"),
        ({"fraction": 0.5, "output_trace": True}, "output_trace"),
        (
            {"fraction": 0.5, "generation_config": GenerationConfig(max_new_tokens=4)},
            "generation_config.max_new_tokens",
        ),
        ({"fraction": 0.5, "generation_config": GenerationConfig(max_length=40)}, "generation_config.max_length"),
        (
            {
                "fraction": 0.5,
                "generation_config": MaskedDiffusionGenerationConfig(do_sample=True, num_return_sequences=2),
            },
            "generation_config.num_return_sequences",
        ),
        (
            {"fraction": 0.5, "generation_config": GenerationConfig(return_dict_in_generate=True)},
            "generation_config.return_dict_in_generate",
        ),
        ({"fraction": 0.5, "generation_config": {"block_length": 4}}, "generation_config"),
        ({"fraction": 0.5, "num_rounds": 0}, "num_rounds"),
        ({"fraction": 0.5, "num_rounds": 1.5}, "num_rounds"),
        ({"fraction": 0.5, "num_scoring_passes": 0}, "num_scoring_passes"),
        ({"fraction": 0.5, "protected": torch.ones(1, 2, dtype=torch.bool)}, "protected"),
        ({"fraction": 0.5, "block_length": 0}, "block_length"),
        ({"fraction": 0.5, "blok_length": 1}, "blok_length"),
    ],
)
def test_bad_arguments(tiny_model, text, arguments, name):
    hook = tiny_model.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass"))
    try:
        with pytest.raises(ValueError, match=name):
            tiny_model.revise(text, **arguments)
    finally:
        hook.remove()


def test_the_models_own_settings_of_a_response_are_not_used(tiny_model, text, monkeypatch):
    expected = tiny_model.revise(text, fraction=0.5).sequences
    own = MaskedDiffusionGenerationConfig(
        max_new_tokens=9, min_new_tokens=4, stop_strings=["a"], do_sample=False, output_trace=True
    )
    monkeypatch.setattr(
        tiny_model,
        "generation_config",
        MaskedDiffusionGenerationConfig.from_dict(
            tiny_model.generation_config.to_dict() | {k: v for k, v in own.to_dict().items() if v is not None}
        ),
    )
    assert torch.equal(tiny_model.revise(text, fraction=0.5).sequences, expected)


def test_prompt_learning_is_refused_before_the_first_pass(tiny_model, text):
    """While `PeftModel.generate` runs, the model inside knows of it."""
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(copy.deepcopy(tiny_model), config)
    base = model.get_base_model()
    base.prepare_inputs_for_generation = model.prepare_inputs_for_generation
    base.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass"))
    with pytest.raises(ValueError, match="`revise` cannot honour the adapter PROMPT_TUNING"):
        base.revise(text, fraction=0.5)


def test_a_text_beyond_the_models_positions_is_refused_before_the_first_pass(tiny_model):
    tiny_model.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass"))
    with pytest.raises(ValueError, match="max_position_embeddings"):
        tiny_model.revise(torch.full((1, 129), 7), fraction=0.5)


def test_a_text_with_masks_is_refused(tiny_model):
    with pytest.raises(ValueError, match="MASK"):
        tiny_model.revise(torch.tensor([[7, 5, 8]]), fraction=0.5)


def test_logits_that_are_not_finite_are_an_error_that_names_the_position(tiny_model, text):
    def overflow(module, arguments, keywords, output):
        columns = keywords["logits_to_keep"].nonzero()[:, 1]
        output.logits[columns == 4] = torch.inf

    hook = tiny_model.register_forward_hook(overflow, with_kwargs=True)
    try:
        with pytest.raises(ValueError, match="NaN or infinite at column 4 of row 0"):
            tiny_model.revise(text, threshold=0.5)
    finally:
        hook.remove()
