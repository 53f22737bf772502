"""The noise: what is masked and with which weight, and that it is a function of seed and row alone."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial.legendre import leggauss

from illada import ILLaDAConfig, ILLaDAForCausalLM
from illada.training.corruption import corrupt, sample_mask_probabilities
from illada.training.data import MaskedDiffusionCollator
from illada.training.segments import split_segments
from illada.training.trainer import Objective

MASK = 5


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch_of(lengths: list[int], prompt: int = 0, pad_to: int = 1) -> dict[str, torch.Tensor]:
    """A clean batch of random tokens, the first `prompt` of each row being its prompt."""
    features = [
        {
            "input_ids": torch.randint(6, 60, (n,), generator=seeded(n)).tolist(),
            "is_prompt": [i < prompt for i in range(n)],
        }
        for n in lengths
    ]
    return MaskedDiffusionCollator(pad_token_id=1, pad_to_multiple_of=pad_to)(features)


def test_mask_probabilities_cover_the_unit_interval():
    for strata in (1, 64):
        p = sample_mask_probabilities(0, range(4096), strata)
        assert p.dtype == torch.float32 and p.min() >= 1e-3 and p.max() <= 1
        assert abs(p.mean() - 0.5) < 0.02
        assert torch.histc(p, 20, 0, 1).min() > 0
    assert sample_mask_probabilities(0, range(4096), eps=0).min() > 0


def test_each_block_of_rows_has_one_probability_in_each_stratum():
    p = sample_mask_probabilities(3, range(32 * 8), strata=32, eps=0).reshape(8, 32)
    for block in p:
        assert torch.histc(block, 32, 0, 1).tolist() == [1.0] * 32
    assert not torch.equal(p[0].argsort(), p[1].argsort())  # in another order each time


def test_noise_of_a_row_does_not_depend_on_its_batch():
    """Nor on padding: one batch of eight, and any other way to divide and to pad the same rows."""
    lengths = [9, 12, 5, 12, 7, 3, 12, 10]
    objective = Objective(split_probability=0.5, keep_prompt_probability=0.5)
    together = objective.add_noise(batch_of(lengths, prompt=2), MASK, 7, range(8), strata=8)
    for parts in ([3, 5], [1] * 8, [4, 4]):
        first = 0
        for size in parts:
            rows = range(first, first + size)
            part = objective.add_noise(batch_of(lengths[first : first + size], 2, pad_to=16), MASK, 7, rows, strata=8)
            for i, row in enumerate(rows):
                for name in ("input_ids", "labels", "loss_weights"):
                    assert torch.equal(part[name][i, : lengths[row]], together[name][row, : lengths[row]])
            first += size
    same_length = batch_of([12] * 4)
    a = Objective(split_probability=0.5).add_noise(same_length, MASK, 7, range(4))
    b = Objective(split_probability=0.5).add_noise(
        {k: v.flip(0) for k, v in same_length.items()}, MASK, 7, [3, 2, 1, 0]
    )
    assert torch.equal(a["position_ids"], b["position_ids"].flip(0))


def test_seeds_and_rows_differ_and_global_states_are_untouched():
    batch = batch_of([40] * 4)
    states = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    noises = [
        Objective().add_noise(batch, MASK, seed, rows)
        for seed, rows in ((0, range(4)), (1, range(4)), (0, range(4, 8)))
    ]
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert random.getstate() == states[1] and (np.random.get_state()[1] == states[2]).all()
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(noises[i]["input_ids"], noises[j]["input_ids"])


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: the same noise on CPU and GPU is not checked"
)
def test_noise_is_the_same_on_a_gpu():
    batch = batch_of([40] * 4)
    on_gpu = Objective().add_noise({name: tensor.cuda() for name, tensor in batch.items()}, MASK, 0, range(4))
    for name, tensor in Objective().add_noise(batch, MASK, 0, range(4)).items():
        assert torch.equal(on_gpu[name].cpu(), tensor)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 20), st.randoms(use_true_random=False))
def test_masked_tokens_are_a_subset_of_the_maskable_with_weight_one_over_p(seed, rows, length, rng):
    input_ids = torch.tensor([[rng.randint(6, 60) for _ in range(length)] for _ in range(rows)])
    maskable = torch.tensor([[rng.random() < 0.7 for _ in range(length)] for _ in range(rows)])
    p = sample_mask_probabilities(seed, range(rows))
    result = corrupt(input_ids, maskable, p, MASK, seed, range(rows))
    masked = result.input_ids == MASK
    assert not (masked & ~maskable).any()
    assert torch.equal(result.input_ids[~masked], input_ids[~masked])
    assert torch.equal(result.labels, torch.where(maskable, input_ids, -100))
    assert torch.equal(result.loss_weights, torch.where(masked, 1 / p.unsqueeze(1), 0))


def test_prompts_stay_visible_where_asked():
    kept = Objective(keep_prompt_probability=1.0).add_noise(batch_of([40] * 64, prompt=10), MASK, 0, range(64))
    assert (kept["input_ids"][:, :10] != MASK).all() and (kept["labels"][:, :10] == -100).all()
    everything = Objective().add_noise(batch_of([40] * 64, prompt=10), MASK, 0, range(64))
    assert (everything["input_ids"][:, :10] == MASK).any() and (everything["labels"] != -100).all()


def test_the_prompts_behind_an_answer_are_masked_like_it():
    batch = batch_of([40] * 64, prompt=10)
    batch["is_prompt"][:, 20:30] = True
    kept = Objective(keep_prompt_probability=1.0).add_noise(batch, MASK, 0, range(64))
    assert (kept["labels"][:, :10] == -100).all() and (kept["labels"][:, 10:] != -100).all()
    assert (kept["input_ids"][:, 20:30] == MASK).any()


def test_padding_is_neither_masked_nor_learnt_nor_seen():
    batch = batch_of([5, 8])
    noisy = Objective(split_probability=0.0).add_noise(batch, MASK, 0, range(2))
    assert (noisy["labels"][0, 5:] == -100).all() and (noisy["input_ids"][0, 5:] == 1).all()
    assert noisy["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 0, 0], list(range(8))]


def test_three_rows_in_ten_are_split_anywhere():
    positions = torch.arange(16).repeat(4000, 1)
    split = split_segments(positions, 0.3, 0, range(4000))
    cuts = [int((row[1:] == 0).nonzero()) + 1 for row in split if (row[1:] == 0).any()]
    assert 0.27 < len(cuts) / 4000 < 0.33
    assert set(cuts) == set(range(1, 16))
    assert min(cuts.count(cut) for cut in range(1, 16)) > 40  # 80 are expected of each
    for row in split[:100]:
        cut = int((row[1:] == 0).nonzero()) + 1 if (row[1:] == 0).any() else 16
        assert row.tolist() == [*range(cut), *range(16 - cut)]


def test_a_split_of_a_packed_row_cuts_one_of_its_segments():
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]]).repeat(300, 1)
    seen = {tuple(row) for row in split_segments(packed, 1.0, 0, range(300)).tolist()}
    expected = {
        tuple(
            p - packed[0, cut].item() if same and i >= cut else p
            for i, (p, same) in enumerate(zip(packed[0].tolist(), [(j < 4) == (cut < 4) for j in range(10)]))
        )
        for cut in range(1, 10)
        if packed[0, cut] > 0  # the row is cut there already
    }
    assert seen == expected


def test_a_split_falls_in_the_row_itself_whatever_its_padding_is():
    """Each of 200 rows of 4 to 12 tokens is cut, at the same place alone and in a batch of width 96."""
    lengths = [4 + row % 9 for row in range(200)]
    alone = [split_segments(torch.arange(n).unsqueeze(0), 1.0, 0, [row])[0] for row, n in enumerate(lengths)]
    padded = torch.stack([torch.cat([torch.arange(n), torch.zeros(96 - n, dtype=torch.long)]) for n in lengths])
    together = split_segments(padded, 1.0, 0, range(200))
    for n, single, row in zip(lengths, alone, together):
        assert torch.equal(row[:n], single) and not row[n:].any()
        assert (single[1:] == 0).sum() == 1


def test_a_row_of_single_tokens_cannot_be_split():
    assert not split_segments(torch.zeros(3, 5, dtype=torch.long), 1.0, 0, range(3)).any()
    assert not split_segments(torch.zeros(3, 1, dtype=torch.long), 1.0, 0, range(3)).any()


def test_the_mean_over_draws_is_the_exact_expectation():
    """Three tokens of a vocabulary of eight: all eight masked sets are enumerated and t is integrated exactly."""
    torch.manual_seed(0)
    config = ILLaDAConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=8, initializer_range=0.5,
    )  # fmt: skip
    model = ILLaDAForCausalLM(config).double().eval()
    clean, eps = torch.tensor([6, 7, 3]), 0.1
    exact = 0.0
    nodes, node_weights = leggauss(4)  # exact: the integrand is a polynomial in t of degree 2
    for subset in range(1, 8):
        masked = torch.tensor([bool(subset >> i & 1) for i in range(3)])
        with torch.no_grad():
            log_p = model(clean.masked_fill(masked, MASK).unsqueeze(0)).logits[0].log_softmax(-1)
        surprise = -sum(log_p[i, clean[i]].item() for i in range(3) if masked[i])
        count = int(masked.sum())
        for node, weight in zip(nodes, node_weights):
            p = (1 - eps) * (node + 1) / 2 + eps
            exact += weight / 2 * p**count * (1 - p) ** (3 - count) / p * surprise / 3

    draws = 20_000
    batch = {
        "input_ids": clean.repeat(draws, 1),
        "labels": clean.repeat(draws, 1),
        "position_ids": torch.arange(3).repeat(draws, 1),
        "is_prompt": torch.zeros(draws, 3, dtype=torch.bool),
    }
    for stratified in (False, True):
        objective = Objective(split_probability=0.0, eps=eps, stratified=stratified)
        noisy = objective.add_noise(batch, MASK, 11, range(draws), strata=50)
        with torch.no_grad():
            assert model(**noisy).loss.item() == pytest.approx(exact, rel=0.03)


def test_stratification_lowers_the_variance_of_the_masked_share():
    shares = {
        strata: torch.stack(
            [sample_mask_probabilities(1, range(16 * k, 16 * (k + 1)), strata).mean() for k in range(200)]
        )
        for strata in (1, 16)
    }
    assert shares[16].std() < 0.2 * shares[1].std()
