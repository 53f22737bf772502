"""Corruption and collation: what is masked, with which weight, and who sees whom."""

import torch

from illada import ILLaDAForCausalLM
from illada.training.corruption import corrupt, sample_mask_probabilities
from illada.training.data import MaskedDiffusionCollator


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_mask_probabilities():
    for stratified in (False, True):
        p = sample_mask_probabilities(4096, seeded(), stratified=stratified)
        assert p.min() >= 1e-3 and p.max() <= 1
        assert abs(p.mean() - 0.5) < 0.02
    in_each_stratum = torch.histc(sample_mask_probabilities(64, seeded(), eps=0, stratified=True), 64, 0, 1)
    assert in_each_stratum.tolist() == [1.0] * 64


def test_masked_tokens_are_a_subset_of_the_maskable_with_weight_one_over_p():
    input_ids = torch.randint(6, 60, (64, 50), generator=seeded(1))
    maskable = torch.rand(64, 50, generator=seeded(2)) < 0.7
    p = sample_mask_probabilities(64, seeded(3))
    result = corrupt(input_ids, maskable, p, 5, seeded(4))
    masked = result.input_ids == 5
    assert not (masked & ~maskable).any()
    assert torch.equal(result.input_ids[~masked], input_ids[~masked])
    assert torch.equal(result.labels, torch.where(maskable, input_ids, -100))
    assert torch.equal(result.loss_weights, torch.where(masked, 1 / p.unsqueeze(1), 0))
    # E[sum of weights / maskable] = 1: the loss is unbiased whatever p is
    assert abs(result.loss_weights.sum() / maskable.sum() - 1) < 0.1


def test_same_seed_same_corruption_and_the_global_state_is_untouched():
    features = [{"input_ids": list(range(6, 46)), "is_prompt": [True] * 10 + [False] * 30} for _ in range(8)]
    state = torch.random.get_rng_state()
    a, b = (MaskedDiffusionCollator(5, seed=7)(features) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a[name], b[name]) for name in a)
    other = MaskedDiffusionCollator(5, seed=8)(features)
    assert not torch.equal(a["input_ids"], other["input_ids"])


def test_prompts_stay_visible_where_asked():
    features = [{"input_ids": [7] * 40, "is_prompt": [True] * 10 + [False] * 30} for _ in range(64)]
    kept = MaskedDiffusionCollator(5, keep_prompt_probability=1.0)(features)
    assert (kept["input_ids"][:, :10] == 7).all() and (kept["labels"][:, :10] == -100).all()
    everything = MaskedDiffusionCollator(5, keep_prompt_probability=0.0)(features)
    assert (everything["input_ids"][:, :10] == 5).any() and (everything["labels"] == 7).all()


def test_segments_do_not_see_each_other(tiny_config):
    torch.manual_seed(0)
    model = ILLaDAForCausalLM(tiny_config).eval()
    features = [{"input_ids": torch.randint(6, 60, (20,)).tolist(), "is_prompt": [False] * 20} for _ in range(6)]
    batch = MaskedDiffusionCollator(5, split_probability=1.0)(features)
    with torch.no_grad():
        packed = model(**{k: batch[k] for k in ("input_ids", "attention_mask", "position_ids")}).logits
        for row in range(6):
            cut = int((batch["position_ids"][row, 1:] == 0).nonzero()) + 1
            for segment in (slice(0, cut), slice(cut, 20)):
                alone = model(batch["input_ids"][row : row + 1, segment]).logits[0]
                torch.testing.assert_close(packed[row, segment], alone, rtol=1e-4, atol=1e-5)
    unsplit = MaskedDiffusionCollator(5, split_probability=0.0)(features)
    assert unsplit["attention_mask"].all()
