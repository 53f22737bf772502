"""How probable each of several given token sequences is at one place of a text: all of them in one forward pass."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from ..logits import forbid_mask, log_probability, non_finite_logits
from .pairs import ScoredText, check_count, check_model, collate, longest_first, masked_logits


@dataclass(frozen=True)
class Decision:
    """How probable each choice is.

    Attributes:
        probabilities (`list[float]`): of the choices, in the order given; they sum to 1.
        label_mass (`float`): the probability that what the model writes is one of the choices at all, by which
            `probabilities` are divided. If it is small, the choices are not answers that the model would give.
    """

    probabilities: list[float]
    label_mass: float

    @property
    def best(self) -> int:
        """Index of the most probable choice, the first of equals."""
        return self.probabilities.index(max(self.probabilities))

    @property
    def confidence(self) -> float:
        """Probability of the best choice among everything that the model may write: not divided by the mass."""
        return self.probabilities[self.best] * self.label_mass

    @property
    def score(self) -> float:
        """Expected index of the choice, `sum(k * p_k)` from 0, for choices that are the steps of a scale."""
        return math.fsum(index * probability for index, probability in enumerate(self.probabilities))


@dataclass(frozen=True)
class ChoiceText:
    """A place in a text, and what may stand there, in token ids.

    Attributes:
        before (`list[int]`): the text up to that place, which may have a [MASK] itself.
        choices (`list[list[int]]`): at least two.
        after (`list[int]`): the text that follows; if there is any, all choices have the same number of tokens.
        length (`int`, *optional*): tokens of the place; those of the longest choice if absent.
        name (`str`): what errors call it.
        labels (`list[str]`): what errors call the choices; their indices if absent.
    """

    before: list[int]
    choices: list[list[int]]
    after: list[int] = field(default_factory=list)
    length: int | None = None
    name: str = "a question"
    labels: list[str] = field(default_factory=list)

    @property
    def num_masks(self) -> int:
        """Tokens of the place."""
        return max(map(len, self.choices), default=0) if self.length is None else self.length

    def label(self, index: int) -> str:
        return repr(self.labels[index]) if self.labels else f"choice {index}"

    def check(self, config, eos_token_ids: list[int]):
        """Raises a `ValueError` that names the choice, or what else is wrong."""
        if len(self.choices) < 2:
            raise ValueError(f"{self.name} must have at least two choices, got {len(self.choices)}.")
        seen: dict[tuple[int, ...], int] = {}
        for index, choice in enumerate(self.choices):
            if not choice:
                raise ValueError(f"{self.name} must have choices of at least one token, got {self.label(index)}.")
            if not {config.mask_token_id, *eos_token_ids}.isdisjoint(choice):
                raise ValueError(f"{self.name} must have choices without [MASK] and EOS, got {self.label(index)}.")
            if not all(0 <= token < config.vocab_size for token in [*choice, *self.before, *self.after]):
                raise ValueError(f"{self.name} has a token id outside the vocabulary, [0, {config.vocab_size}).")
            if (first := seen.setdefault(tuple(choice), index)) != index:
                raise ValueError(
                    f"{self.name} must have different choices, got the same tokens in {self.label(first)} and "
                    f"{self.label(index)}."
                )
        for index, choice in enumerate(self.choices):
            if len(choice) > self.num_masks or len(choice) < self.num_masks and (self.after or not eos_token_ids):
                reason = "text follows" if self.after else "no EOS may follow"
                raise ValueError(
                    f"{self.name} must have choices of {self.num_masks} tokens each, since {reason}, got "
                    f"{len(choice)} in {self.label(index)}."
                )
        length = len(self.before) + self.num_masks + len(self.after)
        if length > config.max_position_embeddings:
            raise ValueError(
                f"{self.name} takes {length} tokens, more than the model's {config.max_position_embeddings} positions."
            )


class ChoiceReader:
    """Which texts the model has to see, each once, and what it says of them. See [`choice_probabilities`].

    Args:
        model: a masked diffusion model in evaluation mode.
        questions: what to decide.

    Raises:
        ValueError: see [`choice_probabilities`].
    """

    def __init__(self, model: PreTrainedModel, questions: Sequence[ChoiceText]):
        check_model(model)
        self.model, self.questions = model, questions
        self.eos_token_ids = model.generation_config.eos_token_ids
        self.mask_token_id = model.config.mask_token_id
        self.wanted: dict[tuple[int, ...], dict[int, set[int]]] = {}  # text -> position -> tokens
        for question in questions:
            question.check(model.config, self.eos_token_ids)
            for step in (step for index in range(len(question.choices)) for step in self._steps(question, index)):
                text, position, tokens = step
                self.wanted.setdefault(text, {}).setdefault(position, set()).update(tokens)
        self.texts = [ScoredText("a text", torch.tensor(text), min(places), 1) for text, places in self.wanted.items()]
        self.known: dict[tuple[tuple[int, ...], int, int], float] = {}

    def _steps(self, question: ChoiceText, index: int) -> list[tuple[tuple[int, ...], int, list[int]]]:
        """(text, position, tokens of which one must stand there) of each factor of a choice's probability."""
        choice, width = question.choices[index], question.num_masks
        ends = [[token] for token in choice] + ([self.eos_token_ids] if len(choice) < width else [])
        before, after = tuple(question.before), tuple(question.after)
        return [
            (
                (*before, *choice[:count], *[self.mask_token_id] * (width - count), *after),
                len(before) + count,
                tokens,
            )
            for count, tokens in enumerate(ends)
        ]

    def batches(self, batch_size: int) -> list[list[int]]:
        """Indices of texts of similar length, at most `batch_size` each: one forward pass each."""
        order = longest_first(self.texts)
        return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]

    @torch.no_grad()
    def read(self, indices: list[int]):
        """Asks the model about some of the texts, in one forward pass."""
        batch = collate([self.texts[index] for index in indices], self.model.device)
        keys = [tuple(self.texts[index].tokens.tolist()) for index in indices]
        # In the order in which the model returns the logits of the masked positions: row by row.
        reads = [(row, position) for row, key in enumerate(keys) for position in sorted(self.wanted[key])]
        asked = torch.zeros(batch.tokens.shape, dtype=torch.bool)
        asked[tuple(zip(*reads))] = True
        tokens = [sorted(self.wanted[keys[row]][position]) for row, position in reads]
        width = max(map(len, tokens))
        padded = torch.tensor([[*row, *row[:1] * (width - len(row))] for row in tokens], device=self.model.device)
        logits = masked_logits(self.model, batch, asked.to(self.model.device), guidance_scale=1.0)
        values = log_probability(forbid_mask(logits, self.mask_token_id), padded).tolist()
        for (row, position), own, row_values in zip(reads, tokens, values, strict=True):
            for token, value in zip(own, row_values):
                self.known[keys[row], position, token] = value

    def decisions(self) -> list[Decision]:
        """One for each question, once all texts are read.

        Raises:
            ValueError: names the question for which the model gives no distribution.
        """
        return [self._decision(question) for question in self.questions]

    def _decision(self, question: ChoiceText) -> Decision:
        sums = [
            sum(_log_sum([self.known[text, position, token] for token in tokens]) for text, position, tokens in steps)
            for steps in (self._steps(question, index) for index in range(len(question.choices)))
        ]
        mass = _log_sum(sums)
        if not math.isfinite(mass):
            if math.isnan(mass):
                raise non_finite_logits(question.name, self.model.dtype)
            raise ValueError(f"{question.name} has no choice of a probability above 0.")
        return Decision([math.exp(value - mass) for value in sums], math.exp(mass))


