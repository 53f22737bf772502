"""The Monte-Carlo bound on the log-likelihood of a candidate, with its standard error, and its sum over long texts."""

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel

from ..logits import log_probability
from .pairs import (
    Pair,
    ScoredText,
    TokenIds,
    check_count,
    check_forward_settings,
    check_model,
    collate,
    longest_first,
    make_texts,
    masked_logits,
)

Sampling = Literal["auto", "stratified", "antithetic", "exact"]
LONGEST_EXACT_CANDIDATE = 16  # 65,535 masks


@dataclass(frozen=True)
class LogLikelihood:
    """An estimate of the bound on the log-likelihood of one candidate.

    Attributes:
        log_likelihood: the estimate, in nats.
        standard_error: of the estimate, in nats: 0.0 if every mask was enumerated, NaN if too few were drawn to tell.
        num_samples: masks that were evaluated, each a row of a forward (two with guidance).
    """

    log_likelihood: float
    standard_error: float
    num_samples: int


@dataclass(frozen=True)
class RollingLogLikelihood(LogLikelihood):
    """[`LogLikelihood`] of a whole text, the sum over its windows.

    Attributes:
        num_tokens: tokens of the text, all of which are scored once.
    """

    num_tokens: int

    @property
    def perplexity(self) -> float:
        """exp(-log_likelihood / num_tokens) per token: an upper bound in expectation, as the likelihood is a lower."""
        return math.exp(-self.log_likelihood / self.num_tokens)


@torch.no_grad()
def monte_carlo_log_likelihood(
    model: PreTrainedModel,
    pairs: Sequence[Pair],
    *,
    num_samples: int = 128,
    sampling: Sampling = "auto",
    append_eos: bool = False,
    add_bos: bool = False,
    bos_token_id: int | None = None,
    guidance_scale: float = 1.0,
    batch_size: int = 32,
    generator: torch.Generator | None = None,
) -> list[LogLikelihood]:
    """Estimates the lower bound on log p(candidate | context) of a masked diffusion model, in nats.

    With l uniform on 1..L, the number of masked candidate tokens, and M a uniform subset of l positions,

        log p(x | c) >= E_{l, M} [ L / l * sum_{i in M} log p(x_i | c, x outside M) ]

    (LLaDA, arXiv 2502.09992, equation 6; iLLaDA, arXiv 2606.25331). What is estimated is this expectation, not
    log p itself: the standard error is that of the masks drawn, and the gap of the bound is not part of it.

    Args:
        model, pairs, append_eos, add_bos, bos_token_id, guidance_scale: as in [`confidence_score`].
        num_samples: masks drawn per pair. The published evaluations draw 128, and 1 for MMLU and CMMLU.
        sampling: how the masks are drawn.
            `"stratified"`, as published: `l_b = 1 + (k - 1 + floor(b L / B)) mod L` for b = 0..B-1, one uniform k per
            pair, so that the B draws spread evenly over the sizes. Each draw weighs the same, `1 / B`.
            `"antithetic"`: pairs of masks over one random order of the positions, the first l of it and the last
            L + 1 - l, with l stratified over the pairs. `num_samples` must be even.
            `"exact"`: every one of the 2^L - 1 masks, weighed by its probability; for L up to 16.
            `"auto"`: exact where that takes no more masks than `num_samples`, stratified elsewhere.
            A candidate of one token has one mask: it takes one forward and is exact however it is sampled.
        batch_size: masks in a forward, of one pair or several. It changes speed and memory alone.
        generator: gives one seed for the call. The noise of a pair depends on that seed and on the pair's own tokens,
            never on the other pairs, the batches, the device or the process. The CPU's global one if absent.

    Returns:
        One [`LogLikelihood`] per pair, in the order given. Its standard error is that of successive differences,
        `sqrt(sum_b (v_(b+1) - v_b)^2 / (2 B (B - 1)))`, over the B draws (or antithetic pairs) sorted by l: the usual
        estimator for a systematic sample (Wolter, Introduction to Variance Estimation, 2007, section 8.2), which sees
        the spread within a size and not the one that stratification removed. Plus or minus 1.96 of it covers the exact
        value about 95 % of the time with 128 draws, and some points less often with 32, which are few and skewed.

    Raises:
        ValueError: before the first forward, as [`confidence_score`]; for a non-positive `num_samples`, an odd one
            with `"antithetic"`, an unknown `sampling`, and a candidate too long for `"exact"`.
    """
    check_model(model)
    check_forward_settings(batch_size, guidance_scale)
    check_sampling(num_samples, sampling)
    texts = make_texts(model, pairs, append_eos=append_eos, add_bos=add_bos, bos_token_id=bos_token_id)
    return _monte_carlo(model, texts, num_samples, sampling, guidance_scale, batch_size, generator)


