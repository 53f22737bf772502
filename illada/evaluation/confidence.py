"""The confidence score of a candidate, and whether greedy decoding would write it: one loop of reveals gives both."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from .pairs import Batch, Pair, check_forward_settings, check_model, length_batches, make_canvases, masked_logits


@dataclass(frozen=True)
class ConfidenceScore:
    """The confidence score of one pair.

    Attributes:
        score: sum of the log-probabilities of the candidate's tokens as they were revealed, in nats.
        order: candidate positions, counted from 0, as they were revealed.
        is_greedy: whether greedy decoding, one token a step, would write exactly this candidate.
    """

    score: float
    order: list[int]
    is_greedy: bool


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
    return [
        ConfidenceScore(score, order, greedy)
        for score, order, greedy in _reveal_all(
            model, pairs, append_eos, add_bos, bos_token_id, guidance_scale, batch_size, only_while_greedy=False
        )
    ]


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
    """Whether each candidate is what greedy decoding writes in its place: one token a step, most confident first.

    This is the `is_greedy` of lm-eval for a masked diffusion model, as in the released evaluation. A pair costs
    forwards up to its first difference, mostly one, and as many as the candidate has tokens if there is none.

    Args, raises: those of [`confidence_score`].

    Returns:
        One boolean per pair, in the order given.
    """
    return [
        greedy
        for _, _, greedy in _reveal_all(
            model, pairs, append_eos, add_bos, bos_token_id, guidance_scale, batch_size, only_while_greedy=True
        )
    ]


def _reveal_all(
    model, pairs, append_eos, add_bos, bos_token_id, guidance_scale, batch_size, only_while_greedy
) -> list[tuple[float, list[int], bool]]:
    """[`_reveal`] of all pairs in batches of similar length: score, order and greedy agreement, in the order given."""
    check_model(model)
    check_forward_settings(batch_size, guidance_scale)
    canvases = make_canvases(model, pairs, append_eos=append_eos, add_bos=add_bos, bos_token_id=bos_token_id)
    results: list = [None] * len(canvases)
    for indices, batch in length_batches(canvases, batch_size, model.device):
        tensors = _reveal(model, batch, guidance_scale, only_while_greedy)
        for index, score, order, greedy in zip(indices, *(tensor.tolist() for tensor in tensors)):
            results[index] = (score, order[: canvases[index].length], greedy)
    return results


def _reveal(
    model: PreTrainedModel, batch: Batch, guidance_scale: float, only_while_greedy: bool
) -> tuple[torch.DoubleTensor, torch.LongTensor, torch.BoolTensor]:
    """Reveals the true tokens of every row, most probable first.

    As long as greedy decoding writes the candidate, it reveals the same positions in the same order: the most
    confident prediction anywhere is then a true token, and no other true token can have a higher probability. One
    loop therefore serves both scores.

    Args:
        only_while_greedy: retire a row at the first token that greedy decoding would not write.

    Returns:
        Score in nats `(B,)`, reveal order `(B, L)` in candidate positions (valid up to the row's own length), and
        whether greedy decoding agrees `(B,)`.
    """
    device = batch.tokens.device
    masked = batch.candidate_mask()
    scores = torch.zeros(len(batch.tokens), dtype=torch.double, device=device)
    orders = torch.zeros(len(batch.tokens), int(batch.lengths.max()), dtype=torch.long, device=device)
    greedy = torch.ones(len(batch.tokens), dtype=torch.bool, device=device)
    rows = torch.arange(len(batch.tokens))
    for step in range(orders.shape[1]):
        rows = rows[batch.lengths[rows] > step]
        if only_while_greedy:
            rows = rows[greedy[rows].cpu()]
            if len(rows) == 0:
                break
        active = batch.select(rows)
        active_masked = masked[rows, : active.tokens.shape[1]]
        logits = masked_logits(model, active, active_masked, guidance_scale)
        normaliser = logits.logsumexp(dim=-1)
        true_tokens = active.tokens[active_masked]
        true_log_probs = logits.gather(1, true_tokens.unsqueeze(1)).squeeze(1) - normaliser
        logits[:, model.config.mask_token_id] = -torch.inf  # [MASK] is never a prediction
        best_logits, best_tokens = logits.max(dim=-1)

        score, position = _on_canvas(true_log_probs, active_masked, -torch.inf).max(dim=1)
        greedy_position = _on_canvas(best_logits - normaliser, active_masked, -torch.inf).argmax(dim=1)
        writes_truth = _on_canvas(best_tokens == true_tokens, active_masked, False)
        agrees = (greedy_position == position) & writes_truth.gather(1, position.unsqueeze(1)).squeeze(1)

        row_ids = rows.to(device)
        scores[row_ids] += score
        orders[row_ids, step] = position - active.starts.to(device)
        greedy[row_ids] &= agrees
        masked[row_ids, position] = False
    return scores, orders, greedy


def _on_canvas(values: torch.Tensor, mask: torch.BoolTensor, fill: float | bool) -> torch.Tensor:
    """Puts values (M,) at the M True positions of a mask (B, T), and `fill` elsewhere."""
    return values.new_full(mask.shape, fill).masked_scatter(mask, values)
