"""Commit rules and rankings that users write: those of docs/generation.md, and one of this file's."""

import functools
import re
from pathlib import Path

import pytest
import torch
from tiny_models import EOS, MASK, PAD, TableModel, pad_left, prompt_of, random_model, table_of
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from illada import MaskedDiffusionGenerationConfig
from illada.commit_rules import (
    COMMIT_RULES,
    KLASS,
    MAX_REMASKS,
    CommitRule,
    ConfidenceThreshold,
    CreditDecoding,
    Decision,
    LocalLeap,
)
from illada.rankings import RANKINGS

A, B, C, D = 6, 7, 8, 9
PAGE = Path(__file__).parents[1] / "docs" / "generation.md"


def documented_rules() -> dict:
    """The rules of the page, by name."""
    namespace = {"torch": torch}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
        if "(CommitRule):" in block:
            assert len(re.search(r"class .*", block, flags=re.DOTALL)[0].splitlines()) < 20
            exec(compile(block, str(PAGE), "exec"), namespace)
    return namespace


Settled, Reconsider = (documented_rules()[name] for name in ("Settled", "Reconsider"))


class NeverContent(CommitRule):
    """Commits the quota, and wants all that is committed masked again, in every pass."""

    may_remask = True

    def __call__(self, step):
        return Decision(step.best_ranked(step.quota), remask=torch.ones_like(step.masked))


RULES = {
    "memory": Settled(passes=2),
    "remasks": Reconsider(confidence=0.6, bound=0.01),
    "klass": KLASS(confidence=0.3, divergence=1.0),
    "local_leap": LocalLeap(anchor=0.6, nearby=0.3),
    "credit_decoding": CreditDecoding(threshold=0.7, alpha=3.0),
}


@functools.cache
def model_of(seed: int):
    """In some of these seeds rows end early, in some they do not."""
    return random_model(seed, num_layers=2)


class ModelOfPasses(TableModel):
    """A model whose n-th pass answers with the n-th table, and each later one with the last."""

    def __init__(self, *tables: torch.Tensor):
        super().__init__(tables[0])
        self.tables = tables

    def forward(self, input_ids, **inputs):
        self.table.copy_(self.tables[min(len(self.calls), len(self.tables) - 1)])
        return super().forward(input_ids, **inputs)


def steps_of(model: TableModel, length: int, **settings) -> tuple[list, list]:
    """The tokens of `length` masks after a prompt of one token, and the steps that wrote them."""
    steps = []
    settings = {"max_new_tokens": length, "block_length": length, **settings}
    output = model.generate(prompt_of(1), on_step=steps.append, **settings)
    return output[0, 1:].tolist(), steps


def test_a_rule_with_a_memory_waits_for_what_moves():
    # Position 1 changes its mind in pass 2, the others never; 5 and 4 go as the most confident.
    still = {2: {C: 0.55}, 3: {C: 0.6}, 4: {D: 0.7}, 5: {A: 0.8}}
    first, later = (table_of({**still, 1: {token: 0.52}}, 6) for token in (A, B))
    tokens, steps = steps_of(ModelOfPasses(first, later), 5, commit_rule=Settled(passes=3))
    assert [step.columns[step.committed].tolist() for step in steps] == [[5], [4], [2, 3], [1]]
    assert tokens == [B, C, C, D, A]


def test_a_memory_begins_with_each_block():
    # The same distributions in both blocks: without `begin` the second block would remember the first.
    table = table_of({position: {A: 0.95} for position in range(1, 9)}, 9)
    _, steps = steps_of(TableModel(table), 8, block_length=4, commit_rule=Settled())
    assert [step.columns[step.committed].tolist() for step in steps] == [[1], [2], [3, 4], [5], [6], [7, 8]]


def test_a_rule_that_masks_again_corrects_what_it_wrote():
    # A at position 1 is sure by itself, and unlikely once 2 is B: there C is right.
    tables = (
        table_of({1: {A: 0.99}, 2: {B: 0.5}, 3: {D: 0.4}}, 4),
        table_of({1: {A: 0.05, C: 0.8}, 2: {B: 0.85}, 3: {D: 0.7}}, 4),
    )
    tokens, steps = steps_of(ModelOfPasses(*tables), 3, commit_rule=Reconsider(confidence=0.9, bound=0.1))
    texts = [step.tokens[1:].tolist() for step in steps]
    assert texts == [[A, MASK, MASK], [MASK, B, MASK], [C, B, MASK], [C, B, D]]
    assert tokens == [C, B, D]


