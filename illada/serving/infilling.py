"""`/v1/infill`: a text with blanks in; the filled text, and what was written into each blank, out."""

import asyncio
import time

from fastapi import APIRouter, Request

from ..engine import RequestResult
from ..text.blanks import blank_lengths, encode_with_blanks, fill_blanks
from .answers import Usage
from .errors import ApiError
from .fields import Text, WritingFields
from .prompts import Prompt
from .service import Service
from .worker import TextRequest


class InfillBody(WritingFields):
    """The body of `POST /v1/infill`: `text` has blanks, `<[MASK]>` of one token or `<[MASK]*4>` of four."""

    text: Text


def routes(service: Service) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.post("/v1/infill")
    async def infill(body: InfillBody, http: Request) -> dict:
        service.check_model(body.model)
        prompt, request = await service.encode(_compose, service, body)
        result = await service.until_gone(http, asyncio.create_task(service.write(request)))
        answer = await service.encode(_filled, service, body.text, prompt.input_ids, result)
        head = {"id": f"infill-{http.state.request_id}", "object": "infill", "created": int(time.time())}
        return {**head, "model": service.name, **answer}

    return router


def _compose(service: Service, body: InfillBody) -> tuple[Prompt, TextRequest]:
    composer = service.composer
    try:
        input_ids = encode_with_blanks(service.tokenizer, body.text, composer.encoder.mask_token_id)
    except ValueError as error:
        raise ApiError(400, str(error), "text") from error
    composer.encoder.check_length(len(input_ids), "text")
    prompt = Prompt(input_ids, 0, max_new_tokens=0)
    [request] = composer.prepare(prompt, composer.settings(body) | {"max_new_tokens": 0})
    return prompt, request


def _filled(service: Service, text: str, input_ids: list[int], result: RequestResult) -> dict:
    """The filled text, its blanks in order, and the usage."""
    tokenizer, mask_token_id = service.tokenizer, service.composer.encoder.mask_token_id
    tokens = result.tokens.tolist()
    written = [
        {
            "id": tokens[position],
            "text": tokenizer.decode(tokens[position]),
            "position": position,
            "confidence": result.commit_confidences[position].item(),
            "step": result.commit_steps[position].item(),
        }
        for position in (~result.given).nonzero().squeeze(-1).tolist()
    ]
    blanks, start = [], 0
    for length in blank_lengths(text):
        own = written[start : start + length]
        start += length
        filled = tokenizer.decode([token["id"] for token in own], skip_special_tokens=True)
        blanks.append({"text": filled, "tokens": own})
    usage = Usage(len(input_ids), len(written), result.num_forward_passes)
    service.metrics.count_answer(usage.prompt_tokens, usage.completion_tokens, usage.forward_passes)
    filled = fill_blanks(tokenizer, text, input_ids, tokens, mask_token_id)
    return {"text": filled, "blanks": blanks, "usage": usage.as_json()}
