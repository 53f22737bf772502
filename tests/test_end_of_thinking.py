"""The end-of-thinking boost, against its definition in plain loops and against texts worked out by hand."""

import random

import pytest
import torch
from tiny_models import EOS, MASK, PAD, TableModel, pad_left, prompt_of, random_model, table_of

from illada.end_of_thinking import EndOfThinkingBoost

# "Until the response holds the id sequence of </think>, add boost * progress ** power to the logit of that sequence's
# next id (continuing a partial match that ends right before) at the row's first masked position of the active block;
# progress = (position - prompt length + 1) / max new tokens, clipped to [0, 1]." (arXiv 2606.25331)


def boost_of(row, first_mask, ids, boost, power, prompt_length, max_new_tokens) -> tuple[int, float]:
    """The boosted id and the amount, for one row and the position of its first mask."""
    response = row[prompt_length:]
    for start in range(len(response)):
        if response[start : start + len(ids)] == ids:
            return ids[0], 0.0
    written = row[prompt_length:first_mask]
    matched = 0
    for length in range(1, len(ids)):
        if len(written) >= length and written[len(written) - length :] == ids[:length]:
            matched = length
    progress = min(max((first_mask - prompt_length + 1) / max_new_tokens, 0.0), 1.0)
    return ids[matched], boost * progress**power


def test_the_boost_is_the_one_of_the_definition():
    rng = random.Random(0)
    boosted = continued = ended = 0
    for _ in range(300):
        prompt_length, max_new_tokens = rng.randint(1, 5), rng.randint(1, 12)
        # Few ids, so that whole and partial matches, and overlaps such as 7 7 8, are common.
        ids = [rng.choice([7, 8, 9]) for _ in range(rng.randint(1, 4))]
        boost, power = rng.choice([1.0, 100.0]), rng.choice([0.0, 0.5, 1.0, 3.0])
        boost_row = EndOfThinkingBoost(ids, boost, power)
        for _ in range(3):
            first = rng.randint(prompt_length, prompt_length + max_new_tokens - 1)
            row = [rng.choice([7, 8, 9]) for _ in range(first)] + [MASK]
            row += [rng.choice([7, 8, MASK]) for _ in range(prompt_length + max_new_tokens - first - 1)]
            token, amount = boost_of(row, first, ids, boost, power, prompt_length, max_new_tokens)
            raised = boost_row(torch.tensor(row), first, prompt_length, max_new_tokens)
            assert raised == (None if amount == 0 else (token, pytest.approx(amount)))
            boosted += amount > 0
            continued += amount > 0 and token != ids[0]
            ended += amount == 0
    assert min(boosted, continued, ended) > 50


# On a table of logits. Every position prefers A, at .9, to the ids 7 and 8, at .04 each: what separates them is
# ln(.9 / .04) = 3.114 logits.
A, THINK, END = 6, 7, 8
FLAT = dict.fromkeys(range(40), {A: 0.9, THINK: 0.04, END: 0.04})


@pytest.mark.parametrize("canvas", ["growing", "fixed"])
@pytest.mark.parametrize(
    ("arguments", "response"),
    [
        # 6 * progress, progress = 1/10, 2/10 ...: 3.0 at the fifth position, 3.6 at the sixth, 4.2 for the next id
        ({"end_think_boost": 6.0, "end_think_power": 1.0}, [A] * 5 + [THINK, END] + [A] * 3),
        # 6 * progress ** 3: 6 * .512 = 3.07 at the eighth, 6 * .729 = 4.37 at the ninth
        ({"end_think_boost": 6.0}, [A] * 8 + [THINK, END]),
        ({"end_think_boost": 6.0, "end_think_power": 0.0}, [THINK, END] + [A] * 8),
        # never enough: 3.1 at the end
        ({"end_think_boost": 3.1, "end_think_power": 1.0}, [A] * 10),
        ({"end_think_boost": 0.0}, [A] * 10),
    ],
    ids=str,
)
def test_the_boost_grows_with_the_response(canvas, arguments, response):
    output = TableModel(table_of(FLAT, 40)).generate(
        prompt_of(3), max_new_tokens=10, block_length=1, canvas=canvas, end_think_token_ids=[THINK, END], **arguments
    )
    assert output[0, 3:].tolist() == response


def test_only_the_first_mask_of_the_block_is_boosted():
    # Two positions a block, decided in one step: the first is boosted beyond A, the second never.
    output = TableModel(table_of(FLAT, 40)).generate(
        prompt_of(2),
        max_new_tokens=4,
        block_length=2,
        max_denoising_steps=1,
        end_think_token_ids=[THINK, END],
        end_think_boost=50.0,
        end_think_power=0.0,
    )
    assert output[0, 2:].tolist() == [THINK, A, THINK, A]


def test_an_end_in_the_prompt_does_not_count():
    output = TableModel(table_of(FLAT, 40)).generate(
        torch.tensor([[THINK, END, THINK]]),
        max_new_tokens=3,
        block_length=1,
        end_think_token_ids=[THINK, END],
        end_think_boost=50.0,
        end_think_power=0.0,
    )
    assert output[0, 3:].tolist() == [THINK, END, A]


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_blanks_of_the_prompt_are_not_boosted(power):
    output = TableModel(table_of(FLAT, 40)).generate(
        prompt_of(4, blanks=[1, 2]),
        max_new_tokens=2,
        block_length=1,
        end_think_token_ids=[THINK, END],
        end_think_boost=50.0,
        end_think_power=power,
    )
    assert output.tolist() == [[7, A, A, 7, THINK, END]]


def test_confidence_is_that_of_the_boosted_distribution():
    # .04 e^5 = 5.94: 5.94 / (5.94 + .96)
    output = TableModel(table_of(FLAT, 40)).generate(
        prompt_of(1),
        max_new_tokens=1,
        end_think_token_ids=[THINK],
        end_think_boost=5.0,
        return_dict_in_generate=True,
        output_trace=True,
    )
    assert output.sequences.tolist() == [[7, THINK]]
    assert output.commit_confidences[0, 1].item() == pytest.approx(5.9365 / (5.9365 + 0.96), abs=1e-4)


def test_a_boosted_row_of_a_batch_is_what_it_is_alone():
    model, prompts = random_model(0), [[7], [8, 9, MASK, 10], [10, 11, 12]]
    arguments = {
        "max_new_tokens": 12,
        "block_length": 4,
        "end_think_token_ids": [20, 21, 20, 22],
        "end_think_boost": 60.0,
        "end_think_power": 1.0,
    }
    together = model.generate(**pad_left(prompts), **arguments)
    found = 0
    for row, prompt in enumerate(prompts):
        alone = model.generate(torch.tensor([prompt]), **arguments)[0].tolist()
        own = together[row, 4 - len(prompt) :].tolist()
        assert own == alone + [PAD] * (len(own) - len(alone))
        found += EOS in own or 20 in own
    assert found
