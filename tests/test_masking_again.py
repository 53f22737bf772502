"""Rules that mask again, and the shadow columns by which they judge: T2M and WINO."""

import math
import random

import pytest
import torch
from cache_oracle import forward
from hypothesis import given
from hypothesis import strategies as st
from test_decoding_properties import batches, examples, guidance, models, rankings, schedules
from test_named_rules import ModelOfPasses, written
from tiny_models import EOS, MASK, PAD, TableModel, pad_left, random_model, table_of
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from illada.commit_rules import MAX_REMASKS, T2M, WINO, CommitRule, Decision

A, B, C, D = 6, 7, 8, 9


def lively_model(seed: int):
    """A random model that is fairly sure, and of other tokens as the text fills: much is masked again."""
    model = random_model(seed, num_layers=3)
    with torch.no_grad():
        model.lm_head.weight *= 2
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 8
            layer.mlp.down_proj.weight *= 8
    return model


MODELS = [lively_model(seed) for seed in range(3)]


class Fickle(CommitRule):
    """Commits the quota, and masks again by chance."""

    may_remask, has_memory = True, True

    def __init__(self, has_shadows: bool, max_remasks: int, seed: int):
        self.has_shadows, self.max_remasks, self.rng = has_shadows, max_remasks, random.Random(seed)

    def __call__(self, step):
        remask = torch.tensor([[self.rng.random() < 0.7 for _ in row] for row in step.masked.tolist()])
        return Decision(step.best_ranked(step.quota), remask)


# By hand


def texts_of(steps) -> list[list[int]]:
    return [step.tokens[1:].tolist() for step in steps]


def test_t2m_masks_what_has_become_improbable():
    # A at position 1 is sure by itself, and unlikely once 2 is B: there C is right.
    tables = (
        table_of({1: {A: 0.99}, 2: {B: 0.5}, 3: {D: 0.4}}, 4),
        table_of({1: {A: 0.05, C: 0.8}, 2: {B: 0.85}, 3: {D: 0.7}}, 4),
    )
    tokens, _, steps = written(ModelOfPasses(*tables), 3, commit_rule=T2M())
    assert texts_of(steps) == [[A, MASK, MASK], [MASK, B, MASK], [C, B, MASK], [C, B, D]]
    assert tokens == [C, B, D]
    # At .05 and above it stays.
    assert texts_of(written(ModelOfPasses(*tables), 3, commit_rule=T2M(bound=0.049))[2])[1] == [A, B, MASK]


@pytest.mark.parametrize("max_remasks", [0, 1, 2, 5])
def test_t2m_masks_a_position_so_often(max_remasks):
    # Position 1 proposes A in odd passes and C in even ones, and finds what stands there improbable each time.
    tables = [table_of({1: {token: 0.99}, 2: {B: 0.3}, 3: {B: 0.2}}, 4) for token in (A, C) * 9]
    steps = written(ModelOfPasses(*tables), 3, commit_rule=T2M(bound=0.1, max_remasks=max_remasks))[2]
    counts = torch.stack([step.committed for step in steps]).sum(0).tolist()
    # It is committed in passes 1, 3 and 5; passes 2 and 4 mask it again, and commit 2 and 3 by their quota.
    assert counts == [1 + min(max_remasks, 2), 1, 1]


def test_wino_drafts_wide_and_keeps_what_is_verified():
    # Pass 1 drafts all above .6: 1, 2, 3. In pass 2 position 1 is verified (.95), 2 and 3 are not (.2, .5); at most
    # 3 - 1 may be masked again: both. 4 is drafted. Pass 3 drafts 2 and 3 again; 4 has .89, and pass 2 committed one
    # token, so that none may be masked again.
    tables = (
        table_of({1: {A: 0.7}, 2: {A: 0.65}, 3: {A: 0.61}, 4: {A: 0.5}}, 5),
        table_of({1: {A: 0.95}, 2: {A: 0.2, B: 0.75}, 3: {A: 0.5, C: 0.5}, 4: {D: 0.7}}, 5),
        table_of({1: {A: 0.95}, 2: {B: 0.9}, 3: {C: 0.7}, 4: {D: 0.89}}, 5),
    )
    tokens, commits, steps = written(ModelOfPasses(*tables), 4, commit_rule=WINO())
    assert commits == [[1, 2, 3], [4], [2, 3]]
    assert texts_of(steps) == [[A, A, A, MASK], [A, MASK, MASK, D], [A, B, C, D]]
    assert tokens == [A, B, C, D]