def _log_sum(values: list[float]) -> float:
    """Logarithm of the sum of numbers whose logarithms are given; NaN if one is."""
    return torch.tensor(values, dtype=torch.double).logsumexp(0).item()


def choice_probabilities(
    model: PreTrainedModel, questions: Sequence[ChoiceText], *, batch_size: int = 32
) -> list[Decision]:
    """The probability of each choice at its place, by the model's own chain of tokens from left to right.

    The place has as many [MASK]s as the longest choice has tokens, W. With `x_1 .. x_L` the tokens of a choice,

        P(choice) = prod_{i=1..L} p(x_i | before, x_1 .. x_(i-1), [MASK] * (W - i + 1), after)

    times, for a choice with L < W, the probability that an EOS of the model stands at L + 1. It is the probability
    that the model writes exactly this choice when it fills the place from left to right, sampling at temperature 1:
    these probabilities sum to 1 over everything that it may write, and `label_mass` is the part that falls on the
    choices. [MASK] is never written. Choices of one token are read from one distribution, so that theirs are the
    softmax of their logits at one [MASK].

    A masked diffusion model can factorise a text in any order, and its conditionals need not agree: another order
    gives choices of several tokens another probability. What is computed here is exact for this one.

    All factors are known texts with a [MASK] to read, so that nothing waits for anything: the texts of all questions,
    of which equal ones are read once, are rows of the same forward passes. A question whose choices have one token
    each is one row; questions about different places of the same text, each of one token, are one row together.

    Args:
        model: a masked diffusion model in evaluation mode.
        questions: what to decide.
        batch_size: rows in a forward. It changes speed and memory only.

    Returns:
        One [`Decision`] per question, in the order given. Logarithms are taken in fp32, or in the model's own
        precision if that is higher.

    Raises:
        ValueError: before the first forward, for fewer than two choices; an empty choice, two with the same tokens, or
            one with [MASK] or EOS in it; choices of unequal length where text follows; an id outside the vocabulary;
            more tokens than `max_position_embeddings`; a model in training mode.
    """
    check_count("batch_size", batch_size)
    reader = ChoiceReader(model, questions)
    for indices in reader.batches(batch_size):
        reader.read(indices)
    return reader.decisions()
