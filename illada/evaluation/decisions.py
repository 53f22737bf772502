"""Questions about a text whose answers are given: which of them the model would write, and how probably."""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..text.blanks import blank_lengths, cut_at_blanks, encode_with_blanks
from .choices import ChoiceReader, ChoiceText, Decision
from .pairs import check_count


@dataclass(frozen=True)
class Question:
    """What is asked of a text in words, and the labels with which the model may answer; see its subclasses."""

    instructions: str
    reply: ClassVar[str]

    @property
    def labels(self) -> list[str]:
        """What the model may answer, in the order of the probabilities."""
        raise NotImplementedError

    @property
    def lines(self) -> list[str]:
        """The options as the model reads them."""
        return []

    def message(self, text: str) -> str:
        """The text and the question, as one message."""
        return "\n".join([text, "", self.instructions, *self.lines, self.reply])

    def __post_init__(self):
        if not (isinstance(self.instructions, str) and self.instructions.strip()):
            raise ValueError(f"`instructions` must be a text that is not empty, got {self.instructions!r}.")


@dataclass(frozen=True)
class Predicate(Question):
    """Is this true of the text? The probabilities are those of yes and of no.

    Attributes:
        instructions (`str`): the question, or a statement.
    """

    reply = "Answer Yes or No only."

    @property
    def labels(self) -> list[str]:
        return ["Yes", "No"]


@dataclass(frozen=True)
class Choice(Question):
    """Which of these? The model answers with the letter of one.

    Attributes:
        instructions (`str`): the question.
        choices (`Sequence[str]`): 2 to 26 different texts.
        descriptions (`Sequence[str]`): one for each choice, empty for none; or nothing.
    """

    choices: Sequence[str] = ()
    descriptions: Sequence[str] = ()
    reply = "Answer with the letter of one option only."

    def __post_init__(self):
        super().__post_init__()
        _check_options("choices", self.choices, len(string.ascii_uppercase))
        if self.descriptions and len(self.descriptions) != len(self.choices):
            raise ValueError(f"`descriptions` must be one for each choice, got {list(self.descriptions)}.")

    @property
    def labels(self) -> list[str]:
        return list(string.ascii_uppercase[: len(self.choices)])

    @property
    def lines(self) -> list[str]:
        return _labelled(self.labels, self.choices, self.descriptions)


@dataclass(frozen=True)
class Score(Question):
    """How much? The model answers with the number of a level, from 0; the decision's `score` is the expected number.

    Attributes:
        instructions (`str`): the question.
        levels (`Sequence[str]`): 2 to 10 different texts, from the lowest to the highest.
        descriptions (`Sequence[str]`): one for each level, empty for none; or nothing.
    """

    levels: Sequence[str] = ()
    descriptions: Sequence[str] = ()
    reply = "Answer with the number of one level only."

    def __post_init__(self):
        super().__post_init__()
        _check_options("levels", self.levels, 10)
        if self.descriptions and len(self.descriptions) != len(self.levels):
            raise ValueError(f"`descriptions` must be one for each level, got {list(self.descriptions)}.")

    @property
    def labels(self) -> list[str]:
        return list(string.digits[: len(self.levels)])

    @property
    def lines(self) -> list[str]:
        return _labelled(self.labels, self.levels, self.descriptions)


@dataclass(frozen=True)
class Blank:
    """What stands in a blank of the text, `<[MASK]>` or `<[MASK]*2>`? The other blanks are open while it is decided.

    Attributes:
        choices (`Sequence[str]`): at least two different texts, each of as many tokens as the blank has; if nothing
            follows the blank, one of fewer tokens counts as the end of the text. Where a space is before the blank, it
            is before the choice as well.
        index (`int`): of the blank, from 0.
    """

    choices: Sequence[str]
    index: int = 0

    def __post_init__(self):
        _check_options("choices", self.choices, None)


def _check_options(name: str, options: Sequence[str], most: int | None):
    if isinstance(options, str) or not all(isinstance(option, str) for option in options):
        raise ValueError(f"`{name}` must be a sequence of texts, got {options!r}.")
    for option in options:
        if not option.strip():
            raise ValueError(f"`{name}` must not have an empty text, got {option!r}.")
        if list(options).count(option) > 1:
            raise ValueError(f"`{name}` must be different texts, got {option!r} twice.")
    if len(options) < 2 or most is not None and len(options) > most:
        allowed = "at least 2" if most is None else f"2 to {most}"
        raise ValueError(f"`{name}` must be {allowed} texts, got {len(options)}.")


def _labelled(labels: Sequence[str], options: Sequence[str], descriptions: Sequence[str]) -> list[str]:
    texts = [f"{option} - {more}" if more else option for option, more in zip(options, descriptions)] or options
    return [f"{label}: {text}" for label, text in zip(labels, texts, strict=True)]


