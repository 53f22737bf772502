"""`/v1/revise`: a finished text in, of which the tokens that are least likely in their context are written again."""

import asyncio
import time

import torch
from fastapi import APIRouter, Request

from ..revision import check_revision, least_likely, leave_one_out_confidences
from .answers import Usage
from .errors import ApiError, from_value_error
from .fields import Text, WritingFields
from .prompts import Prompt
from .service import Service


class ReviseBody(WritingFields):
    """The body of `POST /v1/revise`; the fields mean what the arguments of `revise` do."""

    text: Text
    fraction: float | int | None = None
    threshold: float | int | None = None
    num_rounds: int = 1
    num_scoring_passes: int | None = None


MAX_ROUNDS = 32


def routes(service: Service) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.post("/v1/revise")
    async def revise(body: ReviseBody, http: Request) -> dict:
        service.check_model(body.model)
        revision = Revision(service, body)
        await service.encode(revision.prepare)
        await service.until_gone(http, asyncio.create_task(revision.run()))
        head = {"id": f"revise-{http.state.request_id}", "object": "revision", "created": int(time.time())}
        return {**head, "model": service.name, **await service.encode(revision.as_json)}

    return router


class Revision:
    """What `revise` does, in forward passes of one each, so that others are written between them."""

    def __init__(self, service: Service, body: ReviseBody):
        self.service, self.body, self.model = service, body, service.worker.model
        self.num_passes = self.num_rounds = 0

    def prepare(self):
        """Encodes the text, and checks what was asked.

        Raises:
            ApiError: names the field that cannot be honoured.
        """
        body, composer = self.body, self.service.composer
        config, encoder = composer.generation_config, composer.encoder
        try:
            check_revision(body.fraction, body.threshold, body.num_rounds, body.num_scoring_passes)
        except ValueError as error:
            raise from_value_error(error) from error
        if body.num_rounds > MAX_ROUNDS:
            raise ApiError(400, f"`num_rounds` must be at most {MAX_ROUNDS}, got {body.num_rounds}.", "num_rounds")
        input_ids = self.service.tokenizer(body.text)["input_ids"]
        if config.mask_token_id in input_ids:
            raise ApiError(400, "`text` must be finished, got a blank: /v1/infill fills blanks.", "text")
        encoder.check_length(len(input_ids), "text")
        self.settings = composer.settings(body) | {"max_new_tokens": 0, "min_new_tokens": None}
        self.tokens = self.original = torch.tensor(input_ids, dtype=torch.long)
        special = {config.bos_token_id, config.pad_token_id, *config.eos_token_ids}
        self.asked = torch.tensor([token not in special for token in input_ids], dtype=torch.bool)
        if not self.asked.any():
            raise ApiError(400, f"`text` must have some text, got {body.text!r}.", "text")
        nothing_known = torch.full_like(self.tokens, config.mask_token_id)
        composer.prepare(_prompt(nothing_known), self.settings)  # a wrong setting is said before any pass

    async def run(self):
        """Scores and rewrites, round by round, until nothing changes."""
        for number in range(self.body.num_rounds):
            self.num_rounds += 1
            confidences = await self._confidences()
            if number == 0:
                self.confidences = confidences
            remasked = least_likely(confidences[None], self.body.fraction, self.body.threshold)[0]
            if not remasked.any():
                return
            masked = self.tokens.masked_fill(remasked, self.service.composer.encoder.mask_token_id)
            [request] = self.service.composer.prepare(_prompt(masked), self.settings)
            result = await self.service.write(request)
            self.num_passes += result.num_forward_passes
            if torch.equal(result.tokens, self.tokens):
                return
            self.tokens = result.tokens

    async def _confidences(self) -> torch.Tensor:
        """(S,): how likely each token is given all others; a pass at a time."""
        count = int(self.asked.sum())
        num_passes = min(self.body.num_scoring_passes or count, count)
        rank = self.asked.cumsum(-1) - 1
        confidences = torch.full(self.tokens.shape, torch.nan)
        for index in range(num_passes):
            masked = self.asked & (rank % num_passes == index)
            confidences[masked] = (await self.service.ask_model(self._score, masked))[masked]
        self.num_passes += num_passes
        return confidences

    def _score(self, masked: torch.BoolTensor) -> torch.Tensor:
        device = self.model._execution_device
        tokens, masked = self.tokens[None].to(device), masked[None].to(device)
        mask_token_id = self.service.composer.encoder.mask_token_id
        everywhere = torch.ones_like(masked)
        return leave_one_out_confidences(self.model, tokens, everywhere, masked, mask_token_id, num_passes=1)[0].cpu()

    def as_json(self) -> dict:
        """The revised text, each token with its confidence before the first round, and the usage."""
        tokenizer = self.service.tokenizer
        changed = self.tokens != self.original
        tokens = [
            {
                "position": position,
                "from": tokenizer.decode(self.original[position]),
                "to": tokenizer.decode(self.tokens[position]),
                "confidence": self.confidences[position].item(),
                "is_changed": changed[position].item(),
            }
            for position in self.asked.nonzero().squeeze(-1).tolist()
        ]
        usage = Usage(len(self.original), int(changed.sum()), self.num_passes)
        self.service.metrics.count_answer(usage.prompt_tokens, usage.completion_tokens, usage.forward_passes)
        text = tokenizer.decode(self.tokens, skip_special_tokens=True)
        return {"text": text, "tokens": tokens, "num_rounds": self.num_rounds, "usage": usage.as_json()}


def _prompt(tokens: torch.LongTensor) -> Prompt:
    return Prompt(tokens.tolist(), 0, max_new_tokens=0)
