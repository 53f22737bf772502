"""A conversation with a model in the terminal."""

import json
import sys
from pathlib import Path

import torch
from jinja2 import TemplateError

from ..frozen_cache import FrozenCache
from ..generation_config import MaskedDiffusionGenerationConfig
from ..text.blanks import fill_blanks, spell_blanks
from ..text.loading import Checkpoint
from ..text.prompts import encode_prompt, sent_messages, turn_segments
from .errors import CommandError, WrongUsage
from .live import run_generate
from .options import check_settings
from .results import finish_reason, tell_if_cut

try:
    import readline  # gives `input` line editing and history

    readline.parse_and_bind("set enable-bracketed-paste on")  # a pasted line break sends nothing
except ImportError:  # not on every system
    pass

HELP = """\
/reset        forget the conversation
/retry        answer the last message again
/undo         forget the last message and its answer
/system TEXT  set the system message; without TEXT, remove it
/save FILE    write the conversation to a new JSON file
/help         this list
/exit         leave, as /quit and the end of input (Ctrl-D) do
A line that ends with \\ goes on in the next. Blanks such as <[MASK]*4> in a message are filled first.
Ctrl-C drops the line that is being typed, or stops the answer and forgets its question."""

LEAVE = ("/exit", "/quit")


class Conversation:
    """A conversation: what was said, and the commands that change it.

    Args:
        checkpoint ([`Checkpoint`]): of a masked diffusion model with a chat template.
        settings (`dict`): arguments of `generate`.
        pause (`float`, *optional*): seconds to wait after each step that is shown; none is shown if absent.
        system (`str`, *optional*): the system message.

    Attributes:
        messages (`list[dict]`): the turns so far, without the system message.

    Raises:
        ValueError: if there is no chat template, or it takes no system message.
    """

    def __init__(self, checkpoint: Checkpoint, settings: dict, pause: float | None = None, system: str | None = None):
        if checkpoint.tokenizer.chat_template is None:
            raise ValueError("`model` must be a checkpoint with a chat template, and this one has none.")
        self.checkpoint, self.tokenizer = checkpoint, checkpoint.tokenizer
        self.settings, self.pause = settings, pause
        self.system: str | None = None
        self.messages: list[dict] = []
        self.cache = FrozenCache(max_tokens=checkpoint.config.max_position_embeddings)
        self.told_of_history = False
        self.is_terminal = sys.stdin.isatty()
        if system is not None:
            try:
                self.set_system(system)
            except ValueError as error:
                raise WrongUsage(f"`--system` cannot be used, got {system!r}: {error}") from error

    def run(self, model, generator: torch.Generator | None = None):
        """Reads messages and commands from standard input until `/exit` or its end.

        Args:
            model: of the checkpoint.
            generator (`torch.Generator`, *optional*): source of the noise.
        """
        self.model, self.generator = model, generator
        self._say(f"{self.checkpoint.name} on {model.device}. Say something; /help lists the commands.\n")
        while True:
            try:
                text = self._read()
                if text is None or text.lower() in LEAVE or (self.is_terminal and text.lower() in ("exit", "quit")):
                    return
                if text.startswith("/"):
                    self.obey(text)
                elif text:
                    self.ask(text)
            except KeyboardInterrupt:
                if not self.is_terminal:
                    raise
                print("\nInterrupted; /exit leaves.")
            except (CommandError, ValueError, OSError) as error:
                print(f"illada: {' '.join(str(error).split())}", file=sys.stderr)

    def _read(self) -> str | None:
        """A message or a command; `None` at the end of input."""
        prompt, lines = "you> ", []
        while not lines or lines[-1].endswith("\\"):
            try:
                lines.append(self._read_line(prompt))
            except EOFError:
                self._say("")
                if not lines:
                    return None
                break
            prompt = "...> "
        return "\n".join(line.removesuffix("\\") for line in lines).strip()

    def _read_line(self, prompt: str) -> str:
        if self.is_terminal and not sys.stdout.isatty():  # what is written to a file is the answers
            print(prompt, end="", file=sys.stderr, flush=True)
        return input(prompt if self.is_terminal and sys.stdout.isatty() else "")

    def _say(self, text: str):
        """Prints what only somebody at a terminal wants to know."""
        if self.is_terminal:
            print(text)

    def ask(self, text: str):
        """Prints the model's answer; message and answer join the conversation when it is complete."""
        mask_token_id = self.checkpoint.generation_config.mask_token_id
        spelled = spell_blanks(text, self.tokenizer.convert_ids_to_tokens(mask_token_id))
        messages = [*self.messages, {"role": "user", "content": spelled}]
        sent = sent_messages(self._with_system(messages), self.checkpoint.config)
        if len(sent) < len(self._with_system(messages)) and not self.told_of_history:
            self.told_of_history = True
            print("illada: this model answers each message by itself; earlier ones are not sent.", file=sys.stderr)
        input_ids = encode_prompt(self.tokenizer, sent)
        self._check_room(len(input_ids), len(sent))
        settings = self.settings | self._frozen(sent, input_ids) | {"generator": self.generator}
        output = run_generate(self.model, self.tokenizer, input_ids, self.pause, **settings)
        response = output.sequences[0, len(input_ids) :]
        reply = self.tokenizer.decode(response, skip_special_tokens=True).strip()
        if mask_token_id in input_ids:
            filled = output.sequences[0, : len(input_ids)].tolist()
            text = fill_blanks(self.tokenizer, text, input_ids, filled, mask_token_id)
            print(text)
        print(f"{self.checkpoint.name}> {reply}\n" if self.is_terminal else reply)
        if self.is_terminal:
            eos_token_ids = self.checkpoint.generation_config.eos_token_ids
            stop = self.settings.get("stop_strings")
            tell_if_cut(finish_reason(output, len(input_ids), eos_token_ids, reply, stop))
        turn = {"role": "user", "content": text}, {"role": "assistant", "content": reply}
        self.messages = [*self.messages, *turn]

    def _frozen(self, sent: list[dict], input_ids: list[int]) -> dict:
        """With a frozen cache, the arguments of `generate` by which only what is new is computed."""
        own = self.checkpoint.generation_config
        config = MaskedDiffusionGenerationConfig.merged(own, None, **self.settings)
        if config.block_cache != "frozen":
            return {}
        segments = turn_segments(self.tokenizer, sent, input_ids, config.block_length)
        return {"cache": self.cache, "prompt_segments": segments}

    def _check_room(self, prompt_length: int, num_messages: int):
        try:
            check_settings(self.settings, self.checkpoint, prompt_length)
        except CommandError as error:
            hint = " /reset forgets the conversation." if num_messages > 1 else ""
            raise ValueError(f"{error}{hint}") from error

    def obey(self, line: str):
        """Does what a line that begins with a slash says.

        Raises:
            ValueError: if there is no such command, or it cannot be done.
        """
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        match command.lower():
            case "/reset":
                self.messages = []
                self._say("The conversation is forgotten.")
            case "/retry":
                before, text = self._last_turn()
                turn, self.messages = self.messages, before
                try:
                    self.ask(text)
                except BaseException:
                    self.messages = turn
                    raise
            case "/undo":
                self.messages, text = self._last_turn()
                self._say(f"Forgotten: {text}")
            case "/system":
                self.set_system(argument or None)
                self._say("The system message is set." if argument else "There is no system message now.")
            case "/save":
                self.save(argument)
            case "/help":
                print(HELP)
            case _:
                raise ValueError(f"There is no command {line}; /help lists them.")

    def _last_turn(self) -> tuple[list[dict], str]:
        """The messages before the last turn, and what was asked in it."""
        if not self.messages:
            raise ValueError("There is no message yet.")
        return self.messages[:-2], self.messages[-2]["content"]

    def set_system(self, text: str | None):
        """Begins all further prompts with this system message.

        Raises:
            ValueError: if the chat template refuses it or leaves it out; the one before it stays.
        """
        if text is not None:
            example = [{"role": "system", "content": text}, {"role": "user", "content": "?"}]
            try:
                rendered = self.tokenizer.apply_chat_template(example, tokenize=False)
            except TemplateError as error:
                raise ValueError(f"The checkpoint's chat template takes no system message: {error}.") from error
            if text not in rendered:
                raise ValueError("The checkpoint's chat template leaves the system message out.")
        self.system = text

    def save(self, path: str):
        """Writes the messages, the system's included, as a JSON list.

        Raises:
            ValueError: if the file exists or cannot be written.
        """
        if not path:
            raise ValueError("/save needs the name of a file.")
        file = Path(path).expanduser()
        try:
            with file.open("x", encoding="utf-8") as opened:
                json.dump(self._with_system(self.messages), opened, ensure_ascii=False, indent=2)
        except FileExistsError:
            raise ValueError(f"/save needs the name of a new file: {file} exists.") from None
        except OSError as error:
            raise ValueError(f"/save cannot write {file}: {error.strerror}.") from error
        print(f"Saved to {file}.")

    def _with_system(self, messages: list[dict]) -> list[dict]:
        return messages if self.system is None else [{"role": "system", "content": self.system}, *messages]
