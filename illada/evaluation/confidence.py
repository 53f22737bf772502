"""The confidence score of a candidate, and whether greedy decoding would write it: one loop of reveals, two rules."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..logits import forbid_mask, log_probability
from .pairs import Batch, Pair, check_forward_settings, check_model, length_batches, make_texts, masked_logits


@dataclass(frozen=True)
class ConfidenceScore:
    """The confidence score of one pair.

    Attributes:
        score: sum of the log-probabilities of the candidate's tokens as they were revealed, in nats.
        order: candidate positions, counted from 0, as they were revealed.
    """

    score: float
    order: list[int]


@torch.no_grad()
def confidence_score(
    model: PreTrainedModel,
    pairs: Sequence[Pair],
    *,
    append_eos: bool = False,
    add_bos: bool = False,
    bos_token_id: int | None = None,
    guidance_scale: float = 1.0,
    batch_size: int = 32,
) -> list[ConfidenceScore]:
    """The deterministic multiple-choice score of iLLaDA (arXiv 2606.25331), in nats.

    The candidate starts all masked. In each of its L steps the model predicts every token still masked, and the *true*
    token with the highest probability is revealed (the lower position in a tie). With `M_j` the positions masked
    before step j,

        S = sum_{j=1..L} max_{i in M_j} log p(x_i | context, candidate outside M_j)

    It ranks candidates. It is not a log-likelihood: the order is chosen with the candidate in sight, so that S tends
    to lie above a Monte-Carlo bound, and it is not normalised by length.

    Args:
        model: a masked diffusion model in evaluation mode.
        pairs: (context ids, candidate ids) in tokens; lists or 1-D integer tensors. A context may be empty.
        append_eos: put one EOS, `model.config.eos_token_id`, after the candidate, visible throughout and not scored.
        add_bos: put BOS, `model.config.bos_token_id`, before the context, as the released evaluation does.
        bos_token_id: id to put before the context; giving one implies `add_bos`.
        guidance_scale: weight of the conditional logits against those without context; 1 is no guidance.
        batch_size: pairs in a forward. It changes speed and memory alone. The pairs are sorted by length for it.

    Returns:
        One [`ConfidenceScore`] per pair, in the order given. Log-probabilities are taken in fp32, or in the model's
        own precision if that is higher.

    Raises:
        ValueError: before the first forward, for an empty candidate, [MASK] in a candidate, an id outside the
            vocabulary, more tokens than `max_position_embeddings`, a non-positive `batch_size`, a negative
            `guidance_scale`, a missing special id, or a model in training mode.
    """
    revealed = _reveal_all(
        model, pairs, append_eos, add_bos, bos_token_id, guidance_scale, batch_size, _true_tokens_by_probability
    )
    return [ConfidenceScore(score, order) for score, order, _ in revealed]


@torch.no_grad()
def is_greedy(
    model: PreTrainedModel,
    pairs: Sequence[Pair],
    *,
    append_eos: bool = False,
    add_bos: bool = False,
    bos_token_id: int | None = None,
    guidance_scale: float = 1.0,
    batch_size: int = 32,
) -> list[bool]:
    """Whether each candidate is what `generate` writes in its place: one token a step, most confident first.

    This is lm-eval's `is_greedy` for a masked diffusion model, as in the released evaluation. The candidate is decoded
    as one block of its own length; as in `generate`, [MASK] is never a prediction. A pair costs forwards up to its
    first difference, mostly one, and as many as the candidate has tokens if there is none.

    Args, raises: those of [`confidence_score`].

    Returns:
        One boolean per pair, in the order given.
    """
    revealed = _reveal_all(
        model, pairs, append_eos, add_bos, bos_token_id, guidance_scale, batch_size, _predictions_by_confidence
    )
    return [agrees for _, _, agrees in revealed]


POOL_BATCHES = 16  # pairs that are held together, in batches

RevealRule = Callable[[torch.Tensor, torch.LongTensor, int], tuple[torch.Tensor, torch.BoolTensor]]
"""(logits (M, V), true tokens (M,), mask id) -> (what ranks the positions (M,), which of them may go on (M,))."""


def _true_tokens_by_probability(
    logits: torch.Tensor, true_tokens: torch.LongTensor, mask_token_id: int
) -> tuple[torch.Tensor, torch.BoolTensor]:
    """The confidence score's rule: log-probability of the true token, over the whole vocabulary."""
    return log_probability(logits, true_tokens), torch.ones_like(true_tokens, dtype=torch.bool)


