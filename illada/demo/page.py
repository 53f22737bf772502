"""The page: what is on it, and what its buttons do."""

import html
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import gradio as gr
import torch
from transformers import PreTrainedTokenizerBase

from ..denoising import DenoisingStep
from ..generation_config import CANVASES, PARALLEL_RULES, PRESETS
from ..remasking import RANKINGS
from ..text.blanks import encode_with_blanks
from ..text.prompts import encode_prompt
from ..text.trace import trace_tokens
from . import examples
from .picture import CSS, denoising_html
from .playing import LiveTokens, hide_after, steps_and_output

__all__ = ["CSS", "THEME", "build_page"]

THEME = gr.themes.Default(
    primary_hue="violet",
    secondary_hue="violet",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],  # of the visitor's machine: nothing is fetched
    font_mono=["ui-monospace", "monospace"],
)

RULE_RANGES = {"confidence_threshold": (1.0, 0.9), "confidence_factor": (4.0, 1.0), "entropy_bound": (4.0, 0.5)}
"""The largest value on the slider of each parallel rule, and the one that it begins with."""

AS_PRESET = "as the preset"


@contextmanager
def _errors_on_the_page():
    """Shows an error as one sentence on the page; one that is not the visitor's also leaves a traceback in the log."""
    try:
        yield
    except ValueError as error:
        gr.Warning(html.escape(" ".join(str(error).split())), title="That does not work")
    except Exception as error:
        raise gr.Error(html.escape(" ".join(str(error).split()) or type(error).__name__)) from error


class Settings:
    """The controls of the denoising, and the arguments of `generate` that they stand for."""

    def __init__(self, model):
        """Places the controls of speed; `place_others` places the rest."""
        self.device = model.device
        with gr.Row():
            self.preset = gr.Radio(list(PRESETS), value="exact", label="Preset, which the others override")
            self.pause = gr.Slider(0, 1, 0.1, step=0.05, label="Pause, in seconds", elem_id="pause")
        with gr.Row():
            self.rule = gr.Dropdown(
                [AS_PRESET, *PARALLEL_RULES], value=AS_PRESET, label="Rule to commit several a pass"
            )
            self.rule_value = gr.Slider(0, 1, 0.9, step=0.01, label="Value of the rule", elem_id="rule-value")
        self.steps = gr.Slider(0, 128, 0, step=1, label="Steps per block (0: as the preset)", elem_id="steps")
        self.rule.input(self._rule_slider, self.rule, self.rule_value)

    def place_others(self, model):
        own, positions = model.generation_config, model.config.max_position_embeddings
        block_length = own.block_length or 32
        with gr.Row():
            self.canvas = gr.Radio(
                list(CANVASES), value=own.canvas or model.default_canvas, label="Canvas of an answer"
            )
            self.remasking = gr.Dropdown(
                list(RANKINGS), value=own.remasking or "low_confidence", label="Ranking of the masked positions"
            )
            self.seed = gr.Number(0, precision=0, label="Seed")
        with gr.Row():
            self.block_length = gr.Slider(
                1, max(128, block_length), block_length, step=1, label="Block length, in tokens"
            )
            self.max_new_tokens = gr.Slider(
                1, positions, own.max_new_tokens or 128, step=1, label="Longest answer, in tokens", elem_id="budget"
            )
            self.temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature (0: greedy)")

    @staticmethod
    def _rule_slider(rule: str):
        maximum, value = RULE_RANGES.get(rule, (1.0, 0.9))
        return gr.Slider(maximum=maximum, value=value)

    @property
    def components(self) -> set:
        return {component for component in vars(self).values() if isinstance(component, gr.components.Component)}

    def arguments(self, values: dict) -> dict:
        """Those of every denoising, from the components' values."""
        temperature, rule, steps = values[self.temperature], values[self.rule], values[self.steps]
        arguments = {
            "preset": values[self.preset],
            "block_length": values[self.block_length],
            "remasking": values[self.remasking],
            "generator": torch.Generator(self.device).manual_seed(values[self.seed] or 0),
            "do_sample": temperature > 0,
        }
        if temperature > 0:
            arguments["temperature"] = temperature
        if steps > 0:
            arguments["max_denoising_steps"] = steps
        if rule != AS_PRESET:
            arguments[rule] = values[self.rule_value]
        return arguments

    def answer_arguments(self, values: dict) -> dict:
        """Those of an answer, which has a canvas and a length."""
        answer = {"canvas": values[self.canvas], "max_new_tokens": values[self.max_new_tokens]}
        return self.arguments(values) | answer