PROMPTS = [[0, 7, 8, 9], [0, 10, MASK, 11, 12, MASK, 13, 14, 15], [0, 20], [0, MASK, 21, 22, 23, 24]]
SETTINGS = {"max_new_tokens": 12, "block_length": 6, "return_dict_in_generate": True, "output_trace": True}


def alone(model, prompt: list[int], index: int = 0, **settings) -> tuple[list, int, list]:
    """Tokens, passes and commit steps of a call with this prompt; the seed is that of row `index`."""
    if "seed" in settings:
        settings["seed"] += index
    output = model.generate(torch.tensor([prompt]), **SETTINGS, **settings)
    return output.sequences[0].tolist(), int(output.num_forward_passes), output.commit_steps[0].tolist()


@pytest.mark.parametrize("block_cache", [None, "prefix", "dual"])
@pytest.mark.parametrize("canvas", ["growing", "fixed"])
@pytest.mark.parametrize("rule", RULES)
def test_a_row_of_a_ragged_batch_gets_what_it_gets_alone(rule, canvas, block_cache):
    width = max(map(len, PROMPTS))
    different_ends = set()
    for seed, sampling in ((15, {}), (19, {"do_sample": True, "seed": 3})):
        model = model_of(seed)
        settings = {"commit_rule": RULES[rule], "canvas": canvas, "block_cache": block_cache, **sampling}
        batch = model.generate(**pad_left(PROMPTS), **SETTINGS, **settings)
        for index, prompt in enumerate(PROMPTS):
            tokens, num_passes, commit_steps = alone(model, prompt, index, **settings)
            own = slice(width - len(prompt), width - len(prompt) + len(tokens))
            assert batch.sequences[index, own].tolist() == tokens
            assert (batch.sequences[index, own.stop :] == PAD).all()
            assert int(batch.num_forward_passes[index]) == num_passes
            assert batch.commit_steps[index, own].tolist() == commit_steps
            different_ends.add(len(tokens) - len(prompt))
    assert len(different_ends) > 1  # rows leave the batch at different times


@pytest.mark.parametrize("rule", RULES)
def test_rules_do_what_the_quota_does_not(rule):
    """Or else the test above would compare one rule with itself."""
    passes = {name: [] for name in (rule, None)}
    for seed in (15, 19):
        for prompt in PROMPTS:
            for name, counts in passes.items():
                settings = {} if name is None else {"commit_rule": RULES[name]}
                counts.append(alone(model_of(seed), prompt, **settings)[1])
    differences = [own - quota for own, quota in zip(passes[rule], passes[None])]
    if RULES[rule].may_remask:
        assert max(differences) > 0
    else:
        assert min(differences) < 0


@pytest.mark.parametrize("rule", ["klass", "credit_decoding", "remasks"])
@pytest.mark.parametrize("block_cache", [None, "prefix"])
def test_rows_that_come_and_go_share_nothing(rule, block_cache):
    model, prompts = model_of(15), [*PROMPTS, [0, 7]]
    settings = {"commit_rule": RULES[rule], "block_cache": block_cache}
    results = model.generate_batch(
        prompts,
        continuous_batching_config=ContinuousBatchingConfig(max_requests_per_batch=2),
        max_new_tokens=12,
        block_length=6,
        **settings,
    )
    for prompt, result in zip(prompts, results.values()):
        assert result.prompt_ids + result.generated_tokens == alone(model, prompt, **settings)[0]


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("block_cache", [None, "prefix", "dual"])
@pytest.mark.parametrize("canvas", ["growing", "fixed"])
def test_nothing_stays_masked_by_a_rule_that_is_never_content(canvas, block_cache, do_sample):
    width = max(map(len, PROMPTS))
    output = model_of(15).generate(
        **pad_left(PROMPTS),
        **SETTINGS,
        commit_rule=NeverContent(),
        canvas=canvas,
        block_cache=block_cache,
        max_denoising_steps=2 if do_sample else None,
        do_sample=do_sample,
        seed=0,
    )
    assert not (output.sequences == MASK).any()
    for prompt, row, num_passes in zip(PROMPTS, output.sequences, output.num_forward_passes.tolist()):
        text = row[width - len(prompt) : width].tolist()
        assert all(given in (MASK, token) for given, token in zip(prompt, text))
        num_written = prompt.count(MASK) + SETTINGS["max_new_tokens"]
        assert num_passes <= num_written * (1 + MAX_REMASKS)