class QuestionEncoder:
    """Lays out questions in token ids: by the chat template where there is one, else as plain text.

    Args:
        tokenizer: of the model.
        mask_token_id (`int`): id of [MASK].
        max_length (`int`): tokens that a text may have.
        chat (`bool`, *optional*): whether to use the chat template; if absent, whether the tokenizer has one.

    Raises:
        ValueError: if `chat` is true and there is no chat template.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, mask_token_id: int, max_length: int, chat: bool | None = None
    ):
        self.tokenizer, self.mask_token_id, self.max_length = tokenizer, mask_token_id, max_length
        self.chat = tokenizer.chat_template is not None if chat is None else chat
        if self.chat and tokenizer.chat_template is None:
            raise ValueError("`chat` needs a checkpoint with a chat template, and this one has none.")

    def encode(self, text: str, question: Question | Blank, name: str) -> ChoiceText:
        """The place of the answer to a question about `text`.

        Raises:
            ValueError: names the question, if the text is too long, the choices cannot be told apart from the text
                before them, or the chat template refuses the message.
        """
        return self._blank(text, question, name) if isinstance(question, Blank) else self._asked(text, question, name)

    def _asked(self, text: str, question: Question, name: str) -> ChoiceText:
        message, labels = question.message(text), question.labels
        if self.chat:
            try:
                prompt = self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": message}], add_generation_prompt=True, tokenize=False
                )
            except TemplateError as error:
                raise ValueError(f"The model's chat template refuses {name}: {error}.") from error
            before = self._ids(prompt)
        else:
            prompt, labels = f"{message}\nAnswer:", [f" {label}" for label in labels]
            before = self.tokenizer(prompt)["input_ids"]
        self._check_length(before, name)
        if self.mask_token_id in before:
            raise ValueError(f"{name} must not have a blank, [MASK], in its text: a `Blank` asks about blanks.")
        # Only the last line matters to the tokens of a label, and a text may be long.
        cut = prompt.rstrip("\n").rfind("\n") + 1
        tail = self._ids(prompt[cut:])
        if before[len(before) - len(tail) :] != tail:
            cut, tail = 0, self._ids(prompt)
        return ChoiceText(before, self._choices(prompt[cut:], tail, labels, name), name=name, labels=question.labels)

    def _blank(self, text: str, question: Blank, name: str) -> ChoiceText:
        lengths = blank_lengths(text)
        if not 0 <= question.index < len(lengths):
            raise ValueError(f"{name} asks about blank {question.index} of a text that has {len(lengths)}.")
        ids = encode_with_blanks(self.tokenizer, text, self.mask_token_id)
        self._check_length(ids, name)
        length, masks = lengths[question.index], [place for place, id in enumerate(ids) if id == self.mask_token_id]
        first = masks[list(accumulate([0, *lengths]))[question.index]]
        piece = cut_at_blanks(text)[question.index]
        choices = self._choices(piece, self._ids(piece.removesuffix(" ")), question.choices, name)
        for choice, tokens in zip(question.choices, choices, strict=True):
            if len(tokens) > length:
                raise ValueError(f"{name} has a blank of {length} tokens, and {choice!r} has {len(tokens)}.")
        return ChoiceText(ids[:first], choices, ids[first + length :], length, name, list(question.choices))

    def _choices(self, start: str, start_ids: list[int], choices: Sequence[str], name: str) -> list[list[int]]:
        """The tokens that each choice adds to those of `start`: tokenizers know no words, only whole texts."""
        added = []
        for choice in choices:
            ids = self._ids(start + choice)
            if ids[: len(start_ids)] != start_ids:
                raise ValueError(
                    f"{name} has a choice whose first token would be one with the end of the text before it, "
                    f"{choice!r} after {start[-20:]!r}: begin the choice with a space, or end the text otherwise."
                )
            added.append(ids[len(start_ids) :])
        return added

    def _check_length(self, ids: list[int], name: str):
        if len(ids) > self.max_length:
            raise ValueError(f"{name} takes {len(ids)} tokens, and there is room for {self.max_length}.")

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def decide(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str],
    questions: Sequence[Question | Blank],
    *,
    chat: bool | None = None,
    batch_size: int = 32,
) -> list[Decision] | list[list[Decision]]:
    """How probable each possible answer to each question about a text is. Nothing is written.

    A question in words ([`Predicate`], [`Choice`], [`Score`]) is put to the model as a message with the text, the
    question and its options, and answered by a label of each option: Yes or No, a letter, a digit. The labels' tokens
    are those that the tokenizer gives them after the prompt. A [`Blank`] is a place in the text itself. The
    probabilities are those of [`choice_probabilities`]: the model's own, among the choices. They are not calibrated
    and depend on the wording; the `label_mass` says how probable it is that the model answers with one of the choices
    at all.

    All questions about all texts are rows of the same forward passes, and no answer depends on another: asked alone,
    each has the same probabilities. Blanks of one text are one row.

    Args:
        model: a masked diffusion model in evaluation mode.
        tokenizer: of the model.
        text (`str` or `Sequence[str]`): what the questions are about, or several such texts, each of which is asked
            all the questions.
        questions: at least one.
        chat (`bool`, *optional*): whether to use the chat template; if absent, whether the tokenizer has one. Without
            it a question is a plain text that ends with "Answer:".
        batch_size: rows in a forward. It changes speed and memory only.

    Returns:
        `list[Decision]`: in the order of the questions; for several texts, a list of these.

    Raises:
        ValueError: before the first forward, for no questions; choices that are too few or too many, empty or the same
            twice; a choice whose tokens cannot be told apart from the text before it; and as
            [`choice_probabilities`].
    """
    check_count("batch_size", batch_size)
    texts = [text] if isinstance(text, str) else list(text)
    if not questions:
        raise ValueError("`questions` must be at least one, got none.")
    encoder = QuestionEncoder(tokenizer, model.config.mask_token_id, model.config.max_position_embeddings, chat)
    places = [
        encoder.encode(each, question, f"`questions[{index}]`")
        for each in texts
        for index, question in enumerate(questions)
    ]
    reader = ChoiceReader(model, places)
    for indices in reader.batches(batch_size):
        reader.read(indices)
    decisions = reader.decisions()
    if isinstance(text, str):
        return decisions
    return [decisions[first : first + len(questions)] for first in range(0, len(decisions), len(questions))]
