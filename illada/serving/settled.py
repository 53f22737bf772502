"""Text that is told while it is written: only what will not change any more, and the thinking apart."""

from transformers import PreTrainedTokenizerBase


class SettledText:
    """Text of tokens that come one by one, without half characters and without special tokens.

    Attributes:
        tokens (`list[int]`), text (`str`): so far.
        starts (`list[int]`): the character at which each token's text begins.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer, self.tokens, self.starts, self.text = tokenizer, [], [], ""
        self._start = self._end = 0  # tokens whose text is known, and which the next ones are decoded with

    def append(self, new_tokens: list[int]):
        for token in new_tokens:
            self.tokens.append(token)
            self.starts.append(len(self.text))
            known, longer = (
                self._decode(self.tokens[self._start : self._end]),
                self._decode(self.tokens[self._start :]),
            )
            if len(longer) > len(known) and not longer.endswith("\ufffd"):
                self.text += longer[len(known) :]
                self._start, self._end = self._end, len(self.tokens)

    def finish(self):
        self.text = self._decode(self.tokens)

    def length_of(self, num_tokens: int) -> int:
        """Characters of the first tokens."""
        return len(self._decode(self.tokens[:num_tokens]))

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


THINK_BEGIN, THINK_END = "<think>", "</think>"


class Thinking:
    """Divides an answer into its chain of thought, which stands before `end`, and what follows it.

    Args:
        is_open (`bool`): whether the answer begins in thought; if not, only one that begins with `<think>` has any.
        end (`str`): the text that ends the thinking.
    """

    def __init__(self, is_open: bool, end: str = THINK_END):
        self.is_open, self.end = is_open, end
        self._rest, self._is_at_start, self._strips = "", True, is_open

    def divide(self, text: str, is_last: bool) -> tuple[str, str]:
        """More of the thinking, and more of what follows it, of an answer that goes on with `text`."""
        self._rest += text
        thought = ""
        if self._is_at_start:
            start = self._rest.lstrip()
            if not is_last and THINK_BEGIN.startswith(start):
                return "", ""
            self._is_at_start = False
            if start.startswith(THINK_BEGIN):
                self.is_open = self._strips = True
                self._rest = start.removeprefix(THINK_BEGIN)
        if self.is_open:
            place = self._rest.find(self.end)
            known = len(self._rest) - (0 if is_last else num_held_back(self._rest, [self.end]))
            thought = self._stripped(self._rest[: known if place < 0 else place])
            if place < 0:
                self._rest = self._rest[known:]
                return thought, ""
            self.is_open, self._strips, self._rest = False, True, self._rest[place + len(self.end) :]
        answer, self._rest = self._stripped(self._rest), ""
        return thought, answer

    def _stripped(self, text: str) -> str:
        """Without the white space before the first word of a part."""
        if self._strips:
            text = text.lstrip()
            self._strips = not text
        return text


def num_held_back(text: str, strings: list[str]) -> int:
    """Characters at the end of `text` with which one of `strings` may begin."""
    lengths = (length for string in strings for length in range(1, len(string)) if text.endswith(string[:length]))
    return max(lengths, default=0)
