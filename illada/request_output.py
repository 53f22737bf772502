"""What a request of a batch gives: results in the form of Transformers' continuous batching."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from .engine import Request


@dataclass
class RequestOutput(GenerationOutput):
    """Transformers' `GenerationOutput`, and what is known of a finished request here.

    Attributes:
        num_forward_passes (`int`): forward passes in which the text took part; a guided pass counts once.
        tokens_per_forward (`float`): tokens that were written for it, blanks and EOS included, per forward pass.
        exception (`Exception`, *optional*): what made the request fail; `error` is its name and message.
    """

    num_forward_passes: int = 0
    tokens_per_forward: float = 0.0
    exception: Exception | None = None


@dataclass(eq=False)
class Ticket:
    """A request under its id, and what its results are made of. It is the streamer of its request."""

    request_id: str
    deliver: Callable[[RequestOutput], None]
    output: RequestOutput
    is_streaming: bool
    timestamps: list[float] | None
    return_logprobs: bool
    request: Request

    def put(self, tokens: torch.LongTensor):
        """Called with the prompt, and then with each piece that will not change any more."""
        if tokens.ndim == 2:
            return
        now = time.perf_counter()
        self.output.generated_tokens += tokens.tolist()
        if self.timestamps is not None:
            self.timestamps += [now] * len(tokens)
        if self.is_streaming:
            tokens = list(self.output.generated_tokens)
            self.deliver(replace(self.output, generated_tokens=tokens, status=RequestStatus.DECODING))

    def end(self):
        pass

    def finish(self, request: Request):
        """Delivers the last result: the text, or what made the request fail."""
        output = self.output
        output.lifespan = (output.lifespan[0], time.perf_counter())
        output.timestamps = self.timestamps
        if request.error is not None:
            output.error, output.status = f"{type(request.error).__name__}: {request.error}", RequestStatus.FAILED
            output.exception = request.error
        else:
            prompt_length, result = len(request.prompt), request.result
            output.prompt_ids = result.tokens[:prompt_length].tolist()
            output.generated_tokens = result.tokens[prompt_length:].tolist()
            output.num_forward_passes = result.num_forward_passes
            output.tokens_per_forward = int((~result.given).sum()) / max(result.num_forward_passes, 1)
            if self.return_logprobs:
                output.logprobs = result.commit_confidences[prompt_length:].log().tolist()
            output.status = RequestStatus.FINISHED
        self.deliver(output)
