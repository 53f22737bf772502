"""A conversation with a model in the terminal."""

import json
import sys

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..text.prompts import encode_prompt
from .live import run_generate

try:
    import readline  # noqa: F401  gives `input` line editing and history
except ImportError:  # not on every system
    pass

HELP = """\
/reset        forget the conversation
/system TEXT  set the system message; without TEXT, remove it
/save FILE    write the conversation to a new JSON file
/help         this list
/exit         leave, as the end of input (Ctrl-D) does
Ctrl-C drops the line that is being typed, or stops the answer and forgets its question."""


class Conversation:
    """A conversation: what was said, and the commands that change it.

    Args:
        model: a masked diffusion model.
        tokenizer ([`PreTrainedTokenizerBase`]): with a chat template.
        settings (`dict`): arguments of `generate`.
        live (`bool`): whether to show the denoising.
        system (`str`, *optional*): the system message.

    Attributes:
        messages (`list[dict]`): the turns so far, without the system message.

    Raises:
        ValueError: if there is no chat template, or it takes no system message.
    """

    def __init__(self, model, tokenizer: PreTrainedTokenizerBase, settings: dict, live: bool, system: str | None):
        if tokenizer.chat_template is None:
            raise ValueError("`illada chat` needs a checkpoint with a chat template, and this one has none.")
        self.model, self.tokenizer, self.settings, self.live = model, tokenizer, settings, live
        self.system: str | None = None
        self.messages: list[dict] = []
        if system is not None:
            self.set_system(system)

    def run(self):
        """Reads messages and commands from standard input until `/exit` or its end."""
        is_terminal = sys.stdin.isatty()
        if is_terminal:
            print("Say something; /help lists the commands.")
        while True:
            try:
                line = input("> " if is_terminal else "").strip()
            except EOFError:
                if is_terminal:
                    print()
                return
            except KeyboardInterrupt:
                if not is_terminal:
                    raise
                print("\nInterrupted; /exit leaves.")
                continue
            if line == "/exit":
                return
            try:
                if line.startswith("/"):
                    self.obey(line)
                elif line:
                    print(self.answer(line))
            except KeyboardInterrupt:
                if not is_terminal:
                    raise
                print("Interrupted; /exit leaves.")
            except (ValueError, OSError) as error:
                print(f"illada: {' '.join(str(error).split())}", file=sys.stderr)

    def answer(self, text: str) -> str:
        """The model's answer; question and answer join the conversation when it is complete."""
        messages = [*self.messages, {"role": "user", "content": text}]
        input_ids = encode_prompt(self.tokenizer, self._with_system(messages))
        output = run_generate(self.model, self.tokenizer, input_ids, self.live, **self.settings)
        reply = self.tokenizer.decode(output.sequences[0, len(input_ids) :], skip_special_tokens=True).strip()
        self.messages = [*messages, {"role": "assistant", "content": reply}]
        return reply

    def obey(self, line: str):
        """Does what a line that begins with a slash says.

        Raises:
            ValueError: if there is no such command.
            OSError: if the file of `/save` exists, or cannot be written.
        """
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        match command:
            case "/reset":
                self.messages = []
            case "/system":
                self.set_system(argument or None)
            case "/save":
                self.save(argument)
            case "/help":
                print(HELP)
            case _:
                raise ValueError(f"There is no command {command}; /help lists them.")

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
        """Writes the messages, the system's included, as a JSON list."""
        if not path:
            raise ValueError("/save needs the name of a file.")
        with open(path, "x", encoding="utf-8") as file:
            json.dump(self._with_system(self.messages), file, ensure_ascii=False, indent=2)
        print(f"Saved to {path}.")

    def _with_system(self, messages: list[dict]) -> list[dict]:
        return messages if self.system is None else [{"role": "system", "content": self.system}, *messages]
