"""Denoising shown live on a terminal: settled text plain, drafts in colour, what is not yet predicted as blocks."""

import sys
from itertools import groupby

import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ..denoising import DenoisingStep
from ..generation import MaskedDiffusionGenerationOutput

DRAFT_STYLE, COMMITTED_STYLE = "dim yellow", "bold green"


class LiveDenoising:
    """A context manager whose instance is `generate`'s `on_step` for one prompt.

    Settled tokens are plain, those that the last step committed are green, current guesses of masked positions are
    yellow. The picture is removed on exit, for the caller to print the settled text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_length: int, eos_token_ids: list[int]):
        self.tokenizer, self.prompt_length = tokenizer, prompt_length
        self.eos_token_ids = eos_token_ids
        self.live = Live(console=Console(), transient=True, auto_refresh=False)

    def __enter__(self):
        self.live.__enter__()
        return self

    def __exit__(self, *exception):
        self.live.__exit__(*exception)

    def __call__(self, step: DenoisingStep):
        self.live.update(self.render(step), refresh=True)

    def render(self, step: DenoisingStep) -> Text:
        """The response so far (the whole text where blanks of the prompt are filled), up to its first EOS."""
        tokens = step.tokens[0].clone()
        styles = [""] * len(tokens)
        undecided = (step.confidence[0].isfinite() & ~step.committed[0]).nonzero().squeeze(-1) + step.start
        for column in undecided.tolist():
            styles[column] = DRAFT_STYLE
        for column in (step.committed[0].nonzero().squeeze(-1) + step.start).tolist():
            styles[column] = COMMITTED_STYLE
        tokens[step.start : step.end] = step.proposals[0]
        start = 0 if step.start < self.prompt_length else self.prompt_length
        is_eos = torch.isin(tokens, torch.tensor(self.eos_token_ids, dtype=torch.long, device=tokens.device))
        after_prompt = is_eos[self.prompt_length :].nonzero()
        end = self.prompt_length + int(after_prompt[0]) if len(after_prompt) else len(tokens)
        text = Text()
        for style, run in groupby(range(start, end), key=styles.__getitem__):
            text.append(self.tokenizer.decode(tokens[list(run)], skip_special_tokens=True), style=style)
        return text


def is_live(asked: bool | None) -> bool:
    """Whether to show the denoising: what was asked, else whether standard output is a terminal."""
    return sys.stdout.isatty() if asked is None else asked


def run_generate(
    model, tokenizer: PreTrainedTokenizerBase, input_ids: list[int], live: bool, **settings
) -> MaskedDiffusionGenerationOutput:
    """What `model.generate` returns for one prompt and these settings; the denoising is shown, if asked."""
    prompt = torch.tensor([input_ids], device=model.device)
    settings = {"tokenizer": tokenizer, "return_dict_in_generate": True, **settings}
    if not live:
        return model.generate(prompt, **settings)
    with LiveDenoising(tokenizer, len(input_ids), model.generation_config.eos_token_ids) as show:
        return model.generate(prompt, on_step=show, **settings)