def test_wino_masks_the_least_probable_and_one_fewer_than_it_committed():
    # Two are drafted, so one may be masked again: the less probable of the two, 2.
    tables = (
        table_of({1: {A: 0.7}, 2: {A: 0.65}, 3: {A: 0.5}, 4: {A: 0.4}}, 5),
        table_of({1: {A: 0.5}, 2: {A: 0.3}, 3: {A: 0.55}, 4: {A: 0.45}}, 5),
    )
    steps = written(ModelOfPasses(*tables), 4, commit_rule=WINO())[2]
    assert texts_of(steps)[:2] == [[A, A, MASK, MASK], [A, MASK, A, MASK]]
    # Pass 2 committed one token, and pass 3 masks none again; each pass is one position nearer to the end.
    assert len(steps) == 4


def test_a_draft_at_the_bound_is_not_wide_enough_and_a_token_at_the_bound_is_verified():
    table = table_of({1: {A: 0.75}, 2: {A: 0.875}, 3: {A: 0.5}}, 4)
    assert written(TableModel(table), 3, commit_rule=WINO(draft=0.8749, verify=0.0))[1] == [[2], [1], [3]]
    assert written(TableModel(table), 3, commit_rule=WINO(draft=0.7, verify=0.7))[1] == [[1, 2], [3]]


def test_a_row_ends_once_a_pass_has_left_all_up_to_its_eos_as_it_is():
    table = table_of({1: {A: 0.95}, 2: {EOS: 0.99}, 3: {B: 0.6}, 4: {B: 0.55}, 5: {B: 0.52}}, 6)
    for rule in (T2M(), WINO(draft=0.9)):
        tokens, commits, _ = written(TableModel(table), 5, commit_rule=rule, eos_token_id=EOS)
        assert (tokens, commits) == ([A, EOS], [[1, 2], [3]])  # pass 2 sees both, and leaves them
    assert written(TableModel(table), 5, confidence_threshold=0.9, eos_token_id=EOS)[1] == [[1, 2]]


def test_a_row_does_not_end_while_something_before_its_eos_changes():
    others = {2: {EOS: 0.99}, 3: {B: 0.6}, 4: {B: 0.58}, 5: {B: 0.55}, 6: {B: 0.52}}
    tables = table_of({1: {A: 0.95}, **others}, 7), table_of({1: {C: 0.8, A: 0.05}, **others}, 7)
    tokens, commits, steps = written(ModelOfPasses(*tables), 6, commit_rule=T2M(), eos_token_id=EOS)
    # Pass 2 masks 1 again, pass 3 writes C there, and pass 4 leaves it.
    assert commits == [[1, 2], [3], [1], [4]] and tokens == [C, EOS]
    assert [step.tokens[1].item() for step in steps] == [A, MASK, C, C]


# Shadow columns against a second implementation


def oracle_generate(
    model, prompt, rule, *, block_cache, canvas, max_new_tokens, block_length, eos_token_id
) -> tuple[list, int]:
    """The row and its passes, by loops over columns and numbers; `rule` is ("t2m" or "wino", two bounds)."""
    kind, commit_bound, verify_bound = rule
    row, end = list(prompt), len(prompt) + max_new_tokens
    blanks = [i for i in range(len(prompt)) if prompt[i] == MASK]
    blocks = [blanks[i : i + block_length] for i in range(0, len(blanks), block_length)]
    blocks += [list(range(i, min(i + block_length, end))) for i in range(len(prompt), end, block_length)]
    if canvas == "fixed":
        row += [MASK] * max_new_tokens
    passes = 0
    for block in blocks:
        row += [MASK] * max(0, block[-1] + 1 - len(row))
        remasked, last_committed, first = dict.fromkeys(block, 0), 0, True
        while any(row[i] == MASK for i in block):
            standing = [i for i in block if row[i] != MASK]
            if first or block_cache is None:
                cache, columns = [{} for _ in model.model.layers], list(range(len(row)))
            else:
                columns = block if block_cache == "dual" else list(range(block[0], len(row)))
            with torch.no_grad():
                logits = forward(model, row, columns, cache, standing, MASK)
            first, passes = False, passes + 1

            for values in logits.values():
                values[MASK] = -math.inf
            probabilities = {name: values.softmax(0) for name, values in logits.items()}
            sure = {i: probabilities[i].max(0) for i in block if row[i] == MASK}
            best = max(sure, key=lambda i: sure[i].values.item())
            chosen = [i for i in sure if i == best or sure[i].values > commit_bound]
            doubts = {i: probabilities["shadow", i][row[i]].item() for i in standing}
            doubts = {i: p for i, p in doubts.items() if p < verify_bound}
            if kind == "wino":
                doubts = dict(sorted(doubts.items(), key=lambda pair: pair[1])[: max(0, last_committed - 1)])
            doubts = [i for i in doubts if remasked[i] < MAX_REMASKS]
            for i in doubts:
                row[i], remasked[i] = MASK, remasked[i] + 1
            for i in chosen:
                row[i] = sure[i].indices.item()
            last_committed = len(chosen)
            ends = [i for i in block if row[i] == eos_token_id and i >= len(prompt) and MASK not in row[:i]]
            if ends and (all(row[i] != MASK for i in block) or min([*chosen, *doubts]) > ends[0]):
                return row[: ends[0] + 1], passes
    return row, passes


