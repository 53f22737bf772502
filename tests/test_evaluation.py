"""The scores against outside truth: the released code's figures, enumeration, and plain loops over single pairs."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.modeling_outputs import MaskedLMOutput

from illada import ILLaDAConfig, ILLaDAForCausalLM
from illada.evaluation import confidence_score, is_greedy, monte_carlo_log_likelihood, rolling_log_likelihood

FIXTURE = Path(__file__).parent / "fixtures" / "illada"
BOS, EOS, MASK = 0, 2, 5
SAMPLINGS = ("auto", "stratified", "antithetic", "exact")


def build_model(vocab_size: int = 9, max_position_embeddings: int = 64) -> ILLaDAForCausalLM:
    """A random model in fp64 with sharp predictions, so that orders are clear and exactness can be claimed."""
    torch.manual_seed(0)
    config = ILLaDAConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=max_position_embeddings,
        initializer_range=0.4,
    )
    model = ILLaDAForCausalLM(config).double().eval()
    model.lm_head.weight.data *= 3
    return model


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.fixture
def count_rows(monkeypatch):
    """Makes a model record the inputs of every forward."""

    def attach(model):
        forward, calls = model.forward, []

        def recorded(input_ids, **kwargs):
            calls.append(input_ids.clone())
            return forward(input_ids=input_ids, **kwargs)

        monkeypatch.setattr(model, "forward", recorded)
        return calls

    return attach


def random_pairs(
    count: int, seed: int = 0, longest: int = 8, vocab_size: int = 9
) -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count, 2), generator=generator).tolist()
    return [
        tuple(torch.randint(6, vocab_size, (length,), generator=generator).tolist() for length in pair)
        for pair in lengths
    ]


def log_probs_alone(model, tokens: list[int], masked: list[int], context_length: int, guidance_scale: float = 1.0):
    """(T, V) log-probabilities of one unpadded sequence with the given positions masked: all logits, no batch."""

    def logits(hidden):
        return model(torch.tensor([[MASK if i in hidden else token for i, token in enumerate(tokens)]])).logits[0]

    guided = logits(masked)
    if guidance_scale != 1:
        unconditional = logits([*masked, *range(context_length)])
        guided = unconditional + guidance_scale * (guided - unconditional)
    return guided.log_softmax(-1)


def confidence_score_in_a_loop(model, pair, prefix=(), suffix=(), guidance_scale=1.0):
    context, candidate = [*prefix, *pair[0]], pair[1]
    tokens = [*context, *candidate, *suffix]
    masked, score, order = list(range(len(context), len(context) + len(candidate))), 0.0, []
    while masked:
        log_probs = log_probs_alone(model, tokens, masked, len(context), guidance_scale)
        best = max(masked, key=lambda position: (log_probs[position, tokens[position]], -position))
        score += log_probs[best, tokens[best]].item()
        order.append(best - len(context))
        masked.remove(best)
    return score, order


def log_likelihood_by_enumeration(model, pair, prefix=(), suffix=(), guidance_scale=1.0):
    context, candidate = [*prefix, *pair[0]], pair[1]
    tokens, length = [*context, *candidate, *suffix], len(candidate)
    total = 0.0
    for size in range(1, length + 1):
        for subset in itertools.combinations(range(length), size):
            masked = [len(context) + i for i in subset]
            log_probs = log_probs_alone(model, tokens, masked, len(context), guidance_scale)
            loss = sum(log_probs[i, tokens[i]].item() for i in masked)
            total += length / size * loss / (length * math.comb(length, size))
    return total


# --- the confidence score ---


@pytest.mark.parametrize("append_eos", [False, True])
def test_confidence_scores_and_orders_of_the_released_code(append_eos):
    model = ILLaDAForCausalLM.from_pretrained(FIXTURE / "checkpoint")
    runs = json.loads((FIXTURE / "confidence_scores.json").read_text())
    runs = [run for run in runs if run["append_eos"] == append_eos]
    assert len({len(run["target"]) for run in runs}) > 2
    results = confidence_score(model, [(run["prefix"], run["target"]) for run in runs], append_eos=append_eos)
    for result, run in zip(results, runs, strict=True):
        assert result.score == pytest.approx(run["score"], abs=1e-4)
        assert result.order == run["reveal_order"]


@pytest.mark.parametrize("guidance_scale", [1.0, 0.0, 2.5])
@pytest.mark.parametrize("framed", [False, True])
def test_batched_confidence_scores_equal_a_loop_over_pairs(model, framed, guidance_scale):
    pairs = [*random_pairs(12), ([], [6, 7, 8])]
    results = confidence_score(
        model, pairs, append_eos=framed, add_bos=framed, guidance_scale=guidance_scale, batch_size=5
    )
    for pair, result in zip(pairs, results, strict=True):
        score, order = confidence_score_in_a_loop(
            model, pair, [BOS] * framed, [EOS] * framed, guidance_scale=guidance_scale
        )
        assert result.score == pytest.approx(score, abs=1e-9)
        assert result.order == order


@pytest.mark.parametrize("score", [confidence_score, monte_carlo_log_likelihood, is_greedy])
def test_a_pair_scores_the_same_alone_in_any_batch_and_at_any_place(model, score):
    pairs = random_pairs(17, longest=12)
    seeded = {"generator": torch.Generator(), "num_samples": 16} if score is monte_carlo_log_likelihood else {}

    def run(pairs, batch_size):
        if seeded:
            seeded["generator"].manual_seed(3)
        return score(model, pairs, batch_size=batch_size, **seeded)

    alone = [run([pair], 1)[0] for pair in pairs]
    for batch_size in (4, 64):
        for order in (range(17), reversed(range(17))):
            order = list(order)
            for index, result in zip(order, run([pairs[i] for i in order], batch_size), strict=True):
                expected = alone[index]
                if score is is_greedy:
                    assert result == expected
                    continue
                for name, value in vars(expected).items():
                    assert getattr(result, name) == pytest.approx(value, abs=1e-9), name


def test_bos_token_id_goes_before_the_context_and_implies_add_bos(model):
    pair = ([7, 8], [6, 8, 7])
    given = confidence_score(model, [pair], bos_token_id=3)[0]
    assert given.score == pytest.approx(confidence_score_in_a_loop(model, pair, prefix=[3])[0], abs=1e-9)
    assert confidence_score(model, [pair], add_bos=True) == confidence_score(model, [pair], bos_token_id=BOS)
    assert confidence_score(model, [pair], add_bos=True, bos_token_id=3)[0] == given


class PositionModel(torch.nn.Module):
    """A model without weights: fixed logits (S, V) by position, and how much the context adds to them."""

    def __init__(self, logits: torch.Tensor, from_context: float = 0.0):
        super().__init__()
        self.logits, self.from_context, self.device = logits, from_context, torch.device("cpu")
        self.config = SimpleNamespace(
            vocab_size=logits.shape[1], mask_token_id=MASK, max_position_embeddings=len(logits), eos_token_id=EOS
        )
        self.eval()

    def forward(self, input_ids, logits_to_keep, attention_mask=None):
        logits = self.logits[: input_ids.shape[1]].repeat(len(input_ids), 1, 1)
        logits[..., 7] += self.from_context * (input_ids[:, :1] != MASK)
        return MaskedLMOutput(logits=logits[logits_to_keep])


def test_equal_probabilities_are_revealed_from_left_to_right():
    model = PositionModel(torch.zeros(12, 9))
    result = confidence_score(model, [([6], [7, 8, 6, 7])])[0]
    assert result.order == [0, 1, 2, 3]
    assert result.score == pytest.approx(4 * math.log(1 / 9), abs=1e-6)


def test_guidance_is_measured_from_the_logits_without_context():
    model = PositionModel(torch.zeros(12, 9), from_context=1.5)
    for scale in (0.0, 1.0, 3.0):
        logits = torch.zeros(9)
        logits[7] = scale * 1.5
        expected = logits.log_softmax(-1)[7].item()
        assert confidence_score(model, [([6], [7])], guidance_scale=scale)[0].score == pytest.approx(
            expected, abs=1e-6
        )


# --- the greedy check ---


def infill(model, context, length, suffix):
    prompt = torch.tensor([[*context, *[MASK] * length, *suffix]])
    filled = model.generate(prompt, max_new_tokens=0, block_length=length, attention_mask=torch.ones_like(prompt))
    return filled[0, len(context) : len(context) + length].tolist()


@pytest.mark.parametrize("append_eos", [False, True])
def test_is_greedy_is_what_generate_writes(model, append_eos):
    contexts = [context for context, _ in random_pairs(10, seed=4)]
    written = [infill(model, context, 2 + i % 5, [EOS] * append_eos) for i, context in enumerate(contexts)]
    changed = [[*answer[:-1], 6 + (answer[-1] == 6)] for answer in written]
    pairs = [*zip(contexts, written), *zip(contexts, changed)]
    expected = [True] * 10 + [False] * 10
    assert is_greedy(model, pairs, append_eos=append_eos, batch_size=7) == expected


def test_is_greedy_stops_at_the_first_difference(model, count_rows):
    context, answer = [6, 7, 8], infill(model, [6, 7, 8], 6, [])
    wrong = [8 if token == 6 else 6 for token in answer]
    calls = count_rows(model)
    assert is_greedy(model, [(context, answer), (context, wrong)]) == [True, False]
    assert [len(call) for call in calls] == [2, 1, 1, 1, 1, 1]


# --- the Monte-Carlo likelihood ---


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("framed", [False, True])
def test_exact_sampling_is_enumeration(model, framed, guidance_scale):
    pairs = [([7, 6], [8, 6, 7, 6][:length]) for length in (1, 2, 3, 4)] + [([], [6, 8])]
    results = monte_carlo_log_likelihood(
        model, pairs, sampling="exact", append_eos=framed, add_bos=framed, guidance_scale=guidance_scale, batch_size=7
    )
    for pair, result in zip(pairs, results, strict=True):
        expected = log_likelihood_by_enumeration(model, pair, [BOS] * framed, [EOS] * framed, guidance_scale)
        assert result.log_likelihood == pytest.approx(expected, abs=1e-9)
        assert result.standard_error == 0.0
        assert result.num_samples == 2 ** len(pair[1]) - 1


def repeated_estimates(model, pair, repeats, **settings):
    generator = torch.Generator().manual_seed(11)
    runs = [monte_carlo_log_likelihood(model, [pair], generator=generator, **settings)[0] for _ in range(repeats)]
    estimates = torch.tensor([run.log_likelihood for run in runs], dtype=torch.double)
    errors = torch.tensor([run.standard_error for run in runs], dtype=torch.double)
    return estimates, errors


@pytest.mark.parametrize("sampling", ["stratified", "antithetic"])
@pytest.mark.parametrize(("vocab_size", "length", "num_samples"), [(7, 2, 2), (7, 3, 4), (9, 4, 6)])
def test_expectation_of_the_estimate_is_the_enumeration(sampling, vocab_size, length, num_samples):
    model = build_model(vocab_size)
    pair = ([6], [6, 3, 6, 4][:length])
    truth = log_likelihood_by_enumeration(model, pair)
    estimates, _ = repeated_estimates(model, pair, 200, sampling=sampling, num_samples=num_samples)
    assert estimates.std() > 0
    assert abs(estimates.mean() - truth) < 4 * estimates.std() / math.sqrt(200)


@pytest.mark.parametrize("sampling", ["stratified", "antithetic"])
@pytest.mark.parametrize(("length", "num_samples"), [(3, 128), (4, 128)])
def test_standard_error_covers_the_truth_at_the_stated_rate(model, sampling, length, num_samples):
    pair = ([6, 8], [7, 6, 8, 6][:length])
    truth = log_likelihood_by_enumeration(model, pair)
    estimates, errors = repeated_estimates(
        model, pair, 250, sampling=sampling, num_samples=num_samples, batch_size=num_samples
    )
    covered = ((estimates - truth).abs() <= 1.96 * errors).double().mean()
    assert 0.91 <= covered <= 0.99  # 95 %, give or take three standard deviations of 250 repeats
    assert errors.square().mean() / estimates.var() == pytest.approx(1, abs=0.35)


def test_sizes_are_stratified_as_published(model, count_rows):
    calls = count_rows(model)
    monte_carlo_log_likelihood(model, [([6, 7], [8, 6, 7, 8, 6])], num_samples=7, sampling="stratified")
    sizes = sorted((torch.cat(calls) == MASK).sum(1).tolist())
    assert sizes in [sorted(1 + (k - 1 + b * 5 // 7) % 5 for b in range(7)) for k in range(1, 6)]


def test_antithetic_masks_cover_every_position_and_share_one(model, count_rows):
    calls = count_rows(model)
    monte_carlo_log_likelihood(model, [([6, 7], [8, 6, 7, 8, 6])], num_samples=8, sampling="antithetic")
    masked = torch.cat(calls)[:, 2:] == MASK
    for first, second in masked.view(4, 2, 5):
        assert (first | second).all()
        assert (first & second).sum() == 1


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_one_token_takes_one_forward_and_is_exact(model, count_rows, sampling):
    pair = ([6, 7], [8])
    calls = count_rows(model)
    result = monte_carlo_log_likelihood(model, [pair], sampling=sampling)[0]
    assert [len(call) for call in calls] == [1]
    assert (result.standard_error, result.num_samples) == (0.0, 1)
    assert result.log_likelihood == pytest.approx(confidence_score(model, [pair])[0].score, abs=1e-9)
    assert result.log_likelihood == pytest.approx(log_likelihood_by_enumeration(model, pair), abs=1e-9)


def test_auto_enumerates_where_that_takes_no_more_masks(model):
    pairs = [([6], [7, 8, 6]), ([6], [7, 8, 6, 7])]
    short, long = monte_carlo_log_likelihood(model, pairs, num_samples=7)
    assert (short.num_samples, short.standard_error) == (7, 0.0)
    assert long.num_samples == 7 and long.standard_error > 0
    assert short.log_likelihood == pytest.approx(log_likelihood_by_enumeration(model, pairs[0]), abs=1e-9)


def test_one_draw_has_no_standard_error(model):
    assert math.isnan(monte_carlo_log_likelihood(model, [([6], [7, 8, 6])], num_samples=1)[0].standard_error)


def test_noise_comes_from_the_generator_alone(model):
    pairs = random_pairs(4, longest=12)

    def run(seed):
        return monte_carlo_log_likelihood(model, pairs, num_samples=8, generator=torch.Generator().manual_seed(seed))

    state = torch.get_rng_state()
    first = run(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert run(1) == first
    assert run(2) != first
    torch.manual_seed(5)
    from_global = monte_carlo_log_likelihood(model, pairs, num_samples=8)
    torch.manual_seed(5)
    assert monte_carlo_log_likelihood(model, pairs, num_samples=8) == from_global


# --- whole texts ---


@pytest.mark.parametrize("prefix", [[], [BOS]])
def test_rolling_windows_score_every_token_once(model, prefix):
    text = [6, 7, 8, 8, 6, 7, 6, 6, 8, 7, 6]
    full = [*prefix, *text]
    # windows of 5 tokens with at least 2 of context; the last is filled up with context
    cuts = [0, 5 - len(prefix), 8 - len(prefix), 11 - len(prefix), 11][: 4 + len(prefix)]
    expected = 0.0
    for start, end in zip(cuts, cuts[1:]):
        begin, stop = start + len(prefix), end + len(prefix)
        expected += log_likelihood_by_enumeration(model, (full[max(0, stop - 5) : begin], full[begin:stop]))
    settings = {"window_length": 5, "context_length": 2, "prefix_token_id": prefix[0] if prefix else None}
    rolled, short = rolling_log_likelihood(model, [text, [7]], sampling="exact", **settings)
    assert rolled.log_likelihood == pytest.approx(expected, abs=1e-9)
    assert (rolled.num_tokens, rolled.standard_error) == (11, 0.0)
    assert rolled.perplexity == pytest.approx(math.exp(-expected / 11))
    assert short.log_likelihood == pytest.approx(log_likelihood_by_enumeration(model, (prefix, [7])), abs=1e-9)


def test_rolling_errors_add_in_quadrature_and_equal_windows_add_up(model):
    settings = {"sampling": "stratified", "num_samples": 8}

    def error(pairs):
        generator = torch.Generator().manual_seed(2)
        return [r.standard_error for r in monte_carlo_log_likelihood(model, pairs, generator=generator, **settings)]

    def rolled(text):
        generator = torch.Generator().manual_seed(2)
        windows = {"window_length": 4, "context_length": 0}
        return rolling_log_likelihood(model, [text], generator=generator, **windows, **settings)[0].standard_error

    first, second = [6, 7, 8, 6], [8, 8, 7, 6]
    different = error([([], first), ([], second)])
    assert rolled([*first, *second]) == pytest.approx(math.hypot(*different))
    assert rolled([*first, *first]) == pytest.approx(2 * different[0])


# --- logits that are no distribution ---


@pytest.fixture
def overflow(monkeypatch):
    """Gives `value` as logits of column 3 of the rows that begin with token 8."""

    def attach(model, value, tokens=slice(None)):
        forward = model.forward

        def overflowing(input_ids, logits_to_keep, **kwargs):
            output = forward(input_ids=input_ids, logits_to_keep=logits_to_keep, **kwargs)
            rows, columns = logits_to_keep.nonzero(as_tuple=True)
            output.logits[(input_ids[rows, 0] == 8) & (columns == 3), tokens] = value
            return output

        monkeypatch.setattr(model, "forward", overflowing)
        return model

    return attach


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("score", [confidence_score, is_greedy, monte_carlo_log_likelihood])
def test_logits_that_are_not_finite_are_an_error_that_names_pair_and_position(overflow, score, value):
    pairs = [([6], [7, 7]), ([8, 6], [7, 6, 7]), ([6, 7], [6, 7])]
    with pytest.raises(ValueError, match=r"NaN or infinite at token 1 of the candidate of `pairs\[1\]`: a weight may"):
        score(overflow(build_model(), value), pairs, batch_size=2)


def test_half_precision_is_named_as_the_cause(overflow):
    model = overflow(build_model(), math.inf).half()
    with pytest.raises(ValueError, match="float16 overflows above 65,504; load the model in bfloat16 or float32"):
        confidence_score(model, [([8, 6], [7, 6, 7])])


def test_one_infinite_logit_is_no_distribution_either(overflow):
    """The true token is another one: its log-probability would be -inf."""
    for score in (confidence_score, monte_carlo_log_likelihood):
        with pytest.raises(ValueError, match="NaN or infinite at token 1"):
            score(overflow(build_model(), math.inf, tokens=7), [([8, 6], [7, 6, 7])])


def test_a_token_of_probability_zero_is_no_error(overflow):
    model = overflow(build_model(), -math.inf, tokens=6)
    pairs = [([8, 6], [7, 6, 7])]
    assert confidence_score(model, pairs)[0].score == -math.inf
    assert monte_carlo_log_likelihood(model, pairs)[0].log_likelihood == -math.inf


def test_errors_of_whole_texts_name_texts(overflow):
    model = overflow(build_model(), math.nan)
    with pytest.raises(ValueError, match=r"candidate of `texts\[1\]` \(window 1\): a weight"):
        rolling_log_likelihood(model, [[6, 7, 6, 7], [8, 6, 7, 6, 7]], num_samples=31)
    with pytest.raises(ValueError, match=r"`texts\[1\]` \(window 1\) has a token id outside the vocabulary"):
        rolling_log_likelihood(model, [[6], [99]])


# --- what is refused ---


GOOD = ([6, 7], [8, 6])


@pytest.mark.parametrize("score", [confidence_score, is_greedy, monte_carlo_log_likelihood])
@pytest.mark.parametrize(
    ("pairs", "settings", "message"),
    [
        ([GOOD, ([6], [])], {}, r"`pairs\[1\]` has an empty candidate"),
        ([GOOD, ([6], [MASK])], {}, r"`pairs\[1\]` has \[MASK\] \(id 5\) in its candidate"),
        ([GOOD, ([9], [6])], {}, r"`pairs\[1\]` has a token id outside the vocabulary, \[0, 9\)"),
        ([GOOD, ([6], [-1])], {}, r"`pairs\[1\]` has a token id outside"),
        ([([6], [7] * 64)], {}, r"`pairs\[0\]` takes 65 tokens \(1 of context, 64 of candidate"),
        ([([6], [7] * 62)], {"append_eos": True, "add_bos": True}, "2 of BOS and EOS.*more than the model's 64"),
        ([GOOD], {"batch_size": 2.0}, "`batch_size` must be an integer of at least 1, got 2.0"),
        ([GOOD], {"guidance_scale": math.inf}, "`guidance_scale` must be a number of at least 0, got inf"),
        ([GOOD], {"guidance_scale": "2"}, "`guidance_scale` must be a number of at least 0, got '2'"),
        ([GOOD], {"batch_size": 0}, "`batch_size` must be an integer of at least 1, got 0"),
        ([GOOD], {"guidance_scale": -1.0}, "`guidance_scale` must be a number of at least 0, got -1.0"),
        ([GOOD], {"bos_token_id": 9}, "token id outside the vocabulary"),
    ],
)
def test_errors_come_before_the_first_forward(model, count_rows, score, pairs, settings, message):
    calls = count_rows(model)
    with pytest.raises(ValueError, match=message):
        score(model, pairs, **settings)
    assert calls == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 1.5}, "`num_samples` must be an integer of at least 1, got 1.5"),
        ({"num_samples": 0}, "`num_samples` must be an integer of at least 1, got 0"),
        ({"num_samples": 3, "sampling": "antithetic"}, "`num_samples` must be even for antithetic sampling, got 3"),
        ({"sampling": "uniform"}, "`sampling` must be one of 'auto', .*got 'uniform'"),
        ({"sampling": "exact"}, "candidates of at most 16 tokens, got one of 17"),
    ],
)
def test_sampling_errors(model, settings, message):
    with pytest.raises(ValueError, match=message):
        monte_carlo_log_likelihood(model, [([6], [7] * 17)], **settings)


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        ([[6], []], {}, r"`texts\[1\]` is empty"),
        ([[6]], {"window_length": 65}, r"`window_length` must be in \[2, 64\], got 65"),
        ([[6]], {"window_length": 4, "context_length": 4}, r"`context_length` must be in \[0, 4\), got 4"),
    ],
)
def test_rolling_errors(model, texts, settings, message):
    with pytest.raises(ValueError, match=message):
        rolling_log_likelihood(model, texts, **settings)


def test_a_model_that_cannot_score_is_refused():
    model = build_model()
    with pytest.raises(ValueError, match="in training mode"):
        confidence_score(model.train(), [GOOD])
    model.eval().config.mask_token_id = None
    with pytest.raises(ValueError, match="`model.config.mask_token_id` is None"):
        confidence_score(model, [GOOD])
    model.config.mask_token_id, model.config.eos_token_id, model.config.bos_token_id = MASK, None, None
    with pytest.raises(ValueError, match="`append_eos` is True, but"):
        confidence_score(model, [GOOD], append_eos=True)
    with pytest.raises(ValueError, match="`add_bos` is True, but"):
        confidence_score(model, [GOOD], add_bos=True)


def test_no_pairs_no_results(model):
    assert confidence_score(model, []) == is_greedy(model, []) == monte_carlo_log_likelihood(model, []) == []


def test_a_candidate_may_be_longer_than_its_context_and_tensors_are_taken(model):
    lists = [([6], [7, 8, 6, 7, 8])]
    tensors = [(torch.tensor([6]), torch.tensor([7, 8, 6, 7, 8], dtype=torch.int32))]
    assert confidence_score(model, lists) == confidence_score(model, tensors)
    assert len(confidence_score(model, lists)[0].order) == 5


def test_scores_of_a_half_precision_model_are_taken_in_fp32(model):
    half = build_model().bfloat16()
    pair = ([6, 7, 8], [7])
    logits = half(torch.tensor([[6, 7, 8, MASK]])).logits[0, 3].float()
    assert confidence_score(half, [pair])[0].score == pytest.approx(logits.log_softmax(-1)[7].item(), abs=1e-6)


def test_scoring_does_not_need_the_harness():
    program = "import sys, illada.evaluation; assert not {'lm_eval', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
