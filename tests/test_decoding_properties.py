"""What holds for every way of decoding, on random models, prompts and settings."""

from unittest import mock

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import EOS, MASK, PAD, pad_left, random_model

from illada.commit_rules import KLASS, CreditDecoding, LocalLeap

# Derandomized: the same examples on every machine and every run.
settings.register_profile("decoding", derandomize=True, max_examples=25, deadline=None, database=None)
examples = settings.get_profile("decoding")

MODELS = [random_model(seed) for seed in range(4)]
WORDS = [token for token in range(37) if token not in (PAD, EOS, MASK)]

models = st.sampled_from(MODELS)
prompts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6)
prompts_with_blanks = st.lists(st.sampled_from([*WORDS[:8], *[MASK] * 5]), min_size=1, max_size=8)
batches = st.lists(st.one_of(prompts, prompts_with_blanks), min_size=1, max_size=3)
parallel_rules = st.one_of(
    st.just({}),
    st.builds(lambda value: {"confidence_threshold": value}, st.floats(0.02, 1.0)),
    st.builds(lambda value: {"confidence_factor": value}, st.floats(0.2, 4.0)),
    st.builds(lambda value: {"entropy_bound": value}, st.floats(0.0, 8.0)),
    st.builds(lambda value: {"frechet_margin": value}, st.floats(0.0, 0.9)),
)
named_rules = st.builds(
    lambda rule: {"commit_rule": rule},
    st.one_of(
        st.builds(KLASS, st.floats(0.0, 1.0), st.floats(0.0, 3.0), st.integers(1, 3)),
        st.builds(LocalLeap, st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.integers(0, 4)),
        st.builds(CreditDecoding, st.floats(0.0, 1.0), st.floats(0.0, 3.0), st.floats(0.0, 1.0), st.floats(0.0, 2.0)),
    ),
)
schedules = st.fixed_dictionaries(
    {
        "canvas": st.sampled_from(["growing", "fixed"]),
        "max_new_tokens": st.integers(1, 9),
        "block_length": st.integers(1, 6),
        "max_denoising_steps": st.integers(1, 6),
    }
)
certain_rankings = st.sampled_from(["low_confidence", "margin", "entropy"])
rankings = st.sampled_from(["low_confidence", "margin", "entropy", "random"])
guidance = st.sampled_from([None, None, 1.5])


def quota_of_passes(prompt: list[int], schedule: dict) -> int:
    """Passes of a row that never ends early: each block of N masks takes min(N, S) steps."""
    size, passes = schedule["block_length"], 0
    for count in (prompt.count(MASK), schedule["max_new_tokens"]):
        for start in range(0, count, size):
            passes += min(size, count - start, schedule["max_denoising_steps"])
    return passes


@examples
@given(models, batches, schedules, st.one_of(parallel_rules, named_rules), rankings, guidance, st.booleans())
def test_every_way_of_decoding_fills_the_canvas(model, batch, schedule, rule, ranking, scale, do_sample):
    steps = []
    output = model.generate(
        **pad_left(batch),
        **schedule,
        **rule,
        remasking=ranking,
        guidance_scale=scale,
        do_sample=do_sample,
        generator=torch.Generator().manual_seed(0),
        on_step=steps.append,
        return_dict_in_generate=True,
    )
    width = max(map(len, batch))
    passes = [0] * len(batch)
    for step in steps:
        # Each row that takes part commits at least one of its masks, and no more than its masks.
        is_predicted = step.confidence.isfinite()
        assert step.committed.any()
        assert not (step.committed & ~is_predicted).any()
        block = step.tokens[step.columns]
        assert torch.equal(block[step.committed], step.proposals[step.committed])
        assert (block[is_predicted & ~step.committed] == MASK).all()
        assert (step.proposals[is_predicted] != MASK).all()
        passes[step.row] += 1
        assert step.num_forward_passes == passes[step.row]
    assert output.num_forward_passes.tolist() == passes
    assert output.sequences.shape[1] <= width + schedule["max_new_tokens"]
    for row, prompt in enumerate(batch):
        tokens = output.sequences[row].tolist()
        assert MASK not in tokens
        assert tokens[: width - len(prompt)] == [PAD] * (width - len(prompt))
        assert all(old in (new, MASK) for old, new in zip(prompt, tokens[width - len(prompt) : width]))
        response = tokens[width:]
        if EOS in response:
            end = response.index(EOS) + 1
            assert response[end:] == [PAD] * (len(response) - end)
            # A rule by name may leave out the quota, but not all of a pass.
            steps_allowed = 99 if "commit_rule" in rule else schedule["max_denoising_steps"]
            assert passes[row] <= quota_of_passes(prompt, {**schedule, "max_denoising_steps": steps_allowed})
        else:
            assert len(response) == schedule["max_new_tokens"]
        written = response.index(EOS) + 1 if EOS in response else len(response)
        per_forward = (prompt.count(MASK) + written) / passes[row]
        assert abs(output.tokens_per_forward[row] - per_forward) < 1e-6