def _oracle_settings():
    rng = random.Random(1)
    words = [token for token in range(37) if token not in (PAD, EOS, MASK)]
    for index in range(36):
        prompt = [rng.choice([*words[:9], MASK] if index % 3 == 0 else words) for _ in range(rng.randint(2, 7))]
        rule = ("t2m", 0.4, rng.choice([0.1, 0.3])), ("wino", 0.3, rng.choice([0.5, 0.8]))
        yield (
            index % 3,
            prompt,
            rule[rng.randrange(2)],
            {
                "block_cache": rng.choice([None, "prefix", "dual"]),
                "canvas": rng.choice(["growing", "fixed"]),
                "max_new_tokens": rng.randint(2, 9),
                "block_length": rng.randint(2, 5),
                "eos_token_id": rng.choice([None, EOS, 7, 28]),
            },
        )


def test_masking_again_agrees_with_the_oracle():
    differs_from_no_masking, num_ended = dict.fromkeys(("t2m", "wino"), 0), 0
    for index, prompt, rule, settings in _oracle_settings():
        model, arguments = MODELS[index], {"pad_token_id": PAD, "return_dict_in_generate": True}
        kind = T2M if rule[0] == "t2m" else WINO
        row, passes = oracle_generate(model, prompt, rule, **settings)
        output = model.generate(torch.tensor([prompt]), commit_rule=kind(*rule[1:]), **settings, **arguments)
        assert output.sequences[0].tolist() == row, (rule, settings)
        assert output.num_forward_passes.tolist() == [passes]
        num_ended += row[-1] == settings["eos_token_id"]
        without = model.generate(torch.tensor([prompt]), commit_rule=kind(rule[1], 0.0), **settings, **arguments)
        differs_from_no_masking[rule[0]] += without.sequences[0].tolist() != row
    assert min(*differs_from_no_masking.values(), num_ended) >= 3, (differs_from_no_masking, num_ended)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("guidance_scale", [None, 1.5])
@pytest.mark.parametrize("block_cache", [None, "prefix", "dual"])
def test_shadows_change_nothing_of_the_others(block_cache, guidance_scale, attention):
    """A rule that has shadows and never masks again writes what it writes without them."""

    class Watching(CommitRule):
        may_remask = True

        def __call__(self, step):
            return Decision(step.best_ranked(step.quota) | (step.confidence >= 0.2))

    class WatchingByShadows(Watching):
        has_shadows = True

    model = random_model(0, num_layers=3)
    model.set_attn_implementation(attention)
    prompts = pad_left([[7, 8, 9, 10, 11, 12, 13], [9, MASK, 10, MASK], [14, 15, 16]])
    outputs = [
        model.generate(
            **prompts,
            max_new_tokens=12,
            block_length=6,
            commit_rule=rule,
            block_cache=block_cache,
            guidance_scale=guidance_scale,
            return_dict_in_generate=True,
            output_trace=True,
        )
        for rule in (Watching(), WatchingByShadows())
    ]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert torch.equal(outputs[0].commit_steps, outputs[1].commit_steps)
    torch.testing.assert_close(outputs[0].commit_confidences, outputs[1].commit_confidences, equal_nan=True)


# What holds for every rule that masks again


remasking_rules = st.one_of(
    st.builds(T2M, st.floats(0.05, 1.0), st.floats(0.0, 1.0), st.integers(0, 3)),
    st.builds(WINO, st.floats(0.0, 1.0), st.floats(0.0, 1.0)),
    st.builds(Fickle, st.booleans(), st.integers(0, 4), st.integers(0, 99)),
)
caches = st.sampled_from([None, None, "prefix", "dual"])


