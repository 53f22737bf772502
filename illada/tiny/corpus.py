"""The text that the embedded model learns: five families of examples whose answers a program can check.

Everything is drawn from a seeded `random.Random`, each split from seeds of its own. Whether an example belongs to
training, validation or test is besides a function of its content alone, so the splits never meet, whatever the seeds.
"""

import functools
import itertools
import random
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

NAMES = {
    "Tom": "He",
    "Ben": "He",
    "Max": "He",
    "Sam": "He",
    "Leo": "He",
    "Jack": "He",
    "Mia": "She",
    "Ana": "She",
    "Eva": "She",
    "Lily": "She",
    "Zoe": "She",
    "Nina": "She",
}
ITEMS = ("apples", "pears", "books", "coins", "cards", "shells", "stones", "pens", "cups", "nuts", "eggs", "cakes")
GAINS = ("buys", "finds", "gets", "picks")
LOSSES = ("sells", "loses", "gives away", "breaks")
LIST_OPERATIONS: dict[str, tuple[str, Callable[[list[int]], list[int]]]] = {
    "Sort the numbers": ("Sorted", sorted),
    "Sort downwards": ("Sorted", lambda numbers: sorted(numbers, reverse=True)),
    "Find the largest": ("Largest", lambda numbers: [max(numbers)]),
    "Find the smallest": ("Smallest", lambda numbers: [min(numbers)]),
}
# Parts of a sentence that can be blanked together: the rest says what they are.
ONE_PART = ((2,), (4,), (6,), (8,), (10,), (12,), (14,))
BOTH_MENTIONS = ((2, 6), (4, 8), (10, 14))
BOTH_AND_NAME = ((2, 6, 12), (4, 8, 12), (10, 12, 14))
BOTH_AND_MORE = ((2, 6, 8, 12), (4, 8, 10, 12), (2, 10, 12, 14))


@dataclass(frozen=True)
class Difficulty:
    """What makes examples harder; each range is (least, most), both included.

    Attributes:
        steps: gains and losses in a word problem.
        largest_number: of word problems and lists; the terms of a sentence reach half of it.
        list_length: numbers in a list.
        line_length: names in an ordering.
        grid_blanks: cells blanked in a grid of 16.
        sentence_blanks: the sets of a sentence's parts of which one is blanked.
    """

    steps: tuple[int, int]
    largest_number: int
    list_length: tuple[int, int]
    line_length: tuple[int, int]
    grid_blanks: tuple[int, int]
    sentence_blanks: tuple[tuple[int, ...], ...]


DIFFICULTIES = {
    "easy": Difficulty((1, 2), 20, (3, 4), (4, 4), (4, 10), ONE_PART + BOTH_MENTIONS),
    "medium": Difficulty((2, 3), 50, (5, 6), (5, 7), (8, 11), BOTH_MENTIONS + BOTH_AND_NAME),
    "hard": Difficulty((3, 5), 99, (7, 9), (8, 12), (10, 12), BOTH_AND_MORE),
}
"""The levels by name; the embedded model is trained and tested on `"easy"`."""


@dataclass(frozen=True)
class Example:
    """One text to learn or to test on.

    Attributes:
        family: name of its generator in [`FAMILIES`].
        prompt: the user's message; empty for a plain document.
        text: what the model writes: the answer, or the whole document.
        blanks: character spans `(start, end)` of `text` that a test removes and the model fills.
    """

    family: str
    prompt: str
    text: str
    blanks: tuple[tuple[int, int], ...]

    @property
    def content(self) -> str:
        """What two examples share if one gives the other away: the question, or the whole of a document."""
        return self.prompt or self.text

    @property
    def split(self) -> str:
        """`"test"` or `"validation"` for one example in 32 each, by content, `"train"` for the others."""
        return {0: "test", 16: "validation"}.get(zlib.crc32(self.content.encode()) % 32, "train")

    def is_correct(self, text: str) -> bool:
        """Whether `text`, produced in place of `self.text`, is right.

        A word problem is judged by the number after "The answer is", a grid by the rules of the puzzle and the cells
        given, everything else by equality.
        """
        text = text.strip()
        if self.family == "word_problem":
            return _final_answer(text) == _final_answer(self.text)
        if self.family == "grid":
            return _is_solved_grid(text) and all(a == b for a, b in zip(text, self.with_blanks("_")) if b != "_")
        return text == self.text

    def with_blanks(self, sign: str) -> str:
        """The text with `sign` in place of each character that a test removes."""
        text = self.text
        for start, end in self.blanks:
            text = text[:start] + sign * (end - start) + text[end:]
        return text


