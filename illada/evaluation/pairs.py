"""(context, candidate) pairs: checked once, sorted by length, padded into batches, and put through the model."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..adapters import check_adapters
from ..logits import guide, non_finite_logits, promote

TokenIds = Sequence[int] | torch.Tensor
Pair = tuple[TokenIds, TokenIds]


@dataclass(frozen=True)
class ScoredText:
    """One checked pair as the model sees it: `[bos] + context + candidate + [eos]`, all visible.

    Attributes:
        name: what the caller calls the pair, for messages.
        tokens (`torch.LongTensor` of shape `(T,)`).
        start: position of the candidate's first token.
        length: number of candidate tokens, at least 1.
    """

    name: str
    tokens: torch.LongTensor
    start: int
    length: int

    def non_finite_logits(self, position: int, dtype: torch.dtype) -> ValueError:
        """The error to raise if a model of `dtype` gives no distribution at a position of the candidate, from 0."""
        return non_finite_logits(f"token {position} of the candidate of {self.name}", dtype)


@dataclass(frozen=True)
class Batch:
    """Texts padded on the right to a common width T, so that every position is that of the pair alone.

    Attributes:
        tokens (`torch.LongTensor` of shape `(B, T)`): the true tokens, and padding.
        starts, lengths, widths (`torch.LongTensor` of shape `(B,)`, on the CPU):
            first candidate position, number of candidate tokens, and number of tokens in all.
    """

    tokens: torch.LongTensor
    starts: torch.LongTensor
    lengths: torch.LongTensor
    widths: torch.LongTensor

    def candidate_mask(self) -> torch.BoolTensor:
        """(B, T), True at the candidates' tokens."""
        positions = torch.arange(self.tokens.shape[1])
        starts = self.starts.unsqueeze(1)
        mask = (positions >= starts) & (positions < starts + self.lengths.unsqueeze(1))
        return mask.to(self.tokens.device)

    def select(self, rows: torch.LongTensor) -> "Batch":
        """The given rows (R,), with padding that none of them needs cut off."""
        width = int(self.widths[rows].max())
        return Batch(self.tokens[rows, :width], self.starts[rows], self.lengths[rows], self.widths[rows])


def check_model(model: PreTrainedModel):
    """Raises `ValueError` for a model in training mode, without a mask token, or with an adapter that cannot act."""
    check_adapters(model, "A score")
    if model.training:
        raise ValueError("`model` is in training mode, where dropout makes scores random: call `model.eval()` first.")
    if getattr(model.config, "mask_token_id", None) is None:
        raise ValueError("`model.config.mask_token_id` is None: scoring needs the id of [MASK].")


def check_forward_settings(batch_size: int, guidance_scale: float):
    """Raises `ValueError` for a batch size below 1 or a negative guidance scale."""
    check_count("batch_size", batch_size)
    is_number = isinstance(guidance_scale, Real) and not isinstance(guidance_scale, bool)
    if not (is_number and 0 <= guidance_scale < math.inf):
        raise ValueError(f"`guidance_scale` must be a number of at least 0, got {guidance_scale!r}.")