@examples
@given(models, batches, schedules, remasking_rules, rankings, guidance, caches, st.booleans())
def test_nothing_stays_masked_and_nothing_given_changes(
    model, batch, schedule, rule, ranking, scale, block_cache, do_sample
):
    steps = []
    output = model.generate(
        **pad_left(batch),
        **schedule,
        commit_rule=rule,
        remasking=ranking,
        guidance_scale=scale,
        block_cache=block_cache,
        do_sample=do_sample,
        seed=0,
        eos_token_id=None,
        on_step=steps.append,
        return_dict_in_generate=True,
    )
    width = max(map(len, batch))
    for index, prompt in enumerate(batch):
        tokens = output.sequences[index].tolist()
        assert MASK not in tokens and len(tokens) == width + schedule["max_new_tokens"]
        assert all(old in (new, MASK) for old, new in zip(prompt, tokens[width - len(prompt) : width]))
        num_written, passes = prompt.count(MASK) + schedule["max_new_tokens"], int(output.num_forward_passes[index])
        assert passes <= num_written * (1 + rule.max_remasks)
        if isinstance(rule, WINO):
            assert passes <= num_written
        seen = [step for step in steps if step.row == index]
        assert all(step.committed.any() for step in seen) and len(seen) == passes
        # A position may be committed once, and once more for each time that it was masked again.
        counts = torch.zeros(len(prompt) + schedule["max_new_tokens"], dtype=torch.long)
        for step in seen:
            counts[step.columns[step.committed]] += 1
        assert counts.max() <= 1 + rule.max_remasks


PROMPTS = [[0, 7, 8, 9], [0, 10, MASK, 11, 12, MASK, 13, 14, 15], [0, 20], [0, MASK, 21, 22, 23, 24]]
RULES = {"t2m": T2M(threshold=0.4, bound=0.3), "wino": WINO(draft=0.3, verify=0.8)}
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
    model, width, differences = lively_model(1), max(map(len, PROMPTS)), 0
    for extra in ({}, {"do_sample": True, "seed": 3}, {"guidance_scale": 1.5}):
        settings = {"commit_rule": RULES[rule], "canvas": canvas, "block_cache": block_cache, **extra}
        batch = model.generate(**pad_left(PROMPTS), **SETTINGS, **settings)
        for index, prompt in enumerate(PROMPTS):
            tokens, num_passes, commit_steps = alone(model, prompt, index, **settings)
            own = slice(width - len(prompt), width - len(prompt) + len(tokens))
            assert batch.sequences[index, own].tolist() == tokens
            assert int(batch.num_forward_passes[index]) == num_passes
            assert batch.commit_steps[index, own].tolist() == commit_steps
            never = {**settings, "commit_rule": type(RULES[rule])(0.4 if rule == "t2m" else 0.3, 0.0)}
            differences += alone(model, prompt, index, **never) != (tokens, num_passes, commit_steps)
    assert differences > 3  # or else nothing was masked again


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("block_cache", [None, "prefix"])
def test_rows_that_come_and_go_share_nothing(rule, block_cache):
    model, prompts = lively_model(1), [*PROMPTS, [0, 7]]
    settings = {"commit_rule": RULES[rule], "block_cache": block_cache}
    limits = ContinuousBatchingConfig(max_requests_per_batch=2)
    results = model.generate_batch(
        prompts, continuous_batching_config=limits, max_new_tokens=12, block_length=6, **settings
    )
    for prompt, result in zip(prompts, results.values()):
        assert result.prompt_ids + result.generated_tokens == alone(model, prompt, **settings)[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: T2M(threshold=2), "`T2M.threshold` .*, got 2"),
        (lambda: T2M(bound=-1), "`T2M.bound` .*, got -1"),
        (lambda: T2M(max_remasks=-1), "`T2M.max_remasks` must be an integer of at least 0, got -1"),
        (lambda: WINO(draft=math.inf), "`WINO.draft` .*, got inf"),
        (lambda: WINO(verify="x"), "`WINO.verify` .*, got 'x'"),
    ],
)
def test_a_bad_parameter_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_shadows_cannot_do_is_refused_by_name():
    model, prompt = random_model(0), torch.tensor([[7, 8]])
    with pytest.raises(ValueError, match="`compile` must be unset with `commit_rule`='wino'"):
        model.generate(prompt, max_new_tokens=4, commit_rule="wino", block_cache="prefix", compile=True)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(
        ValueError, match="`commit_rule`='t2m' must come with 'sdpa' or 'eager' attention, .*, got 'flex"
    ):
        model.generate(prompt, max_new_tokens=4, commit_rule="t2m")
