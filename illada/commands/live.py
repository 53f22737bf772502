"""Denoising shown live on a terminal: settled text plain, drafts in colour, what is not yet predicted as blocks."""

import sys
import time
from itertools import groupby

import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ..denoising import DenoisingStep
from ..generation import MaskedDiffusionGenerationOutput

DRAFT_STYLE, COMMITTED_STYLE = "dim yellow", "bold green"
STYLES = ("", DRAFT_STYLE, COMMITTED_STYLE)


class LiveDenoising:
    """A context manager whose instance is `generate`'s `on_step` for one prompt.

    Settled tokens are plain, those that the last step committed are green, current guesses of masked positions are
    yellow. Of a text that is taller than the terminal the end is shown. The picture is removed on exit, for the caller
    to print the settled text.

    Args:
        prompt_length (`int`): in tokens.
        eos_token_ids (`list[int]`): the first of them after the prompt ends what is shown.
        pause (`float`): seconds to wait after each step.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt_length: int, eos_token_ids: list[int], pause: float = 0.0
    ):
        self.tokenizer, self.prompt_length = tokenizer, prompt_length
        self.eos_token_ids, self.pause = set(eos_token_ids), pause
        self.console = Console()
        # What goes to a file must not be drawn on the terminal.
        redirect_stderr = sys.stderr.isatty()
        self.live = Live(console=self.console, transient=True, auto_refresh=False, redirect_stderr=redirect_stderr)

    def __enter__(self):
        self.live.__enter__()
        return self

    def __exit__(self, *exception):
        self.live.__exit__(*exception)

    def __call__(self, step: DenoisingStep):
        self.live.update(self._fit(self.render(step)), refresh=True)
        time.sleep(self.pause)

    def _fit(self, text: Text) -> Text:
        """The last lines of the text, as many as the terminal has room for."""
        lines = text.wrap(self.console, self.console.width)
        return Text("\n").join(lines[-max(1, self.console.height - 1) :])

    def render(self, step: DenoisingStep) -> Text:
        """The response so far (the whole text where blanks of the prompt are filled), up to its first EOS."""
        shown = step.tokens.clone()
        shown[step.columns] = step.proposals
        style = torch.zeros_like(shown)
        style[step.columns] = (step.confidence.isfinite() & ~step.committed) + 2 * step.committed
        tokens, styles = shown.tolist(), style.tolist()
        start = 0 if step.columns[0] < self.prompt_length else self.prompt_length
        eos = (column for column in range(self.prompt_length, len(tokens)) if tokens[column] in self.eos_token_ids)
        end = next(eos, len(tokens))
        text = Text()
        for index, run in groupby(range(start, end), key=styles.__getitem__):
            ids = [tokens[column] for column in run]
            text.append(self.tokenizer.decode(ids, skip_special_tokens=True), style=STYLES[index])
        return text


def run_generate(
    model, tokenizer: PreTrainedTokenizerBase, input_ids: list[int], pause: float | None, **settings
) -> MaskedDiffusionGenerationOutput:
    """What `model.generate` returns for one prompt and these settings.

    Args:
        pause (`float`, *optional*): seconds to wait after each step that is shown; nothing is shown if absent.
    """
    prompt = torch.tensor([input_ids], device=model.device)
    settings = {"tokenizer": tokenizer, "return_dict_in_generate": True, **settings}
    if pause is None:
        return model.generate(prompt, **settings)
    with LiveDenoising(tokenizer, len(input_ids), model.generation_config.eos_token_ids, pause) as show:
        return model.generate(prompt, on_step=show, **settings)