def check_count(name: str, value: int):
    """Raises `ValueError` for what is no integer of at least 1."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")


def make_texts(
    model: PreTrainedModel,
    pairs: Sequence[Pair],
    *,
    append_eos: bool = False,
    add_bos: bool = False,
    bos_token_id: int | None = None,
    names: Sequence[str] | None = None,
) -> list[ScoredText]:
    """Checks every pair and lays out its text.

    Args:
        names: what the caller calls each pair; "`pairs[0]`" and so on if absent.

    Raises:
        ValueError: naming the pair, if a candidate is empty or holds [MASK], if an id lies outside the vocabulary, or
            if a text exceeds `max_position_embeddings`; and if BOS or EOS is asked for and has no id.
    """
    config = model.config
    if add_bos and bos_token_id is None:
        bos_token_id = config.bos_token_id
        if bos_token_id is None:
            raise ValueError("`add_bos` is True, but `model.config.bos_token_id` is None: pass `bos_token_id`.")
    prefix = [] if bos_token_id is None else [bos_token_id]
    suffix = []
    if append_eos:
        eos = config.eos_token_id
        suffix = [eos[0] if isinstance(eos, list) else eos]
        if suffix == [None]:
            raise ValueError("`append_eos` is True, but `model.config.eos_token_id` is None.")

    texts = []
    for index, (context, candidate) in enumerate(pairs):
        name = names[index] if names else f"`pairs[{index}]`"
        context, candidate = (torch.as_tensor(ids, dtype=torch.long).cpu().flatten() for ids in (context, candidate))
        tokens = torch.cat([torch.tensor(prefix, dtype=torch.long), context, candidate, torch.tensor(suffix).long()])
        if len(candidate) == 0:
            raise ValueError(f"{name} has an empty candidate: a score needs at least one token.")
        if (tokens < 0).any() or (tokens >= config.vocab_size).any():
            raise ValueError(f"{name} has a token id outside the vocabulary, [0, {config.vocab_size}).")
        if (candidate == config.mask_token_id).any():
            raise ValueError(f"{name} has [MASK] (id {config.mask_token_id}) in its candidate.")
        limit = config.max_position_embeddings
        if len(tokens) > limit:
            raise ValueError(
                f"{name} takes {len(tokens)} tokens ({len(context)} of context, {len(candidate)} of "
                f"candidate, {len(prefix) + len(suffix)} of BOS and EOS), more than the model's {limit} positions."
            )
        texts.append(ScoredText(name, tokens, len(prefix) + len(context), len(candidate)))
    return texts


def collate(texts: Sequence[ScoredText], device: torch.device) -> Batch:
    """Pads texts on the right into one batch on `device`."""
    return Batch(
        pad_sequence([text.tokens for text in texts], batch_first=True).to(device),
        torch.tensor([text.start for text in texts]),
        torch.tensor([text.length for text in texts]),
        torch.tensor([len(text.tokens) for text in texts]),
    )


def longest_first(texts: Sequence[ScoredText]) -> list[int]:
    """Indices of the texts by falling length: little padding, and a lack of memory shows at once."""
    return sorted(range(len(texts)), key=lambda index: -len(texts[index].tokens))


def length_batches(texts: Sequence[ScoredText], batch_size: int, device: torch.device) -> Iterator[tuple[list, Batch]]:
    """Yields batches of texts of similar length, each with the indices of its rows."""
    order = longest_first(texts)
    for first in range(0, len(order), batch_size):
        indices = order[first : first + batch_size]
        yield indices, collate([texts[index] for index in indices], device)


def masked_logits(
    model: PreTrainedModel, batch: Batch, masked: torch.BoolTensor, guidance_scale: float
) -> torch.FloatTensor:
    """Logits at the masked positions, in fp32 or the model's own precision, whichever is higher.

    With guidance ([`guide`]) the unconditional forward sees the context, BOS included, masked. A scale of 1 is no
    guidance and costs no second forward.

    Args:
        batch: B texts of width T.
        masked (`torch.BoolTensor` of shape `(B, T)`): positions that the model sees as [MASK].

    Returns:
        `torch.FloatTensor` of shape `(M, V)`: a row per masked position, in row-major order.
    """
    positions = torch.arange(batch.tokens.shape[1])
    attention_mask = positions < batch.widths.unsqueeze(1)
    arguments = {"logits_to_keep": masked}
    if not attention_mask.all():
        arguments["attention_mask"] = attention_mask.to(masked.device)

    def forward(hidden: torch.BoolTensor) -> torch.Tensor:
        return promote(
            model(input_ids=batch.tokens.masked_fill(hidden, model.config.mask_token_id), **arguments).logits
        )

    logits = forward(masked)
    if guidance_scale != 1:
        in_context = (positions < batch.starts.unsqueeze(1)).to(masked.device)
        logits = guide(logits, forward(masked | in_context), guidance_scale)
    return logits
