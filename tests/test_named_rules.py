"""The rules of `commit_rule`, worked out by hand on models whose passes answer with written-down tables."""

import math

import pytest
import torch
from tiny_models import TableModel, prompt_of, table_of

from illada.commit_rules import COMMIT_RULES, KLASS, CreditDecoding, LocalLeap, rule_names

A, B, C, D = 6, 7, 8, 9


class ModelOfPasses(TableModel):
    """A model whose n-th pass answers with the n-th table, and each later one with the last."""

    def __init__(self, *tables: torch.Tensor):
        super().__init__(tables[0])
        self.tables = tables

    def forward(self, input_ids, **inputs):
        self.table.copy_(self.tables[min(len(self.calls), len(self.tables) - 1)])
        return super().forward(input_ids, **inputs)


def written(model: TableModel, length: int, **settings) -> tuple[list[int], list[list[int]], list]:
    """The tokens of `length` masks after a prompt of one token, the columns committed in each pass, and the passes."""
    steps = []
    settings = {"max_new_tokens": length, "block_length": length, **settings}
    output = model.generate(prompt_of(1), on_step=steps.append, **settings)
    return output[0, 1:].tolist(), [step.columns[step.committed].tolist() for step in steps], steps


def test_klass_waits_for_what_moves():
    # Position 2 changes its mind in pass 2; position 3 is never sure; 5 and 6 go while nothing has a past.
    still = {1: {A: 0.95}, 3: {C: 0.6}, 4: {D: 0.97}, 5: {A: 0.99}, 6: {B: 0.98}}
    first, later = (table_of({**still, 2: {token: 0.95}}, 7) for token in (A, B))
    tokens, commits, _ = written(ModelOfPasses(first, later), 6, commit_rule=KLASS())
    # Pass 3 is the first in which the last two passes agree, and pass 4 for position 2. Until then, and when nothing
    # qualifies, a pass commits its quota, the one that ranks highest.
    assert commits == [[5], [6], [1, 4], [2], [3]]
    assert tokens == [A, B, C, D, A, B]


@pytest.mark.parametrize(
    ("rule", "commits"),
    [
        # KL of (.8, .2) from (.9, .1) is .8 ln(8/9) + .2 ln 2 = -.0942 + .1386 = .0444 nats; the other way .0367.
        (KLASS(confidence=0.75, divergence=0.045, history=1), [[3], [1, 2]]),
        (KLASS(confidence=0.75, divergence=0.044, history=1), [[3], [2], [1]]),
        (KLASS(confidence=0.85, divergence=0.045, history=1), [[3], [2], [1]]),
        (KLASS(confidence=0.75, divergence=0.045, history=2), [[3], [2], [1]]),  # 2 is the quota of pass 2
    ],
)
def test_klass_reads_the_divergence_of_this_pass_from_the_last(rule, commits):
    def table(p):
        return table_of({1: {A: p, B: 1 - p}, 2: {C: 0.9, D: 0.1}, 3: {D: 0.99}}, 4)

    assert written(ModelOfPasses(table(0.9), table(0.8)), 3, commit_rule=rule)[1] == commits


def test_klass_commits_no_moving_token_beside_one_that_is_ready():
    """The quota is for passes in which nothing is ready: there the published sampler falls back on it."""

    def table(p):
        return table_of({1: {A: 0.95, B: 0.05}, 2: {C: p, D: 1 - p}, 3: {D: 0.999}}, 4)

    tables = table(0.99), table(0.96), table(0.99), table(0.96)
    assert written(ModelOfPasses(*tables), 3, commit_rule=KLASS(history=1, divergence=0.001))[1] == [[3], [1], [2]]


@pytest.mark.parametrize(
    ("rule", "commits"),
    [
        # Anchors 3 and 12; of the others above 0.75, 1 and 7 are within 4 of position 3, and 8 of position 12.
        (LocalLeap(), [[1, 3, 7, 8, 12], [9], [2], [10], [4], [5], [6], [11]]),
        (LocalLeap(radius=2), [[1, 3, 12], [8], [7], [9], [2], [10], [4], [5], [6], [11]]),
        (LocalLeap(radius=0), [[3, 12], [8], [1], [7], [9], [2], [10], [4], [5], [6], [11]]),
        (LocalLeap(nearby=0.62), [[1, 2, 3, 7, 8, 9, 10, 12], [4], [5], [6], [11]]),
        # Without an anchor the quota goes, and what it commits is no anchor later.
        (LocalLeap(anchor=0.99), [[12], [3], [8], [1], [7], [9], [2], [10], [4], [5], [6], [11]]),
        # 8 is an anchor too, and 7 near it; in pass 2 nothing is.
        (LocalLeap(anchor=0.85, nearby=0.8, radius=1), [[3, 8, 12], [1], [7], [9], [2], [10], [4], [5], [6], [11]]),
    ],
)
def test_local_leap_relaxes_near_an_anchor(rule, commits):
    best = {1: 0.8, 2: 0.65, 3: 0.95, 7: 0.79, 8: 0.86, 9: 0.7, 10: 0.63, 12: 0.97}
    table = table_of({position: {A: best.get(position, 0.51)} for position in range(1, 13)}, 13)
    assert written(TableModel(table), 12, commit_rule=rule)[1] == commits


def test_local_leap_counts_positions_of_the_text():
    """Blanks are of one block wherever they stand: 2 and 7 are neighbours there, and five positions apart."""
    table = table_of({2: {A: 0.95}, 4: {B: 0.8}, 7: {C: 0.85}}, 8)
    steps = []
    prompt = prompt_of(8, blanks=(2, 4, 7))
    TableModel(table).generate(prompt, max_new_tokens=0, commit_rule=LocalLeap(), on_step=steps.append)
    assert [step.columns[step.committed].tolist() for step in steps] == [[2, 4], [7]]