def _monte_carlo(
    model: PreTrainedModel,
    texts: list[ScoredText],
    num_samples: int,
    sampling: Sampling,
    guidance_scale: float,
    batch_size: int,
    generator: torch.Generator | None,
) -> list[LogLikelihood]:
    """[`monte_carlo_log_likelihood`] of texts that are checked and laid out."""
    longest = max((text.length for text in texts), default=0)
    if sampling == "exact" and longest > LONGEST_EXACT_CANDIDATE:
        raise ValueError(
            f"`sampling` 'exact' takes 2^L - 1 masks and is for candidates of at most {LONGEST_EXACT_CANDIDATE} "
            f"tokens, got one of {longest}."
        )

    # int64 cannot be drawn over its whole range, 62 bits are plenty.
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device if generator else None))
    order = longest_first(texts)
    draws = {index: _draw_masks(texts[index], num_samples, sampling, seed) for index in order}
    sums: dict[int, list[torch.Tensor]] = {index: [] for index in order}
    for pieces in _row_batches([(index, draws[index].masks) for index in order], batch_size):
        counts = torch.tensor([len(masks) for _, masks in pieces])
        batch = collate([texts[index] for index, _ in pieces], model.device)
        batch = batch.select(torch.arange(len(pieces)).repeat_interleave(counts))
        width = batch.tokens.shape[1]
        masked = torch.cat(
            [
                pad(masks, (texts[index].start, width - texts[index].start - texts[index].length))
                for index, masks in pieces
            ]
        ).to(model.device)
        logits = masked_logits(model, batch, masked, guidance_scale)
        log_probs = torch.zeros(masked.shape, dtype=torch.double, device=masked.device)
        log_probs[masked] = log_probability(logits, batch.tokens[masked]).double()
        row_sums = log_probs.sum(1).cpu()
        for row in row_sums.isnan().nonzero().flatten()[:1].tolist():
            text = texts[pieces[int((row >= counts.cumsum(0)).sum())][0]]
            raise text.non_finite_logits(int(log_probs[row].isnan().int().argmax()) - text.start, model.dtype)
        for (index, _), values in zip(pieces, row_sums.split(counts.tolist())):
            sums[index].append(values)
    return [_estimate(draws[index], torch.cat(sums[index])) for index in range(len(texts))]


def check_sampling(num_samples: int, sampling: Sampling):
    """Raises `ValueError` for a number of samples or a way of sampling that is not allowed."""
    check_count("num_samples", num_samples)
    if sampling not in get_args(Sampling):
        raise ValueError(f"`sampling` must be one of {', '.join(map(repr, get_args(Sampling)))}, got {sampling!r}.")
    if sampling == "antithetic" and num_samples % 2:
        raise ValueError(f"`num_samples` must be even for antithetic sampling, got {num_samples}.")


@dataclass(frozen=True)
class _Draws:
    """Masks (B, L) over a candidate in rising order of size, the weight (B,) of each, and how many make one draw.

    `masks_per_unit` is 0 where the masks are all that there are, so that nothing was drawn.
    """

    masks: torch.BoolTensor
    weights: torch.DoubleTensor
    masks_per_unit: int


def _draw_masks(text: ScoredText, num_samples: int, sampling: Sampling, seed: int) -> _Draws:
    length = text.length
    num_masks = 2**length - 1
    if sampling == "exact" or num_masks == 1 or (sampling == "auto" and num_masks <= num_samples):
        masks = (torch.arange(1, 2**length).unsqueeze(1) >> torch.arange(length)) % 2 == 1
        sizes = masks.sum(dim=1)
        num_subsets = torch.tensor([math.comb(length, size) for size in range(length + 1)], dtype=torch.double)
        return _Draws(masks, 1 / (sizes * num_subsets[sizes]), masks_per_unit=0)

    generator = torch.Generator().manual_seed(_pair_seed(text, seed))
    masks_per_unit = 2 if sampling == "antithetic" else 1
    num_units = num_samples // masks_per_unit
    offsets = torch.arange(num_units) * length // num_units
    sizes = (torch.randint(length, (), generator=generator) + offsets) % length + 1
    sizes = sizes.sort().values.unsqueeze(1)
    ranks = torch.rand(num_units, length, dtype=torch.double, generator=generator).argsort(dim=1).argsort(dim=1)
    masks = ranks < sizes
    if sampling == "antithetic":
        # The last L + 1 - l of the same order: a mask that shares one position with the first l, and whose size is as
        # uniform as l.
        masks = torch.stack([masks, ranks >= sizes - 1], dim=1).flatten(0, 1)
    return _Draws(masks, length / (masks.sum(dim=1) * len(masks)).double(), masks_per_unit)


def _pair_seed(text: ScoredText, seed: int) -> int:
    """A seed that is a function of the call's seed and of the pair alone."""
    layout = torch.tensor([seed, text.start, text.length])
    content = torch.cat([layout, text.tokens]).numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _row_batches(
    masks_of_pairs: list[tuple[int, torch.BoolTensor]], batch_size: int
) -> Iterator[list[tuple[int, torch.BoolTensor]]]:
    """Cuts the masks of all pairs, in sequence, into batches of `batch_size` rows: (pair, its masks) pieces."""
    pieces, room = [], batch_size
    for index, masks in masks_of_pairs:
        while len(masks):
            pieces.append((index, masks[:room]))
            taken, masks = len(masks[:room]), masks[room:]
            room -= taken
            if room == 0:
                yield pieces
                pieces, room = [], batch_size
    if pieces:
        yield pieces