class Page:
    """The components, and the functions behind them; `blocks` is what Gradio serves."""

    def __init__(self, model, tokenizer: PreTrainedTokenizerBase, name: str, is_embedded: bool):
        self.model, self.tokenizer = model, tokenizer
        with gr.Blocks(title="illada", analytics_enabled=False) as self.blocks:
            gr.HTML(_header(model, name, is_embedded))
            with gr.Row():
                with gr.Column(min_width=400), gr.Tabs():
                    with gr.Tab("Chat"):
                        self._build_chat(is_embedded)
                    with gr.Tab("Fill in the blanks"):
                        self._build_filling(is_embedded)
                    with gr.Tab("Revise"):
                        self._build_revision(is_embedded)
                with gr.Column(min_width=400):
                    self._build_player()
                    self.settings = Settings(model)
            with gr.Accordion("More settings", open=False):
                self.settings.place_others(model)
            if is_embedded:
                with gr.Accordion("What the embedded model can do, measured", open=False):
                    gr.Markdown(examples.measured_accuracy())
            self._connect()
        self.blocks.queue(default_concurrency_limit=4)

    def _build_chat(self, is_embedded: bool):
        self.chatbot = gr.Chatbot(
            height=200, show_label=False, render_markdown=False, feedback_options=None, buttons=[], elem_id="chatbot"
        )
        self.conversation = gr.State([])
        self.message = gr.Textbox(show_label=False, placeholder="Type a message", submit_btn=True, elem_id="message")
        if is_embedded:
            gr.Examples(examples.prompts(), self.message, label="Messages that training never saw")
        # The embedded model has learnt single questions and answers.
        self.remember = gr.Checkbox(not is_embedded, label="Send the conversation so far with each message")

    def _build_filling(self, is_embedded: bool):
        texts = examples.texts_with_blanks(self.tokenizer) if is_embedded else []
        self.blank_text = gr.Textbox(
            texts[0] if texts else "",
            label="Text with blanks: <[MASK]> is one token, <[MASK]*4> four",
            lines=2,
            elem_id="blank-text",
        )
        self.selection = gr.State(None)
        with gr.Row():
            self.blank_out = gr.Button("Blank the selection", elem_id="blank-out")
            self.fill = gr.Button("Fill the blanks", variant="primary", elem_id="fill")
        self.filled_text = gr.Textbox(label="Filled", interactive=False, buttons=["copy"], elem_id="filled-text")
        if is_embedded:
            gr.Examples(texts, self.blank_text, label="Texts that training never saw")

    def _build_revision(self, is_embedded: bool):
        texts = examples.spoiled_texts() if is_embedded else []
        self.finished_text = gr.Textbox(
            texts[0] if texts else "", label="Finished text: edit it as you like", lines=2, elem_id="finished-text"
        )
        with gr.Row():
            self.threshold = gr.Slider(
                0, 1, 0.02, step=0.01, label="Rewrite what is less likely than", elem_id="revise-threshold"
            )
            self.rounds = gr.Slider(1, 5, 1, step=1, label="Rounds")
        self.revise = gr.Button("Revise", variant="primary", elem_id="revise")
        self.revised_text = gr.Textbox(label="Revised", interactive=False, buttons=["copy"], elem_id="revised-text")
        if is_embedded:
            gr.Examples(texts, self.finished_text, label="Texts that training never saw, with one number made wrong")

    def _build_player(self):
        self.picture = gr.HTML(denoising_html([], 0, 0))
        self.step = gr.Slider(0, 1, 0, step=1, label="Forward pass", elem_id="forward-pass")
        with gr.Row():
            self.again = gr.Button("Play again", size="sm", elem_id="again")
            self.stop = gr.Button("Stop", size="sm", elem_id="stop")
        self.record = gr.State(([], 0))  # the last text's tokens, and its number of forward passes

    def _connect(self):
        player = [self.picture, self.step, self.record]
        settings = self.settings.components
        runs = [
            self.message.submit(
                self._answer,
                {self.message, self.conversation, self.remember, *settings},
                [self.chatbot, self.conversation, self.message, *player],
                show_progress="hidden",
            ),
            self.fill.click(
                self._fill, {self.blank_text, *settings}, [self.filled_text, *player], show_progress="hidden"
            ),
            self.revise.click(
                self._revise,
                {self.finished_text, self.threshold, self.rounds, *settings},
                [self.revised_text, *player],
                show_progress="hidden",
            ),
            self.again.click(
                self._replay, [self.record, self.settings.pause], [self.picture, self.step], show_progress="hidden"
            ),
        ]
        self.stop.click(None, cancels=runs)
        self.step.release(self._show, [self.record, self.step], self.picture, show_progress="hidden")
        self.chatbot.clear(list, None, self.conversation)
        self.blank_text.select(_selection, None, self.selection, show_progress="hidden")
        self.blank_out.click(
            self._blank_out, [self.blank_text, self.selection], self.blank_text, show_progress="hidden"
        )

    def _answer(self, values: dict) -> Iterator[dict]:
        with _errors_on_the_page():
            if not (message := values[self.message].strip()):
                raise ValueError("The message must hold some text.")
            conversation = [*values[self.conversation], {"role": "user", "content": message}]
            input_ids = encode_prompt(self.tokenizer, conversation if values[self.remember] else conversation[-1:])
            live = LiveTokens(self.tokenizer, self.model.generation_config.mask_token_id, len(input_ids))

            def show(tokens: list[dict]) -> dict:
                draft = "".join(token["text"] if token["step"] else "░" for token in tokens)
                return {self.message: "", self.chatbot: [*conversation, {"role": "assistant", "content": draft}]}

            arguments = self.settings.answer_arguments(values)
            output = yield from self._denoise(self.model.generate, input_ids, live, show, values, arguments)
            answer = self.tokenizer.decode(output.sequences[0, len(input_ids) :], skip_special_tokens=True).strip()
            conversation.append({"role": "assistant", "content": answer})
            tokens = trace_tokens(self.tokenizer, output, len(input_ids))
            shown = {self.message: "", self.chatbot: conversation, self.conversation: conversation}
            yield shown | self._finished(tokens, int(output.num_forward_passes[0]))

    def _fill(self, values: dict) -> Iterator[dict]:
        with _errors_on_the_page():
            mask_token_id = self.model.generation_config.mask_token_id
            input_ids = encode_with_blanks(self.tokenizer, values[self.blank_text], mask_token_id)
            live = LiveTokens(self.tokenizer, mask_token_id, self._first_column(input_ids))
            arguments = {**self.settings.arguments(values), "max_new_tokens": 0}
            output = yield from self._denoise(self.model.generate, input_ids, live, _nothing_more, values, arguments)
            tokens = trace_tokens(self.tokenizer, output, live.first_column)
            text = self.tokenizer.decode(output.sequences[0], skip_special_tokens=True)
            yield {self.filled_text: text} | self._finished(tokens, int(output.num_forward_passes[0]))

    def _revise(self, values: dict) -> Iterator[dict]:
        with _errors_on_the_page():
            if not values[self.finished_text].strip():
                raise ValueError("The text must hold something to revise.")
            input_ids = self.tokenizer(values[self.finished_text])["input_ids"]
            live = LiveTokens(
                self.tokenizer, self.model.generation_config.mask_token_id, self._first_column(input_ids)
            )
            choice = {"threshold": values[self.threshold], "num_rounds": values[self.rounds]}
            arguments = self.settings.arguments(values) | choice
            output = yield from self._denoise(self.model.revise, input_ids, live, _nothing_more, values, arguments)
            tokens = live.finished(output.sequences[0].tolist())
            for column, token in enumerate(tokens, start=live.first_column):
                if output.changed[0, column]:
                    token["was"] = self.tokenizer.decode(input_ids[column])
                if not token["step"] and not output.confidences[0, column].isnan():
                    token["confidence"] = float(output.confidences[0, column])
            text = self.tokenizer.decode(output.sequences[0], skip_special_tokens=True)
            yield {self.revised_text: text} | self._finished(tokens, live.num_steps)

    def _denoise(
        self, call: Callable, input_ids: list[int], live: LiveTokens, show: Callable, values: dict, arguments: dict
    ) -> Iterator[dict]:
        """Yields the picture and `show(tokens)` after each step; returns what `call` returns."""
        if call == self.model.generate:
            arguments = {**arguments, "return_dict_in_generate": True, "output_trace": True}
        inputs = torch.tensor([input_ids], device=self.model.device)
        for item in steps_and_output(call, input_ids=inputs, **arguments):
            if not isinstance(item, DenoisingStep):
                return item
            tokens = live(item)
            yield {self.picture: denoising_html(tokens, live.num_steps), **show(tokens)}
            time.sleep(values[self.settings.pause])

    def _finished(self, tokens: list[dict], num_passes: int) -> dict:
        return {
            self.picture: denoising_html(tokens, num_passes, num_passes),
            self.step: gr.Slider(maximum=max(num_passes, 1), value=num_passes),
            self.record: (tokens, num_passes),
        }

    def _show(self, record: tuple[list[dict], int], step: int) -> str:
        tokens, num_passes = record
        return denoising_html(hide_after(tokens, step), step, num_passes)

    def _replay(self, record: tuple[list[dict], int], pause: float) -> Iterator[tuple[str, int]]:
        for step in range(record[1] + 1):
            yield self._show(record, step), step
            time.sleep(pause)

    def _first_column(self, input_ids: list[int]) -> int:
        """Where a text begins to be shown: after its BOS."""
        return int(input_ids[0] == self.tokenizer.bos_token_id)

    def _blank_out(self, text: str, selection: tuple[int, int, str] | None) -> str:
        """The text with a blank in place of the selected passage, of as many tokens as it has."""
        with _errors_on_the_page():
            start, end, passage = selection or (0, 0, "")
            if not passage.strip() or text[start:end] != passage:
                raise ValueError("Select a passage of the text first: it becomes a blank.")
            start -= text[:start].endswith(" ")  # a token begins with its space
            blank = examples.blank(self.tokenizer, text[start:end].rstrip())
            space = " " * (len(passage) - len(passage.rstrip()))
            return f"{text[:start]}{blank}{space}{text[end:]}"
        return text


def _nothing_more(tokens: list[dict]) -> dict:
    return {}


def _selection(event: gr.SelectData) -> tuple[int, int, str]:
    start, end = event.index
    return start, end, event.value


def _header(model, name: str, is_embedded: bool) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = f"{parameters / 1e9:.1f} billion" if parameters >= 1e9 else f"{parameters / 1e6:.2f} million"
    about = f"<b>{html.escape(str(name))}</b>, {size} parameters."
    if is_embedded:
        families = ", ".join(family.replace("_", " ") for family in examples.FAMILIES)
        about += (
            f" It was trained on {len(examples.FAMILIES)} kinds of text ({families}) and understands nothing else: "
            "begin with the examples, which training never saw."
        )
    return (
        '<div class="header"><h1>illada</h1><p>A masked diffusion language model does not write from left to right: '
        f"it settles the whole text, the surest tokens first.<br>{about}</p></div>"
    )


def build_page(model, tokenizer: PreTrainedTokenizerBase, name: str, is_embedded: bool) -> gr.Blocks:
    """The page for a model, not yet served.

    Args:
        name: what the page calls the model.
        is_embedded: whether it is the model that comes with the package, for which there are examples.
    """
    return Page(model, tokenizer, name, is_embedded).blocks