def test_credit_grows_with_every_pass_in_which_a_token_is_the_likeliest():
    """With beta = gamma = 1 and probabilities p, 1 - p: C is n p, then p' / (1 - p') = p / (1 - p) (1 + n p)^alpha."""
    p, alpha = 0.6, 0.7
    table = table_of({1: {A: p, B: 1 - p}, 2: {C: 0.96, D: 0.04}, 3: {C: 0.93, D: 0.07}}, 4)
    rule = CreditDecoding(threshold=0.9, alpha=alpha, beta=1.0, gamma=1.0)
    tokens, commits, steps = written(TableModel(table), 3, commit_rule=rule, output_trace=True)
    # Positions 2 and 3 go at once. Of position 1: 1.5 * 1.6 ** .7 = 2.08, that is .676.
    assert commits == [[2, 3], [1]] and tokens == [A, C, C]
    for passes, step in enumerate(steps, start=1):
        odds = p / (1 - p) * (1 + passes * p) ** alpha
        assert step.confidence[0].item() == pytest.approx(odds / (1 + odds))


def test_credit_decays_and_follows_the_likeliest_token():
    """Pass by pass against the recurrence in plain numbers: B is the likeliest in passes 1 and 2, A from pass 3 on."""
    probabilities = [{A: 0.2, B: 0.7, C: 0.1}, {A: 0.3, B: 0.6, C: 0.1}] + [{A: 0.48, B: 0.42, C: 0.1}] * 2
    alpha, beta, gamma = 0.7, 0.8, 0.2
    others = {2: {D: 0.8}, 3: {D: 0.79}, 4: {D: 0.78}}
    model = ModelOfPasses(*(table_of({1: row, **others}, 5) for row in probabilities))
    rule = CreditDecoding(threshold=1.0, alpha=alpha, beta=beta, gamma=gamma)
    _, commits, steps = written(model, 4, commit_rule=rule)
    assert commits == [[2], [3], [4], [1]]
    credit, proposals = {A: 0.0, B: 0.0, C: 0.0}, []
    for row, step in zip(probabilities, steps):
        credit = {token: beta * value for token, value in credit.items()}
        best = max(row, key=row.get)
        credit[best] += row[best] ** gamma
        fused = {token: row[token] * (1 + credit[token]) ** alpha for token in row}
        proposals.append(max(fused, key=fused.get))
        assert step.proposals[0].item() == proposals[-1]
        assert step.confidence[0].item() == pytest.approx(fused[proposals[-1]] / sum(fused.values()))
    assert proposals == [B, B, B, A]  # in pass 3 B still leads by its credit


def test_credit_begins_with_each_block():
    table = table_of({position: {A: 0.6, B: 0.4} for position in range(1, 5)}, 5)
    steps = written(TableModel(table), 4, block_length=2, commit_rule=CreditDecoding())[2]
    confidences = [step.confidence[step.committed].item() for step in steps]
    assert confidences[0] < confidences[1] and confidences[:2] == confidences[2:]


def test_without_parameters_credit_decoding_is_the_threshold():
    table = table_of({1: {A: 0.6}, 2: {A: 0.92}, 3: {B: 0.85}, 4: {B: 0.95}}, 5)
    model = TableModel(table)
    plain = written(model, 4, confidence_threshold=0.9)[:2]
    assert written(model, 4, commit_rule=CreditDecoding(alpha=0.0))[:2] == plain
    # Odds of .85 / .15 times (1 + .85 ** .2) ** .7 are 9.1, a confidence of .901.
    assert plain[1] == [[2, 4], [3], [1]]
    assert written(model, 4, commit_rule="credit_decoding")[1] == [[2, 3, 4], [1]]


@pytest.mark.parametrize("name", rule_names())
def test_a_name_is_the_rule_with_its_defaults(name):
    best = {1: 0.8, 2: 0.65, 3: 0.95, 4: 0.79, 5: 0.86, 6: 0.7}
    table = table_of({position: {A: value, B: 1 - value} for position, value in best.items()}, 7)
    by_name, by_object = (written(TableModel(table), 6, commit_rule=rule)[:2] for rule in (name, COMMIT_RULES[name]()))
    assert by_name == by_object


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KLASS(confidence=1.5), r"`KLASS.confidence` must be a number in \[0, 1\], got 1.5"),
        (lambda: KLASS(divergence=-1), "`KLASS.divergence` must be a number of at least 0, got -1"),
        (lambda: KLASS(history=0), "`KLASS.history` must be an integer of at least 1, got 0"),
        (lambda: LocalLeap(anchor=math.nan), "`LocalLeap.anchor` .*, got nan"),
        (lambda: LocalLeap(nearby=-0.1), "`LocalLeap.nearby` .*, got -0.1"),
        (lambda: LocalLeap(radius=1.5), "`LocalLeap.radius` must be an integer of at least 0, got 1.5"),
        (lambda: CreditDecoding(threshold=2), "`CreditDecoding.threshold` .*, got 2"),
        (lambda: CreditDecoding(beta=1.1), "`CreditDecoding.beta` .*, got 1.1"),
        (lambda: CreditDecoding(alpha=-1), "`CreditDecoding.alpha` .*, got -1"),
        (lambda: CreditDecoding(gamma="a"), "`CreditDecoding.gamma` .*, got 'a'"),
    ],
)
def test_a_bad_parameter_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