@examples
@given(models, batches, schedules, parallel_rules, rankings)
def test_passes_are_at_most_the_steps_allowed(model, batch, schedule, rule, ranking):
    output = model.generate(
        **pad_left(batch), **schedule, **rule, remasking=ranking, eos_token_id=None, return_dict_in_generate=True
    )
    allowed = [quota_of_passes(prompt, schedule) for prompt in batch]
    if rule:
        assert all(passes <= most for passes, most in zip(output.num_forward_passes.tolist(), allowed))
    else:
        assert output.num_forward_passes.tolist() == allowed


@examples
@given(models, batches, schedules, certain_rankings)
def test_a_threshold_of_one_is_the_quota(model, batch, schedule, ranking):
    """No prediction of these models is certain, so nothing is added to the quota."""
    arguments = {**pad_left(batch), **schedule, "remasking": ranking, "return_dict_in_generate": True}
    plain = model.generate(**arguments)
    threshold = model.generate(**arguments, confidence_threshold=1.0)
    assert torch.equal(plain.sequences, threshold.sequences)
    assert torch.equal(plain.num_forward_passes, threshold.num_forward_passes)


@examples
@given(models, batches, schedules, rankings, st.integers(0, 2**40))
def test_a_generator_is_the_only_source_of_noise(model, batch, schedule, ranking, seed):
    arguments = {**pad_left(batch), **schedule, "remasking": ranking, "do_sample": True, "temperature": 3.0}
    state = torch.get_rng_state()
    first = model.generate(**arguments, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert torch.equal(model.generate(**arguments, generator=torch.Generator().manual_seed(seed)), first)


def test_without_a_generator_the_global_state_is_the_source():
    arguments = {"inputs": torch.tensor([[7, 8]]), "max_new_tokens": 12, "do_sample": True, "temperature": 3.0}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = MODELS[0].generate(**arguments)
        second = MODELS[0].generate(**arguments)
        torch.manual_seed(1)
        again = MODELS[0].generate(**arguments)
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_different_seeds_give_different_tokens():
    arguments = {"inputs": torch.tensor([[7, 8]]), "max_new_tokens": 12, "eos_token_id": None}
    for choice in ({"do_sample": True, "temperature": 3.0}, {"remasking": "random"}):
        outputs = {
            tuple(MODELS[0].generate(**arguments, **choice, generator=torch.Generator().manual_seed(seed))[0].tolist())
            for seed in range(5)
        }
        assert len(outputs) > 1, choice


@examples
@given(
    models,
    st.lists(prompts_with_blanks, min_size=2, max_size=4),
    schedules,
    parallel_rules,
    certain_rankings,
    guidance,
    st.sampled_from([1, 3, 128]),
)
def test_a_row_of_a_batch_is_what_it_is_alone(model, batch, schedule, rule, ranking, scale, bucket):
    """Rows differ in length, blanks and finishing time; those that finish leave the batch, and change no other.

    Those whose padding falls into different buckets of columns have forward passes of their own.
    """
    arguments = {**schedule, **rule, "remasking": ranking, "guidance_scale": scale}
    arguments |= {"return_dict_in_generate": True, "output_trace": True}
    with mock.patch("illada.prediction.BUCKET", bucket):
        together = model.generate(**pad_left(batch), **arguments)
    width = max(map(len, batch))
    for row, prompt in enumerate(batch):
        alone = model.generate(torch.tensor([prompt]), **arguments)
        length = alone.sequences.shape[1]
        own = slice(width - len(prompt), width - len(prompt) + length)
        assert torch.equal(together.sequences[row, own], alone.sequences[0])
        assert (together.sequences[row, own.stop :] == PAD).all()
        assert together.num_forward_passes[row] == alone.num_forward_passes[0]
        assert together.tokens_per_forward[row] == alone.tokens_per_forward[0]
        assert torch.equal(together.commit_steps[row, own], alone.commit_steps[0])
        assert (together.commit_steps[row, own.stop :] == 0).all()
        torch.testing.assert_close(
            together.commit_confidences[row, own], alone.commit_confidences[0], equal_nan=True, rtol=1e-6, atol=0
        )
        assert together.commit_confidences[row, own.stop :].isnan().all()


@examples
@given(models, batches, schedules, parallel_rules, certain_rankings, guidance)
def test_leaving_a_block_at_eos_changes_nothing_before_it(model, batch, schedule, rule, ranking, scale):
    """Without an EOS id every block is decoded to its end; with one, a row stops as soon as it may."""
    eos_ids = [EOS, 7, 8, 9, 10]
    arguments = {**pad_left(batch), **schedule, **rule, "remasking": ranking, "guidance_scale": scale}
    whole = model.generate(**arguments, eos_token_id=None, pad_token_id=PAD, return_dict_in_generate=True)
    short = model.generate(**arguments, eos_token_id=eos_ids, pad_token_id=PAD, return_dict_in_generate=True)
    width = max(map(len, batch))
    for row in range(len(batch)):
        tokens = whole.sequences[row].tolist()
        ends = [column + 1 for column in range(width, len(tokens)) if tokens[column] in eos_ids]
        end = min(ends, default=len(tokens))
        padding = [PAD] * (short.sequences.shape[1] - end)
        assert short.sequences[row].tolist() == tokens[:end] + padding
        assert short.num_forward_passes[row] <= whole.num_forward_passes[row]


def test_leaving_a_block_at_eos_saves_passes():
    saved = 0
    for model in MODELS:
        for word in WORDS[:6]:
            arguments = {"inputs": torch.tensor([[word]]), "max_new_tokens": 8, "return_dict_in_generate": True}
            whole = model.generate(**arguments, eos_token_id=None)
            short = model.generate(**arguments, eos_token_id=[EOS, 7, 8, 9, 10])
            saved += int(whole.num_forward_passes - short.num_forward_passes)
    assert saved > 0


@examples
@given(models, st.one_of(prompts, prompts_with_blanks), schedules, parallel_rules, rankings, st.booleans())
def test_the_trace_replays_the_denoising(model, prompt, schedule, rule, ranking, do_sample):
    seen = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    try:
        output = model.generate(
            torch.tensor([prompt]),
            **schedule,
            **rule,
            remasking=ranking,
            do_sample=do_sample,
            generator=torch.Generator().manual_seed(3),
            return_dict_in_generate=True,
            output_trace=True,
        )
    finally:
        hook.remove()
    tokens = output.sequences[0].tolist()
    steps = output.commit_steps[0].tolist()
    confidences = output.commit_confidences[0]

    given_tokens = [token != MASK for token in prompt] + [False] * (len(tokens) - len(prompt))
    assert [step == 0 for step in steps] == given_tokens
    assert confidences.isnan().tolist() == given_tokens
    committed = confidences[~confidences.isnan()]
    assert ((committed >= 0) & (committed <= 1)).all()
    assert len(seen) == output.num_forward_passes and max(steps) <= len(seen)

    # Before pass i the model saw what passes 1 to i - 1 had committed, and masks.
    for i, canvas in enumerate(seen, start=1):
        replayed = [token if step < i else MASK for token, step in zip(tokens, steps)]
        shown = min(len(tokens), len(canvas))  # a growing canvas is still short; what follows EOS is not returned
        assert canvas[:shown] == replayed[:shown]
        with torch.no_grad():
            logits = model(torch.tensor([canvas])).logits[0]
        logits[:, MASK] = -torch.inf
        for position, step in enumerate(steps):
            if step == i:
                probability = logits[position].softmax(-1)[tokens[position]].item()
                assert abs(confidences[position].item() - probability) < 1e-6
