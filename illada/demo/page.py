"""The page: what is on it, and what its buttons do."""

import html
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import gradio as gr
import torch
from transformers import PreTrainedTokenizerBase

from ..denoising import DenoisingStep
from ..text.blanks import encode_with_blanks, spell_blanks
from ..text.checks import check_call
from ..text.prompts import encode_prompt
from ..text.trace import trace_tokens
from . import examples
from .picture import CSS, conversation_html, denoising_html
from .playing import LiveTokens, hide_after, steps_and_output
from .session import Session, Turn
from .settings import Settings

__all__ = ["CSS", "THEME", "build_page"]

THEME = gr.themes.Default(
    primary_hue="violet",
    secondary_hue="violet",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],  # of the visitor's machine: nothing is fetched
    font_mono=["ui-monospace", "monospace"],
)

UNDECIDED = "░"


@contextmanager
def _errors_on_the_page():
    """Shows an error as one sentence on the page; one that is not the visitor's also leaves a traceback in the log."""
    try:
        yield
    except ValueError as error:
        gr.Warning(html.escape(" ".join(str(error).split())), title="That does not work")
    except Exception as error:
        raise gr.Error(html.escape(" ".join(str(error).split()) or type(error).__name__)) from error


class Page:
    """The components, and the functions behind them; `blocks` is what Gradio serves."""

    def __init__(self, model, tokenizer: PreTrainedTokenizerBase, name: str, is_embedded: bool):
        self.model, self.tokenizer = model, tokenizer
        self.mask_token_id = model.generation_config.mask_token_id
        self.eos_token_ids = model.generation_config.eos_token_ids
        with gr.Blocks(title="illada", analytics_enabled=False) as self.blocks:
            self.session = gr.State(Session())
            gr.HTML(_header(model, name, is_embedded))
            with gr.Row():
                with gr.Column(min_width=400), gr.Tabs():
                    with gr.Tab("Chat"):
                        self._build_chat(is_embedded)
                    with gr.Tab("Fill in the blanks"):
                        self._build_filling(is_embedded)
                    with gr.Tab("Revise"):
                        self._build_revision(is_embedded)
                with gr.Column(min_width=400, elem_classes="player"):
                    self._build_player()
            with gr.Accordion("Settings", open=False):
                self.settings = Settings(model)
            if is_embedded:
                with gr.Accordion("What the embedded model can do, measured", open=False):
                    gr.Markdown(examples.measured_accuracy())
            self._connect()
        self.blocks.queue(default_concurrency_limit=4)

    def _build_chat(self, is_embedded: bool):
        self.conversation = gr.HTML(conversation_html([]))
        self.message = gr.Textbox(show_label=False, placeholder="Type a message", submit_btn=True, elem_id="message")
        if is_embedded:
            gr.Examples(examples.prompts(), self.message, label="Messages that training never saw")
        with gr.Row():
            takes_history = not getattr(self.model.config, "single_turn", is_embedded)
            self.remember = gr.Checkbox(
                takes_history, visible=takes_history, label="Send the conversation so far with each message"
            )
            self.clear = gr.Button("Clear the conversation", size="sm", elem_id="clear")

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
        self.pause = gr.Slider(0, 1, 0.1, step=0.05, label="Pause after each pass, in seconds", elem_id="pause")

    def _connect(self):
        player = [self.picture, self.step]
        common = {self.session, self.pause, *self.settings.components}
        quiet = {"show_progress": "hidden"}
        sent = self.message.submit(
            self._send,
            {self.message, self.remember, *common},
            [self.message, self.conversation],
            trigger_mode="multiple",
            concurrency_limit=None,  # not `queue=False`, which would swallow warnings
            **quiet,
        )
        sent.then(
            self._answer, {self.remember, *common}, [self.conversation, *player], trigger_mode="multiple", **quiet
        )
        self.fill.click(self._fill, {self.blank_text, *common}, [self.filled_text, *player], **quiet)
        texts = {self.finished_text, self.threshold, self.rounds}
        self.revise.click(self._revise, {*texts, *common}, [self.revised_text, *player], **quiet)
        self.again.click(self._replay, {self.session, self.pause}, player, **quiet)
        self.stop.click(self._stop, self.session, None, queue=False, **quiet)
        self.step.release(self._show, [self.session, self.step], self.picture, **quiet)
        self.clear.click(self._clear, self.session, self.conversation, queue=False, **quiet)
        # The last selection counts: by default one is dropped that is made while another is on its way, and
        # "always_last" repeats the other.
        self.blank_text.select(_selection, None, self.selection, trigger_mode="multiple", **quiet)
        self.blank_out.click(self._blank_out, [self.blank_text, self.selection], self.blank_text, **quiet)

    def _send(self, values: dict) -> dict:
        """Takes the message out of its box, if it can be answered."""
        session, message = values[self.session], values[self.message].strip()
        with _errors_on_the_page():
            if not message:
                raise ValueError("The message must hold some text.")
            if spell_blanks(message, "") != message:
                raise ValueError('A message must not have blanks: they are filled under "Fill in the blanks".')
            input_ids = encode_prompt(self.tokenizer, session.conversation(message, values[self.remember]))
            check_call(self.model, input_ids, self.settings.answer_arguments(values))
            session.send(message)
            return {self.message: "", self.conversation: conversation_html(session.shown_turns())}
        return self._nothing_new(self.message)

    def _answer(self, values: dict) -> Iterator[dict]:
        """Answers the messages that wait, one after another."""
        yield self._nothing_new(self.conversation)
        session = values[self.session]
        if not session.begin("answer"):
            return  # the answer that is being written goes on with what waits
        try:
            while (message := session.next_message()) is not None:
                with _errors_on_the_page():
                    yield from self._answer_one(session, message, values)
                yield {self.conversation: conversation_html(session.shown_turns())}
        except BaseException:  # the visitor has left, or the model failed
            session.end()
            raise

    def _answer_one(self, session: Session, message: str, values: dict) -> Iterator[dict]:
        messages = session.conversation(message, values[self.remember])
        turn = Turn("user", message, is_answered=False)
        session.turns.append(turn)
        session.stopped.clear()
        session.draft = ""
        try:
            input_ids = encode_prompt(self.tokenizer, messages)
            live = LiveTokens(self.tokenizer, self.mask_token_id, len(input_ids), self.eos_token_ids)

            def show(step: DenoisingStep) -> dict:
                session.draft = self._draft(step.tokens[len(input_ids) :].tolist())
                return {self.conversation: conversation_html(session.shown_turns())}

            arguments = self._settings(self.settings.answer_arguments(values), values)
            output = yield from self._denoise(self.model.generate, input_ids, live, show, values, arguments)
            if output is None:
                answer = Turn("assistant", session.draft.partition(UNDECIDED)[0], session.draft)
                turn.is_answered = bool(answer.content)
            else:
                text = self.tokenizer.decode(output.sequences[0, len(input_ids) :], skip_special_tokens=True)
                answer, turn.is_answered = Turn("assistant", text.strip()), True
                live.tokens = trace_tokens(self.tokenizer, output, len(input_ids))
            answer.is_answered = turn.is_answered
            session.turns.append(answer)
        finally:
            session.draft = None
        yield self._finished(session, live.tokens, live.num_steps)

    def _fill(self, values: dict) -> Iterator[dict]:
        yield self._nothing_new(self.filled_text)
        with _errors_on_the_page(), self._alone(values):
            input_ids = encode_with_blanks(self.tokenizer, values[self.blank_text], self.mask_token_id)
            live = LiveTokens(self.tokenizer, self.mask_token_id, self._first_column(input_ids))
            arguments = self._settings(self.settings.arguments(values), values) | {"max_new_tokens": 0}
            output = yield from self._denoise(self.model.generate, input_ids, live, _nothing_more, values, arguments)
            shown = {}
            if output is not None:
                live.tokens = trace_tokens(self.tokenizer, output, live.first_column)
                shown[self.filled_text] = self.tokenizer.decode(output.sequences[0], skip_special_tokens=True)
            yield shown | self._finished(values[self.session], live.tokens, live.num_steps)

    def _revise(self, values: dict) -> Iterator[dict]:
        yield self._nothing_new(self.revised_text)
        with _errors_on_the_page(), self._alone(values):
            if not values[self.finished_text].strip():
                raise ValueError("The text must hold something to revise.")
            input_ids = self.tokenizer(values[self.finished_text])["input_ids"]
            live = LiveTokens(self.tokenizer, self.mask_token_id, self._first_column(input_ids))
            choice = {"threshold": values[self.threshold], "num_rounds": values[self.rounds]}
            arguments = self._settings(self.settings.arguments(values), values) | choice
            output = yield from self._denoise(self.model.revise, input_ids, live, _nothing_more, values, arguments)
            shown = {}
            if output is not None:
                live.tokens = self._compared(live, input_ids, output)
                shown[self.revised_text] = self.tokenizer.decode(output.sequences[0], skip_special_tokens=True)
            yield shown | self._finished(values[self.session], live.tokens, live.num_steps)

    def _compared(self, live: LiveTokens, input_ids: list[int], output) -> list[dict]:
        """The tokens of a revision, with what each replaced, and how likely those are that stayed."""
        tokens = live.finished(output.sequences[0].tolist())
        for column, token in enumerate(tokens, start=live.first_column):
            if output.changed[0, column]:
                token["was"] = self.tokenizer.decode(input_ids[column])
            if not token["step"] and not output.confidences[0, column].isnan():
                token["confidence"] = float(output.confidences[0, column])
        return tokens

    @contextmanager
    def _alone(self, values: dict):
        """Refuses to begin while something is written; Stop is for what is written here."""
        session = values[self.session]
        if not session.begin("text"):
            raise ValueError("Something else is being written: wait for it, or stop it.")
        try:
            yield
        finally:
            session.end()

    def _settings(self, arguments: dict, values: dict) -> dict:
        return arguments | {"generator": self.settings.generator(values)}

    def _denoise(
        self, call: Callable, input_ids: list[int], live: LiveTokens, show: Callable, values: dict, arguments: dict
    ) -> Iterator[dict]:
        """Yields the picture and `show(step)` after each step; returns what `call` returns, or None if stopped."""
        if call == self.model.generate:
            arguments = {**arguments, "return_dict_in_generate": True, "output_trace": True}
        inputs = torch.tensor([input_ids], device=self.model.device)
        session = values[self.session]
        with closing(steps_and_output(call, input_ids=inputs, **arguments)) as steps:
            for item in steps:
                if not isinstance(item, DenoisingStep):
                    return item
                picture = denoising_html(live(item), live.num_steps)
                slider = gr.Slider(maximum=live.num_steps, value=live.num_steps)
                yield {self.picture: picture, self.step: slider, **show(item)}
                if session.stopped.wait(values[self.pause]):
                    return None

    def _draft(self, token_ids: list[int]) -> str:
        """What is decided of an answer, up to its end."""
        text, run = "", []
        for token_id in token_ids:
            if token_id in self.eos_token_ids:
                break
            if token_id == self.mask_token_id:
                text, run = text + self._decode(run) + UNDECIDED, []
            else:
                run.append(token_id)
        return text + self._decode(run)

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def _nothing_new(self, component) -> dict:
        """A generator that yields nothing would empty its outputs."""
        return {component: gr.skip()}

    def _finished(self, session: Session, tokens: list[dict], num_passes: int) -> dict:
        session.record = (tokens, num_passes)
        return {
            self.picture: denoising_html(tokens, num_passes, num_passes),
            self.step: gr.Slider(maximum=max(num_passes, 1), value=num_passes),
        }

    def _show(self, session: Session, step: int) -> str:
        tokens, num_passes = session.record
        return denoising_html(hide_after(tokens, step), step, num_passes)

    def _replay(self, values: dict) -> Iterator[dict]:
        yield self._nothing_new(self.picture)
        session = values[self.session]
        with _errors_on_the_page(), self._alone(values):
            for step in range(session.record[1] + 1):
                yield {self.picture: self._show(session, step), self.step: step}
                if session.stopped.wait(values[self.pause]):
                    break

    def _stop(self, session: Session):
        session.stopped.set()

    def _clear(self, session: Session) -> str:
        session.turns.clear()
        return conversation_html(session.shown_turns())

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


def _nothing_more(step: DenoisingStep) -> dict:
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
