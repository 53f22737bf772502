"""`/v1/decisions`: questions about a text in, the probability of each possible answer out, in OpenAI's form."""

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from pydantic import Field, StrictBool

from ..evaluation import decisions
from ..evaluation.choices import ChoiceReader, ChoiceText, Decision
from .errors import ApiError
from .fields import MAX_ITEMS, Body, Text, unsupported
from .service import Service

NonEmpty = Annotated[Text, Field(min_length=1)]
MAX_ROWS = 1024
"""Texts that the model may be asked to read for one request; a choice takes at most one for each of its tokens."""


class InputText(Body):
    type: Literal["input_text"]
    text: Text
    prompt_cache_breakpoint: unsupported() = None


class InputMessage(Body):
    role: Literal["user"]
    content: Text | Annotated[list[InputText], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
    type: Literal["message"] = "message"

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class AskedBody(Body):
    """What all questions have in common."""

    name: Text | None = None

    def answer(self, decision: Decision) -> dict:
        return {"type": self.type, "name": self.name, **self.own(decision), "label_mass": decision.label_mass}


class PredicateBody(AskedBody):
    type: Literal["predicate"]
    instructions: NonEmpty

    def question(self) -> decisions.Predicate:
        return decisions.Predicate(self.instructions)

    def own(self, decision: Decision) -> dict:
        return {"probability": decision.probabilities[0]}


class ChoiceOption(Body):
    value: Text | StrictBool
    description: Text = ""

    @property
    def text(self) -> str:
        return self.value if isinstance(self.value, str) else str(self.value).lower()


class ChoosingBody(AskedBody):
    """A question whose answer is one of its choices."""

    choices: Annotated[list[ChoiceOption], Field(max_length=255, fail_fast=True)]

    def own(self, decision: Decision) -> dict:
        values = [choice.value for choice in self.choices]
        probabilities = zip(values, decision.probabilities, strict=True)
        return {
            "choice": values[decision.best],
            "probabilities": [{"value": value, "probability": probability} for value, probability in probabilities],
            "confidence": decision.confidence,
        }


class ChoiceBody(ChoosingBody):
    type: Literal["choice"]
    instructions: NonEmpty

    def question(self) -> decisions.Choice:
        descriptions = [choice.description for choice in self.choices]
        return decisions.Choice(self.instructions, [choice.text for choice in self.choices], descriptions)


class BlankBody(ChoosingBody):
    """Not OpenAI's: what stands in a blank of the input."""

    type: Literal["blank"]
    index: int = Field(0, ge=0, lt=2**31)

    def question(self) -> decisions.Blank:
        return decisions.Blank([choice.text for choice in self.choices], self.index)


class ScoreLevel(Body):
    label: Text
    description: Text = ""


class ScoreBody(AskedBody):
    type: Literal["score"]
    instructions: NonEmpty
    levels: Annotated[list[ScoreLevel], Field(max_length=MAX_ITEMS, fail_fast=True)]

    def question(self) -> decisions.Score:
        descriptions = [level.description for level in self.levels]
        return decisions.Score(self.instructions, [level.label for level in self.levels], descriptions)

    def own(self, decision: Decision) -> dict:
        levels = zip(self.levels, decision.probabilities, strict=True)
        return {
            "score": decision.score,
            "probabilities": [
                {"value": value, "label": level.label, "probability": probability}
                for value, (level, probability) in enumerate(levels)
            ],
            "confidence": decision.confidence,
        }


class DecisionBody(Body):
    """The body of `POST /v1/decisions`."""

    model: str | None = None
    input: Text | Annotated[list[InputMessage], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
    questions: Annotated[
        list[Annotated[PredicateBody | ChoiceBody | ScoreBody | BlankBody, Field(discriminator="type")]],
        Field(min_length=1, max_length=64),
    ]
    safety_identifier: str | None = None  # an end user's name, which has no meaning here
    user: str | None = None
    prompt_cache_key: unsupported() = None
    prompt_cache_options: unsupported() = None

    @property
    def text(self) -> str:
        return self.input if isinstance(self.input, str) else "\n\n".join(message.text for message in self.input)


def routes(service: Service) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.post("/v1/decisions")
    async def decide(body: DecisionBody, http: Request) -> dict:
        service.check_model(body.model)
        reader = await service.encode(_lay_out, service, body)
        await service.until_gone(http, asyncio.create_task(_read(service, reader)))
        answers = [
            question.answer(decision) for question, decision in zip(body.questions, reader.decisions(), strict=True)
        ]
        num_tokens = sum(len(text.tokens) for text in reader.texts)
        service.metrics.count_answer(num_tokens, 0, 0)
        usage = {
            "input_tokens": num_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": num_tokens,
        }
        return {"model": service.name, "answers": answers, "usage": usage}

    return router


def _lay_out(service: Service, body: DecisionBody) -> ChoiceReader:
    encoder, places = service.composer.encoder, []
    if not body.text.strip():
        raise ApiError(400, f"`input` must have some text, got {body.text!r}.", "input")
    encoder.check_length(len(service.tokenizer(body.text)["input_ids"]), "input")
    asker = decisions.QuestionEncoder(service.tokenizer, encoder.mask_token_id, encoder.num_positions)
    try:
        for index, question in enumerate(body.questions):
            places.append(_place(asker, body.text, question, f"`questions.{index}`"))
        num_rows = sum(len(choice) for place in places for choice in place.choices if len(choice) > 1)
        if num_rows > MAX_ROWS:
            raise ValueError(f"`questions` must have at most {MAX_ROWS} tokens in choices of several, got {num_rows}.")
        return ChoiceReader(service.worker.model, places)
    except ValueError as error:
        raise ApiError(400, str(error), "questions") from error


def _place(asker: decisions.QuestionEncoder, text: str, question: AskedBody, name: str) -> ChoiceText:
    try:
        asked = question.question()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return asker.encode(text, asked, name)


async def _read(service: Service, reader: ChoiceReader):
    """Asks the model in passes no larger than those in which it writes, so that others are written in between."""
    worker = service.worker
    longest = max(len(text.tokens) for text in reader.texts)
    rows = worker.max_rows if worker.max_tokens is None else min(worker.max_rows, worker.max_tokens // longest)
    for indices in reader.batches(max(rows, 1)):
        await service.ask_model(reader.read, indices)
