"""What one visitor of the page has said and read, and what is being written for him."""

from collections import deque
from dataclasses import dataclass
from threading import Event, Lock


@dataclass
class Turn:
    """A message of the conversation.

    Attributes:
        role (`str`): `"user"` or `"assistant"`.
        content (`str`): what the model is told of it later.
        shown (`str`, *optional*): what the page shows of it, where that differs.
        is_answered (`bool`): False for a message that got no answer, which the model is not told of.
    """

    role: str
    content: str
    shown: str | None = None
    is_answered: bool = True


class Session:
    """The state of one visitor. The page's functions run in several threads, and change it in place.

    Attributes:
        turns (`list[Turn]`): the conversation so far.
        draft (`str`, *optional*): the answer that is being written.
        waiting (`deque[str]`): messages that were sent meanwhile.
        record (`tuple[list[dict], int]`): the last text's tokens, and its number of forward passes.
        stopped (`Event`): set by Stop.
    """

    def __init__(self):
        self.turns: list[Turn] = []
        self.draft: str | None = None
        self.waiting: deque[str] = deque()
        self.record: tuple[list[dict], int] = ([], 0)
        self.stopped = Event()
        self._task: str | None = None
        self._lock = Lock()

    def __deepcopy__(self, memo) -> "Session":
        return Session()  # Gradio gives each visitor a copy of the first value

    def begin(self, task: str) -> bool:
        """Whether `task` may begin: one thing is written at a time."""
        with self._lock:
            if self._task is not None:
                return False
            self._task = task
        self.stopped.clear()
        return True

    def end(self):
        self._task = None

    def send(self, message: str):
        """Queues a message for the answer that is being written, or that begins now.

        Raises:
            ValueError: if something else is being written.
        """
        with self._lock:
            if self._task not in (None, "answer"):
                raise ValueError("Something else is being written: wait for it, or stop it.")
            self.waiting.append(message)

    def next_message(self) -> str | None:
        """The next message to answer; None ends the task."""
        with self._lock:
            if self.waiting:
                return self.waiting.popleft()
            self._task = None
            return None

    def conversation(self, message: str, with_past: bool) -> list[dict]:
        """What the model is told."""
        past = [{"role": turn.role, "content": turn.content} for turn in self.turns if turn.is_answered]
        return [*(past if with_past else []), {"role": "user", "content": message}]

    def shown_turns(self) -> list[tuple[str, str]]:
        """Role and text of each message that the visitor sees."""
        shown = [(turn.role, turn.content if turn.shown is None else turn.shown) for turn in self.turns]
        draft = [] if self.draft is None else [("assistant", self.draft)]
        return [*shown, *draft, *(("user", message) for message in self.waiting)]