def test_a_position_is_masked_again_at_most_so_often():
    _, steps = steps_of(
        TableModel(table_of({1: {A: 0.9}, 2: {B: 0.8}, 3: {C: 0.7}}, 4)), 3, commit_rule=NeverContent()
    )
    commits = torch.stack([step.committed for step in steps]).sum(0)
    assert commits.max() == 1 + MAX_REMASKS and commits.min() >= 1
    assert not (steps[-1].tokens == MASK).any()


def test_an_eos_that_is_masked_again_is_not_the_end():
    tables = (
        table_of({1: {EOS: 0.99}, 2: {B: 0.5}, 3: {D: 0.4}}, 4),
        table_of({1: {EOS: 0.05, C: 0.8}, 2: {B: 0.85}, 3: {D: 0.7}}, 4),
    )
    model = ModelOfPasses(*tables)
    assert steps_of(model, 3, eos_token_id=EOS, commit_rule=Reconsider())[0] == [C, B, D]
    assert steps_of(ModelOfPasses(*tables), 3, eos_token_id=EOS)[0] == [EOS]


def test_a_registered_rule_works_by_name(monkeypatch):
    monkeypatch.setitem(COMMIT_RULES, "own", lambda: RULES["memory"])
    by_name = alone(model_of(15), PROMPTS[0], commit_rule="own")
    assert by_name == alone(model_of(15), PROMPTS[0], commit_rule=RULES["memory"])
    assert by_name != alone(model_of(15), PROMPTS[0])
    with pytest.raises(ValueError, match="`commit_rule` must be a .* one of .*'quota', .*'own', got 'nobody'"):
        model_of(15).generate(torch.tensor([PROMPTS[0]]), commit_rule="nobody")


def test_a_registered_ranking_works_by_name(monkeypatch):
    monkeypatch.setitem(RANKINGS, "own", lambda step: -step.positions.double())
    model = TableModel(table_of({1: {A: 0.6}, 2: {B: 0.9}, 3: {C: 0.7}, 4: {D: 0.8}}, 5))
    _, steps = steps_of(model, 4, remasking="own")
    assert [step.columns[step.committed].tolist() for step in steps] == [[1], [2], [3], [4]]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda step: None, "`Line` must return a `Decision`, got None"),
        (lambda step: Decision(step.masked[0]), r"bool `commit` of shape \(1, 4\), got torch.bool \(4,\)"),
        (lambda step: Decision(step.confidence), r"bool `commit` of shape \(1, 4\), got torch.float64 \(1, 4\)"),
        (lambda step: Decision(step.masked, remask=step.masked), "`Line` must have `may_remask = True`"),
    ],
)
def test_what_a_rule_returns_is_checked(answer, message):
    class Line(CommitRule):
        def __call__(self, step):
            return answer(step)

    with pytest.raises(ValueError, match=message):
        random_model(0).generate(torch.tensor([[7, 8]]), max_new_tokens=4, commit_rule=Line())


def test_a_rule_object_is_not_lost_on_saving(tmp_path):
    for rule in (ConfidenceThreshold(0.7), Reconsider(0.1)):
        config = MaskedDiffusionGenerationConfig(commit_rule=rule)
        assert f"<{type(rule).__name__}>" in repr(config)
        with pytest.raises(ValueError, match="`commit_rule` must be a name in a config that is saved, got a `"):
            config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`commit_rule` must be a `CommitRule` object or one of 'quota', .*, got 3"):
        MaskedDiffusionGenerationConfig(commit_rule=3)


def test_a_seed_and_a_generator_are_one_too_many():
    with pytest.raises(ValueError, match="At most one of `generator` and `seed`"):
        random_model(0).generate(torch.tensor([[7]]), max_new_tokens=2, seed=1, generator=torch.Generator())