def _estimate(draws: _Draws, sums: torch.DoubleTensor) -> LogLikelihood:
    """The weighted sum over masks of the masked tokens' log-probabilities, and its standard error."""
    values = draws.weights * sums
    error = 0.0
    if draws.masks_per_unit:
        values = values.unflatten(0, (-1, draws.masks_per_unit)).sum(dim=1)
        units = len(values)
        # The values are v_b / B, the terms of a mean: the B^2 of both their squares is taken out of the formula.
        error = math.sqrt(values.diff().square().sum() * units / (2 * (units - 1))) if units > 1 else math.nan
    return LogLikelihood(values.sum().item(), float(error), len(draws.masks))


@torch.no_grad()
def rolling_log_likelihood(
    model: PreTrainedModel,
    texts: Sequence[TokenIds],
    *,
    window_length: int | None = None,
    context_length: int | None = None,
    prefix_token_id: int | None = None,
    num_samples: int = 128,
    sampling: Sampling = "auto",
    guidance_scale: float = 1.0,
    batch_size: int = 32,
    generator: torch.Generator | None = None,
) -> list[RollingLogLikelihood]:
    """Estimates the bound on the log-likelihood of whole texts, in nats, by windows that score each token once.

    By the chain rule `log p(text) = sum_w log p(window w | everything before it)`, of which a window sees at least
    `context_length` tokens. Each term is bounded as in [`monte_carlo_log_likelihood`]. The errors of different windows
    are independent and add in quadrature; equal windows share their noise, so theirs add up. The released code has no
    such score.

    The bound depends on the windows: a token inside a window is predicted from both sides while the window is
    denoised, and shorter windows come nearer to an autoregressive factorisation. Compare perplexities at equal
    `window_length` and `context_length` only, and with those of autoregressive models as bounds.

    Args:
        model, num_samples, sampling, guidance_scale, batch_size, generator:
            as in [`monte_carlo_log_likelihood`], where a window is a pair.
        texts: token ids of each text, at least one; lists or 1-D integer tensors.
        window_length: most tokens in a forward, context included; `model.config.max_position_embeddings` if absent.
        context_length: fewest tokens of context of every window but the first; half of `window_length` if absent.
            The last window is filled up with context.
        prefix_token_id: id before the first window, as BOS; nothing if absent.

    Returns:
        One [`RollingLogLikelihood`] per text, in the order given.

    Raises:
        ValueError: before the first forward, as [`monte_carlo_log_likelihood`]; for an empty text, a `window_length`
            beyond the model's positions, and a `context_length` that leaves no room in the window.
    """
    check_model(model)
    check_forward_settings(batch_size, guidance_scale)
    check_sampling(num_samples, sampling)
    limit = model.config.max_position_embeddings
    window_length = limit if window_length is None else window_length
    if not 2 <= window_length <= limit:
        raise ValueError(f"`window_length` must be in [2, {limit}], got {window_length}.")
    context_length = window_length // 2 if context_length is None else context_length
    if not 0 <= context_length < window_length:
        raise ValueError(f"`context_length` must be in [0, {window_length}), got {context_length}.")
    prefix = [] if prefix_token_id is None else [prefix_token_id]
    texts = [torch.as_tensor(text, dtype=torch.long).flatten() for text in texts]
    windows: list[Pair] = []
    names: list[str] = []
    num_windows = []
    for index, text in enumerate(texts):
        if len(text) == 0:
            raise ValueError(f"`texts[{index}]` is empty: a score needs at least one token.")
        text = torch.cat([torch.tensor(prefix, dtype=torch.long), text.cpu()])
        done = len(prefix)
        num_windows.append(0)
        while done < len(text):
            end = min(len(text), window_length if done == len(prefix) else done + window_length - context_length)
            windows.append((text[max(0, end - window_length) : done], text[done:end]))
            num_windows[-1] += 1
            names.append(f"`texts[{index}]` (window {num_windows[-1]})")
            done = end

    laid_out = make_texts(model, windows, names=names)
    results = _monte_carlo(model, laid_out, num_samples, sampling, guidance_scale, batch_size, generator)
    parts = iter(zip(windows, results))
    return [_sum_windows(list(itertools.islice(parts, count)), len(text)) for text, count in zip(texts, num_windows)]


def _sum_windows(parts: list[tuple[Pair, LogLikelihood]], num_tokens: int) -> RollingLogLikelihood:
    errors: Counter = Counter()
    for (context, candidate), part in parts:
        errors[tuple(context.tolist()), tuple(candidate.tolist())] += part.standard_error
    return RollingLogLikelihood(
        math.fsum(part.log_likelihood for _, part in parts),
        math.hypot(*errors.values()),
        sum(part.num_samples for _, part in parts),
        num_tokens,
    )