def _final_answer(text: str) -> str | None:
    match = re.search(r"The answer is (\d+)\.", text)
    return match and match[1]


def _answer(family: str, prompt: str, text: str) -> Example:
    return Example(family, prompt, text, blanks=((0, len(text)),))


def word_problem(rng: random.Random, difficulty: Difficulty) -> Example:
    """Gains and losses, worked out step by step; all numbers stay in [0, largest_number]."""
    largest = difficulty.largest_number
    name, item = rng.choice(list(NAMES)), rng.choice(ITEMS)
    amount = rng.randint(1, largest * 3 // 4)
    sentences, reasoning = [f"{name} has {amount} {item}."], []
    for _ in range(rng.randint(*difficulty.steps)):
        change = rng.randint(1, largest // 2 - 1)
        gain = amount + change <= largest and (amount < change or rng.random() < 0.5)
        result = amount + change if gain else amount - change
        verb = rng.choice(GAINS if gain else LOSSES)
        sentences.append(f"{NAMES[name]} {verb} {change}" + (" more." if gain else "."))
        reasoning.append(f"{'Add' if gain else 'Subtract'}: {amount} {'+' if gain else '-'} {change} = {result}.")
        amount = result
    sentences.append(f"How many {item} does {name} have now?")
    return _answer("word_problem", " ".join(sentences), " ".join(reasoning) + f" The answer is {amount}.")


def list_operation(rng: random.Random, difficulty: Difficulty) -> Example:
    """Different numbers, and one of [`LIST_OPERATIONS`] asked of them."""
    numbers = rng.sample(range(difficulty.largest_number + 1), rng.randint(*difficulty.list_length))
    task, (result, function) = rng.choice(list(LIST_OPERATIONS.items()))
    listed, found = (" ".join(map(str, values)) for values in (numbers, function(numbers)))
    return _answer("list_operation", f"{task}: {listed}", f"{result}: {found}")


def ordering(rng: random.Random, difficulty: Difficulty) -> Example:
    """Names in a line, asked for from the front or, reversed, from the back."""
    line = rng.sample(list(NAMES), rng.randint(*difficulty.line_length))
    end, asked = rng.choice((("front", line), ("back", line[::-1])))
    return _answer("ordering", f"In line: {' '.join(line)}. From the {end}?", f"From the {end}: {' '.join(asked)}")


def sentence(rng: random.Random, difficulty: Difficulty) -> Example:
    """A document with numbers or a name blanked in its middle, each of which follows from the rest."""
    name, (first, second) = rng.choice(list(NAMES)), rng.sample(ITEMS, 2)
    a, b = (rng.randint(1, difficulty.largest_number // 2) for _ in range(2))
    parts = ["Today", f" {name} has", f" {a}", f" {first} and", f" {b}", f" {second}.", f" {a}", " +", f" {b}", " ="]
    parts += [f" {a + b}", ", so", f" {name}", " has", f" {a + b}", " things in all."]
    hidden = rng.choice(difficulty.sentence_blanks)
    starts = list(itertools.accumulate(map(len, parts), initial=0))
    return Example("sentence", "", "".join(parts), tuple((starts[i], starts[i + 1]) for i in hidden))


def _is_solved_grid(text: str) -> bool:
    rows = [row.split() for row in text.removeprefix("Grid:").split("/")]
    if [len(row) for row in rows] != [4, 4, 4, 4]:
        return False
    columns = list(zip(*rows))
    boxes = [[rows[r + i][c + j] for i in (0, 1) for j in (0, 1)] for r in (0, 2) for c in (0, 2)]
    return all(set(group) == set("1234") for group in (*rows, *columns, *boxes))


@functools.cache
def _all_grids() -> list[str]:
    """The 288 grids of four rows in which every row, column and 2x2 box holds 1, 2, 3 and 4."""
    permutations = list(itertools.permutations("1234"))
    grids = []
    for top in itertools.product(permutations, repeat=2):
        if len({*top[0][:2], *top[1][:2]}) < 4:
            continue
        for bottom in itertools.product(permutations, repeat=2):
            text = "Grid: " + " / ".join(" ".join(row) for row in (*top, *bottom))
            if _is_solved_grid(text):
                grids.append(text)
    return grids


def _has_one_solution(text: str, blanks: tuple[tuple[int, int], ...]) -> bool:
    given = [i for i, c in enumerate(text) if c.isdigit() and not any(s <= i < e for s, e in blanks)]
    return sum(all(grid[i] == text[i] for i in given) for grid in _all_grids()) == 1


def grid(rng: random.Random, difficulty: Difficulty) -> Example:
    """A 4x4 grid with cells blanked, anywhere, so that exactly one solution remains."""
    text = rng.choice(_all_grids())
    cells = [i - 1 for i, c in enumerate(text) if c.isdigit()]  # a cell and the space before it
    while True:
        blanks = tuple((i, i + 2) for i in sorted(rng.sample(cells, rng.randint(*difficulty.grid_blanks))))
        if _has_one_solution(text, blanks):
            return Example("grid", "", text, blanks)


FAMILIES: dict[str, tuple[Callable[[random.Random, Difficulty], Example], float]] = {
    "word_problem": (word_problem, 0.32),
    "list_operation": (list_operation, 0.20),
    "ordering": (ordering, 0.22),
    "sentence": (sentence, 0.16),
    "grid": (grid, 0.10),
}
"""Generator and share of the training text of each family."""


def training_examples(
    seed: int, difficulty: str = "easy", opening: Mapping[str, int] | None = None
) -> Iterator[Example]:
    """An endless stream of training examples in the shares of [`FAMILIES`], the same for the same seed.

    Args:
        opening: number of examples of single families that come before the mixture. Copying names in an order is
            learnt in 600 steps where nothing else is asked, and hardly ever in the mixture from the start.
    """
    rng = random.Random(seed)
    stages = [([FAMILIES[family][0]], [1.0], count) for family, count in (opening or {}).items()]
    for generators, shares, count in (*stages, (*zip(*FAMILIES.values()), None)):
        drawn = (rng.choices(generators, shares)[0](rng, DIFFICULTIES[difficulty]) for _ in itertools.count())
        yield from itertools.islice((example for example in drawn if example.split == "train"), count)


def held_out_examples(
    family: str, count: int, seed: int = 0, *, split: str = "test", difficulty: str = "easy"
) -> list[Example]:
    """`count` different examples of a family that are never trained on, the same for the same seed.

    Args:
        split: `"test"`, or `"validation"` for choices made while training.

    Raises:
        ValueError: if a name is unknown, or if the family has fewer than `count` in that split.
    """
    for name, value, allowed in (
        ("family", family, FAMILIES),
        ("split", split, ("test", "validation")),
        ("difficulty", difficulty, DIFFICULTIES),
    ):
        if value not in allowed:
            raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {value!r}.")
    rng = random.Random(f"{split}-{family}-{seed}")
    generator, _ = FAMILIES[family]
    examples: dict[Example, None] = {}
    fruitless = 0
    while len(examples) < count:
        example = generator(rng, DIFFICULTIES[difficulty])
        if example.split == split and example not in examples:
            examples[example], fruitless = None, 0
        # Of N equally likely ones in one draw of 32, the last one is missed in 20 * 32 * N draws once in e^20 times.
        elif (fruitless := fruitless + 1) > 20 * 32 * (len(examples) + 100):
            raise ValueError(
                f"`count` must be at most {len(examples)} for {family!r}, {difficulty}, {split}, got {count}."
            )
    return list(examples)