def _predictions_by_confidence(
    logits: torch.Tensor, true_tokens: torch.LongTensor, mask_token_id: int
) -> tuple[torch.Tensor, torch.BoolTensor]:
    """Greedy decoding's rule: log-probability of the best token but [MASK]; the row goes on if it is the true one."""
    logits = forbid_mask(logits, mask_token_id)
    best_tokens = logits.argmax(dim=1)
    return log_probability(logits, best_tokens), best_tokens == true_tokens


def _reveal_all(
    model, pairs, append_eos, add_bos, bos_token_id, guidance_scale, batch_size, rule: RevealRule
) -> list[tuple[float, list[int], bool]]:
    """[`_reveal`] of all pairs in pools of similar length: score, order and survival, in the order given."""
    check_model(model)
    check_forward_settings(batch_size, guidance_scale)
    texts = make_texts(model, pairs, append_eos=append_eos, add_bos=add_bos, bos_token_id=bos_token_id)
    results: list = [None] * len(texts)
    for indices, pool in length_batches(texts, POOL_BATCHES * batch_size, model.device):
        tensors = _reveal(model, pool, batch_size, guidance_scale, rule)
        for index, score, order, survives, steps in zip(indices, *(tensor.tolist() for tensor in tensors)):
            if math.isnan(score):
                raise texts[index].non_finite_logits(order[steps - 1], model.dtype)
            results[index] = (score, order[: texts[index].length], survives)
    return results


def _reveal(
    model: PreTrainedModel, pool: Batch, batch_size: int, guidance_scale: float, rule: RevealRule
) -> tuple[torch.DoubleTensor, torch.LongTensor, torch.BoolTensor, torch.LongTensor]:
    """Reveals the true token at the best ranked position of every row, until nothing is masked or the rule says no.

    A forward takes the first `batch_size` rows that are not done; when one is done, the next of the pool takes its
    place, so that the batch stays full whatever the candidates' lengths are.

    Returns:
        Sum of the ranks of what was revealed `(B,)`, the order of the reveals `(B, L)` in candidate positions, whether
        the rule let the row go on to its end `(B,)`, and how many positions were revealed `(B,)`. A row in which the
        model gives no distribution ends there, with a sum of NaN.
    """
    device = pool.tokens.device
    masked = pool.candidate_mask()
    sums = torch.zeros(len(pool.tokens), dtype=torch.double, device=device)
    orders = torch.zeros(len(pool.tokens), int(pool.lengths.max()), dtype=torch.long, device=device)
    survives = torch.ones(len(pool.tokens), dtype=torch.bool, device=device)
    num_revealed = torch.zeros_like(pool.lengths)
    while True:
        rows = (survives.cpu() & (num_revealed < pool.lengths)).nonzero().squeeze(1)[:batch_size]
        if len(rows) == 0:
            break
        active = pool.select(rows)
        active_masked = masked[rows, : active.tokens.shape[1]]
        logits = masked_logits(model, active, active_masked, guidance_scale)
        ranks, may_go_on = rule(logits, active.tokens[active_masked], model.config.mask_token_id)

        # The first of equals: the lower position. A NaN comes before everything.
        rank, position = (
            ranks.new_full(active_masked.shape, -torch.inf).masked_scatter(active_masked, ranks).max(dim=1)
        )
        goes_on = torch.zeros_like(active_masked).masked_scatter(active_masked, may_go_on)
        steps = num_revealed[rows].to(device)
        num_revealed[rows] += 1
        rows = rows.to(device)
        sums[rows] += rank
        orders[rows, steps] = position - active.starts.to(device)
        survives[rows] = goes_on.gather(1, position.unsqueeze(1)).squeeze(1) & ~rank.isnan()
        masked[rows, position] = False
    return sums, orders, survives, num_revealed
