"""Which positions a step commits: each ranking and each rule, against positions worked out by hand."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from tiny_models import TableModel, prompt_of, table_of

from illada.commit_rules import ConfidenceFactor, ConfidenceThreshold, EntropyBound, FrechetMargin, Quota, quota_of
from illada.rankings import RANKINGS
from illada.step import Prediction, Step

A, B, C, D = 6, 7, 8, 9


def commits_of(table: torch.Tensor, prompt_length: int = 1, **arguments) -> list[list[int]]:
    """The columns that each step of `generate` commits on a model with this table of logits."""
    steps = []
    TableModel(table).generate(
        prompt_of(prompt_length),
        max_new_tokens=len(table) - prompt_length,
        block_length=len(table) - prompt_length,
        on_step=steps.append,
        **arguments,
    )
    return [step.columns[step.committed].tolist() for step in steps]


# Positions 1 to 6, whose likeliest tokens have the probabilities
#   position    1     2     3     4     5     6
#   best       0.50  0.90  0.70  0.90  0.60  0.80
#   second     0.50  0.10  0.10  0.05  0.40  0.19
# The rest of each row is spread so that no third token is above the second.
TABLE = table_of(
    {
        1: {A: 0.50, B: 0.50},
        2: {A: 0.90, B: 0.10},
        3: {A: 0.70, B: 0.10, C: 0.10, D: 0.10},
        4: {A: 0.90, B: 0.05, C: 0.05},
        5: {A: 0.60, B: 0.40},
        6: {A: 0.80, B: 0.19, C: 0.01},
    },
    positions=7,
)


@pytest.mark.parametrize(
    ("ranking", "order"),
    [
        # Confidence 0.9 at 2 and 4 (the lower first), then 0.8 at 6, 0.7 at 3, 0.6 at 5, 0.5 at 1.
        ("low_confidence", [2, 4, 6, 3, 5, 1]),
        # Best minus second: 0.85 at 4, 0.80 at 2, 0.61 at 6, 0.60 at 3, 0.20 at 5, 0 at 1.
        ("margin", [4, 2, 6, 3, 5, 1]),
        # Entropy in nats: position 2: -.9 ln .9 - .1 ln .1 = .0948 + .2303 = .3251
        #                  position 4: .0948 + 2 * .1498 = .3944
        #                  position 6: .1785 + .3155 + .0461 = .5401
        #                  position 5: .3065 + .3665 = .6730
        #                  position 1: ln 2 = .6931
        #                  position 3: .2497 + 3 * .2303 = .9405
        ("entropy", [2, 4, 6, 5, 1, 3]),
    ],
)
def test_a_ranking_orders_positions(ranking, order):
    assert commits_of(TABLE, remasking=ranking) == [[column] for column in order]


@pytest.mark.parametrize(
    ("steps", "commits"),
    [
        # 6 masks: 6 // 4 = 1 a step, and one more in each of the first 6 mod 4 = 2 steps.
        (4, [[2, 4], [3, 6], [5], [1]]),
        (3, [[2, 4], [3, 6], [1, 5]]),
        (2, [[2, 4, 6], [1, 3, 5]]),
        (1, [[1, 2, 3, 4, 5, 6]]),
        # More steps than masks: one each, and no pass without a mask.
        (9, [[2], [4], [6], [3], [5], [1]]),
    ],
)
def test_the_quota_spreads_the_masks_over_the_steps(steps, commits):
    assert commits_of(TABLE, max_denoising_steps=steps) == commits


@pytest.mark.parametrize(
    ("threshold", "commits"),
    [
        # The quota is one a step. Logits do not change, so a step that adds by threshold adds all there are.
        (0.95, [[2], [4], [6], [3], [5], [1]]),
        (0.90, [[2, 4], [6], [3], [5], [1]]),  # at the threshold counts
        (0.65, [[2, 3, 4, 6], [5], [1]]),
        (0.50, [[1, 2, 3, 4, 5, 6]]),
    ],
)
def test_the_threshold_adds_every_sure_position(threshold, commits):
    # Rounding may put 0.9 on either side of 0.9: a hair below keeps the meaning.
    assert commits_of(TABLE, confidence_threshold=threshold - 1e-9) == commits


@pytest.mark.parametrize(
    ("factor", "commits"),
    [
        # Doubts 1 - c_(n), n = 1..6: .1 .1 .2 .3 .4 .5; times n + 1: .2 .3 .8 1.5 2.4 3.5
        (0.1, [[2], [4], [6], [3], [5], [1]]),  # none below .1: the quota alone, and later (n = 1): .2 .4 .6 .8 1.0
        (0.25, [[2], [4], [6], [3], [5], [1]]),  # n = 1; then 4: .2 < .25; then 6: 2 * .2 = .4, the quota alone
        (0.5, [[2, 4], [6], [3], [5], [1]]),  # n = 2; then 6: .4 < .5, with 3: 3 * .3 = .9
        (1.0, [[2, 4, 6], [3], [5], [1]]),  # n = 3; then 3: .6 < 1, with 5: 3 * .4 = 1.2
        (2.0, [[2, 3, 4, 6], [1, 5]]),  # n = 4; then 5 and 1: 3 * .5 = 1.5 < 2
        (3.6, [[1, 2, 3, 4, 5, 6]]),  # n = 6
    ],
)
def test_the_factor_takes_the_largest_safe_number(factor, commits):
    assert commits_of(TABLE, confidence_factor=factor) == commits


@pytest.mark.parametrize(
    ("bound", "commits"),
    [
        # Ascending entropies: 2: .3251, 4: .3944, 6: .5401, 5: .6730, 1: .6931, 3: .9405;
        # the sums before each: 0, .3251, .7195, 1.2596, 1.9326, 2.6257. The quota goes by confidence: 2 4 6 3 5 1.
        (0.0, [[2], [4], [6], [3, 5], [1]]),  # the first alone; in step 4 the quota adds 3, the rule 5
        (0.33, [[2, 4], [6], [3, 5], [1]]),
        (0.73, [[2, 4, 6], [1, 3, 5]]),  # in step 2: 5, 1 (.6730 before), and the quota's 3
        (1.3, [[2, 4, 5, 6], [1, 3]]),  # in step 2: 1 and 3 (.6931 before)
        (2.7, [[1, 2, 3, 4, 5, 6]]),
    ],
)
def test_the_entropy_bound_takes_positions_while_their_sum_is_small(bound, commits):
    assert commits_of(TABLE, entropy_bound=bound) == commits


@pytest.mark.parametrize(
    ("margin", "commits"),
    [
        # Doubts 1 - c_(n), n = 1..6: .1 .1 .2 .3 .4 .5, and 1 minus their sums minus the last again:
        #   n = 1: .8; n = 2: 1 - .2 - .1 = .7; n = 3: 1 - .4 - .2 = .4; n = 4: 1 - .7 - .3 = 0; below that negative
        (0.85, [[2], [4], [6], [3], [5], [1]]),  # none: the quota
        (0.75, [[2], [4], [6], [3], [5], [1]]),  # n = 1
        (0.5, [[2, 4], [6], [3], [5], [1]]),  # n = 2; then of .2 .3 .4 .5: .6, and 1 - .5 - .3 = .2
        (0.25, [[2, 4, 6], [3], [5], [1]]),  # n = 3; then of .3 .4 .5: .4, and 1 - .7 - .4 < 0
        (0.15, [[2, 4, 6], [3], [5], [1]]),
    ],
)
def test_the_frechet_margin_takes_the_largest_number_that_is_surely_ahead(margin, commits):
    assert commits_of(TABLE, frechet_margin=margin) == commits


@pytest.mark.parametrize(("doubt", "margin"), [(0.03, 0.0), (0.03, 0.25), (0.11, 0.0), (0.11, 0.5), (0.3, 0.3)])
def test_of_equal_confidences_the_frechet_margin_is_the_factor(doubt, margin):
    table = table_of({position: {A: 1 - doubt} for position in range(1, 41)}, 41)
    steps = commits_of(table, frechet_margin=margin)
    assert steps == commits_of(table, confidence_factor=1 - margin)
    assert len(steps[0]) == max(
        1, math.ceil((1 - margin) / doubt) - 2
    )  # the largest n with (n + 1) doubt < 1 - margin


def test_rules_work_with_every_ranking():
    # Quota by margin: 4 first. Threshold .65 adds 2, 3, 4, 6.
    assert commits_of(TABLE, remasking="margin", confidence_threshold=0.85) == [[2, 4], [6], [3], [5], [1]]
    # Quota by entropy after that: 5 (.6730), then 1.
    assert commits_of(TABLE, remasking="entropy", confidence_threshold=0.65) == [[2, 3, 4, 6], [5], [1]]
    # Entropy: 2 4 6 5 1 3. The factor of 1.0 takes c = .9 .9 .8 first, then doubts .3 (position 3) and n = 1.
    assert commits_of(TABLE, remasking="entropy", confidence_factor=1.0) == [[2, 4, 6], [3, 5], [1]]


@pytest.mark.parametrize("ranking", ["low_confidence", "margin", "entropy"])
def test_of_equal_scores_the_lower_position_goes_first(ranking):
    # 40 equal positions: an unstable sort of so many would not keep their order.
    table = table_of({position: {A: 0.6, B: 0.4} for position in range(41)}, positions=41)
    assert commits_of(table, remasking=ranking) == [[column] for column in range(1, 41)]
    assert commits_of(table, remasking=ranking, max_denoising_steps=4) == [
        list(range(first, first + 10)) for first in range(1, 41, 10)
    ]


def test_of_equal_logits_the_lower_token_is_predicted():
    output = TableModel(table_of({1: {A: 0.5, B: 0.5}, 2: {D: 0.4, C: 0.4}}, 3)).generate(
        prompt_of(1), max_new_tokens=2
    )
    assert output.tolist() == [[7, A, C]]


def test_mask_is_never_predicted_and_has_no_probability():
    # [MASK] (5) has 0.8 of the mass; of what is left, 0.15 of 0.2 is A, so that its confidence is 0.75.
    table = table_of({1: {5: 0.8, A: 0.15, B: 0.05}}, 2)
    steps = []
    output = TableModel(table).generate(prompt_of(1), max_new_tokens=1, on_step=steps.append)
    assert output.tolist() == [[7, A]]
    assert steps[0].confidence.item() == pytest.approx(0.75)


def test_random_ranking_gives_every_position_the_same_chance():
    counts = dict.fromkeys(range(1, 5), 0)
    table = TABLE[:5]
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        counts[commits_of(table, remasking="random", generator=generator)[0][0]] += 1
    # 50 expected of each, with a standard deviation of 6.
    assert all(25 < count < 75 for count in counts.values()), counts


def test_random_ranking_of_a_parallel_step_is_a_permutation():
    commits = commits_of(TABLE, remasking="random", max_denoising_steps=3, generator=torch.Generator().manual_seed(0))
    assert [len(step) for step in commits] == [2, 2, 2]
    assert sorted(sum(commits, [])) == [1, 2, 3, 4, 5, 6]


# The rules


def step_of(masked: torch.BoolTensor, quota=0, **values: torch.Tensor) -> Step:
    """A step whose predictions have these `probability`, `entropy` or `scores` (R, W) where `masked`."""
    flat = {name: value[masked] for name, value in values.items() if name != "scores"}
    prediction = SimpleNamespace(tokens=torch.zeros(int(masked.sum()), dtype=torch.long), **flat)
    quota = torch.as_tensor(quota).expand(len(masked))
    step = Step(prediction, torch.zeros_like(masked, dtype=torch.long), masked, masked, quota)
    step.scores = values.get("scores", torch.zeros(masked.shape)).masked_fill(~masked, -torch.inf)
    return step


def commit_by_threshold(confidence, masked, threshold):
    return ConfidenceThreshold(threshold)(step_of(masked, probability=confidence)).commit & masked


def commit_by_factor(confidence, masked, factor):
    return ConfidenceFactor(factor)(step_of(masked, probability=confidence)).commit & masked


def commit_by_frechet_margin(confidence, masked, margin):
    return FrechetMargin(margin)(step_of(masked, probability=confidence)).commit & masked


def commit_by_entropy_bound(entropies, masked, bound):
    return EntropyBound(bound)(step_of(masked, entropy=entropies)).commit & masked


def test_quotas():
    quotas = [[quota_of(n, 4, step) for step in range(4)] for n in (0, 1, 5, 6, 7, 32)]
    assert quotas == [[0, 0, 0, 0], [1, 0, 0, 0], [2, 1, 1, 1], [2, 2, 1, 1], [2, 2, 2, 1], [8, 8, 8, 8]]


def test_commit_by_quota_in_a_batch():
    scores = torch.tensor([[0.3, 0.9, 0.9, 0.1], [0.5, 0.5, 0.5, 0.5], [0.9, 0.1, 0.2, 0.3]])
    masked = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 0]]).bool()
    quota = torch.tensor([1, 2, 5])
    committed = Quota()(step_of(masked, quota, scores=scores)).commit
    # Row 0: the first of the two 0.9. Row 1: the lower two that are masked. Row 2: never more than there are masks.
    assert committed.int().tolist() == [[0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0]]


def test_commit_by_threshold_in_a_batch():
    confidence = torch.tensor([[0.5, 0.25, 0.75], [math.nan, 0.5, 0.49]])
    masked = torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()
    assert commit_by_threshold(confidence, masked, 0.5).int().tolist() == [[1, 0, 0], [0, 1, 0]]


def _random_rows(count: int, width: int):
    generator = torch.Generator().manual_seed(width)
    for _ in range(count):
        # Eighths are exact in binary, and there are few of them: sums are exact and ties are many.
        values = torch.randint(0, 9, (width,), generator=generator) / 8
        masked = torch.rand(width, generator=generator) < 0.7
        yield values.masked_fill(~masked, math.nan), masked


@pytest.mark.parametrize("width", [1, 2, 5, 9])
def test_commit_by_factor_against_brute_force_over_n(width):
    for confidence, masked in _random_rows(60, width):
        columns = sorted(masked.nonzero().flatten().tolist(), key=lambda i: (-confidence[i].item(), i))
        for factor in (0.125, 0.5, 0.51, 1.0, 2.0, 5.0):
            best = 0
            for n in range(1, len(columns) + 1):
                if (n + 1) * (1 - confidence[columns[n - 1]].item()) < factor:
                    best = n
            committed = commit_by_factor(confidence[None], masked[None], factor)[0]
            assert sorted(columns[:best]) == committed.nonzero().flatten().tolist()


@pytest.mark.parametrize("width", [1, 2, 5, 9])
def test_commit_by_frechet_margin_against_brute_force_over_n(width):
    for confidence, masked in _random_rows(60, width):
        columns = sorted(masked.nonzero().flatten().tolist(), key=lambda i: (-confidence[i].item(), i))
        for margin in (0.0, 0.125, 0.25, 0.3, 0.5):
            best = 0
            for n in range(1, len(columns) + 1):
                c = [confidence[i].item() for i in columns[:n]]
                if sum(c) - (n - 1) - (1 - c[-1]) > margin:
                    best = n
            committed = commit_by_frechet_margin(confidence[None], masked[None], margin)[0]
            assert sorted(columns[:best]) == committed.nonzero().flatten().tolist()


def test_tokens_that_the_frechet_rule_commits_are_the_joint_arg_max():
    """Over random joint distributions of two and three tokens: no other combination is as likely."""
    generator, checked = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        count = int(torch.randint(2, 4, (1,), generator=generator))
        joint = (4 * torch.randn((3,) * count, generator=generator, dtype=torch.float64)).flatten().softmax(0)
        joint = joint.view((3,) * count)
        marginals = torch.stack([joint.sum([d for d in range(count) if d != axis]) for axis in range(count)])
        best = marginals.max(-1)
        masked = torch.ones(1, count, dtype=torch.bool)
        if commit_by_frechet_margin(best.values[None], masked, 0.0).all():
            checked += 1
            assert joint[tuple(best.indices)] == joint.max()
    assert checked > 50


@pytest.mark.parametrize("width", [1, 2, 5, 9])
def test_commit_by_entropy_bound_against_brute_force_over_n(width):
    for entropies, masked in _random_rows(60, width):
        columns = sorted(masked.nonzero().flatten().tolist(), key=lambda i: (entropies[i].item(), i))
        for bound in (0.0, 0.125, 0.5, 1.0, 3.0):
            # The largest n whose sum without the largest stays within the bound.
            best = 0
            for n in range(1, len(columns) + 1):
                values = [entropies[i].item() for i in columns[:n]]
                if sum(values) - max(values) <= bound:
                    best = n
            committed = commit_by_entropy_bound(entropies[None], masked[None], bound)[0]
            assert sorted(columns[:best]) == committed.nonzero().flatten().tolist()


def test_the_rows_of_a_batch_are_apart():
    rows = list(itertools.islice(_random_rows(8, 6), 8))
    values, masked = torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])
    for rule, value in (
        (commit_by_threshold, 0.5),
        (commit_by_factor, 1.0),
        (commit_by_frechet_margin, 0.25),
        (commit_by_entropy_bound, 0.5),
    ):
        together = rule(values, masked, value)
        alone = torch.cat([rule(values[i : i + 1], masked[i : i + 1], value) for i in range(8)])
        assert torch.equal(together, alone)


def entropy_of(logits: torch.Tensor) -> torch.Tensor:
    return Prediction(logits, logits.argmax(-1)).entropy


def test_entropy_against_the_sum():
    logits = torch.randn(20, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    logits[3, 4] = logits[5, 0] = -torch.inf  # p log p of p = 0 is 0
    entropy = entropy_of(logits)
    for row, value in zip(logits.softmax(-1).tolist(), entropy.tolist()):
        assert value == pytest.approx(-sum(p * math.log(p) for p in row if p > 0))
    assert entropy_of(torch.zeros(1, 8)).item() == pytest.approx(math.log(8))
    assert entropy_of(torch.tensor([[0.0, -torch.inf, -torch.inf]])).item() == 0


def test_token_probability():
    logits = torch.tensor([[0.0, math.log(3.0)], [1000.0, -1000.0], [1000.0, -1000.0]])
    probability = Prediction(logits, torch.tensor([1, 0, 1])).probability
    assert probability.tolist() == pytest.approx([0.75, 1.0, 0.0])


def test_rankings_are_of_the_proposal_or_of_the_distribution():
    # Probabilities .5 .3 .2, the proposal is the third token, as sampling may give.
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    one = torch.ones(1, 1, dtype=torch.bool)
    step = Step(
        Prediction(logits, torch.tensor([2])), one.long(), one, one, one.long()[0], noise=lambda: torch.rand(1)
    )
    scores = {name: rank(step).item() for name, rank in RANKINGS.items()}
    assert scores["low_confidence"] == pytest.approx(0.2)
    assert scores["margin"] == pytest.approx(0.5 - 0.3)
    assert scores["entropy"] == pytest.approx(0.5 * math.log(0.5) + 0.3 * math.log(0.3) + 0.2 * math.log(0.2))
    assert 0 <= scores["random"] < 1


@pytest.mark.parametrize(
    "rule, steps",
    [
        # Position 2 proposes EOS with the highest confidence of all, and comes last.
        ({}, [[3], [1], [4], [2]]),
        ({"max_denoising_steps": 2}, [[1, 3], [2, 4]]),
        ({"confidence_threshold": 0.6}, [[1, 3], [4], [2]]),
        # (1 + 1)(1 - 0.9) = 0.2 and (2 + 1)(1 - 0.7) = 0.9 are below 1; (3 + 1)(1 - 0.5) is not.
        ({"confidence_factor": 1.0}, [[1, 3], [4], [2]]),
        # 0 nats stand before the first entropy, 0.33 before the second, 0.93 before the third.
        ({"entropy_bound": 0.5}, [[1, 3], [4], [2]]),
        # 1 - 0.1 - 0.1 = 0.8 and 1 - 0.4 - 0.3 = 0.3 exceed 0.25; with the third, 1 - 0.88 - 0.48 does not.
        ({"frechet_margin": 0.25}, [[1, 3], [4], [2]]),
        ({"remasking": "margin"}, [[3], [1], [4], [2]]),
        ({"remasking": "entropy"}, [[3], [1], [4], [2]]),
    ],
)
def test_deferred_eos_is_committed_last(rule, steps):
    table = table_of({1: {A: 0.7}, 2: {2: 0.99}, 3: {B: 0.9}, 4: {C: 0.52}}, positions=5)
    assert commits_of(table, defer_eos=True, **rule) == steps
    assert commits_of(table, **rule) != steps
