"""The corpus: answers that are right, held-out examples that are never trained on, and windows that hide lengths."""

import itertools
import random
import re
from collections import Counter

import pytest

from illada.tiny.corpus import DIFFICULTIES, FAMILIES, held_out_examples, training_examples
from illada.tiny.tokenizer import train_tokenizer
from illada.training.data import CorpusWindows, encode, windows


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(num_examples=3000)


def solve_word_problem(prompt: str) -> int:
    """Reads the story again, word by word."""
    first, *changes, _ = prompt.split(". ")
    amount = int(first.split()[2])
    for change in changes:
        number = int(next(word.strip(".") for word in change.split() if word.strip(".").isdigit()))
        amount += number if "more" in change else -number
    return amount


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_answers_are_right(difficulty):
    for example in held_out_examples("word_problem", 200, difficulty=difficulty):
        assert example.text.endswith(f"The answer is {solve_word_problem(example.prompt)}.")
    for example in held_out_examples("ordering", 100, difficulty=difficulty):
        line, end = example.prompt.removeprefix("In line: ").removesuffix("?").split(". From the ")
        names = line.split()
        assert example.text == f"From the {end}: {' '.join(names if end == 'front' else names[::-1])}"
    for example in held_out_examples("list_operation", 200, difficulty=difficulty):
        task, numbers = example.prompt.split(": ")
        smallest_first = [str(number) for number in sorted(map(int, numbers.split()))]
        found = {
            "Sort the numbers": smallest_first,
            "Sort downwards": smallest_first[::-1],
            "Find the largest": smallest_first[-1:],
            "Find the smallest": smallest_first[:1],
        }[task]
        assert example.text.split(": ")[1].split() == found


def test_an_opening_comes_before_the_mixture():
    examples = list(itertools.islice(training_examples(seed=1, opening={"ordering": 30, "grid": 5}), 300))
    assert [example.family for example in examples[:35]] == ["ordering"] * 30 + ["grid"] * 5
    assert {example.family for example in examples[35:]} == set(FAMILIES)
    assert all(example.split == "train" for example in examples)


def test_difficulties_ask_for_more_and_more():
    """Each level's examples are longer, or have more blanks, than those of the level before; numbers stay in range."""

    def size(example):
        return sum(end - start for start, end in example.blanks)

    for family in FAMILIES:
        levels = [held_out_examples(family, 40, difficulty=difficulty) for difficulty in DIFFICULTIES]
        sizes = [sum(map(size, examples)) for examples in levels]
        assert sizes == sorted(set(sizes)), family
        for difficulty, examples in zip(DIFFICULTIES.values(), levels):
            numbers = [int(number) for example in examples for number in re.findall(r"\d+", example.text)]
            assert max(numbers, default=0) <= difficulty.largest_number or family == "grid"


def test_reasoning_steps_are_right():
    for example in held_out_examples("word_problem", 100):
        for step in example.text.split(". ")[:-1]:
            equation = step.split(": ")[1].rstrip(".")
            left, right = equation.split(" = ")
            assert eval(left) == int(right)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_answer_is_not_accepted(family):
    rng = random.Random(0)
    for example in held_out_examples(family, 50):
        assert example.is_correct(example.text)
        assert not example.is_correct("")
        start, end = rng.choice(example.blanks)
        hidden = example.text[start:end]
        wrong = hidden[:-2] + ("9." if hidden[-2:] != "9." else "8.") if family == "word_problem" else hidden + "7"
        assert not example.is_correct(example.text[:start] + wrong + example.text[end:])


def test_a_grid_is_accepted_only_with_the_given_cells():
    solved = {example.text for example in held_out_examples("grid", 200)}
    example = held_out_examples("grid", 1)[0]
    assert len(solved) > 5
    assert all(not example.is_correct(other) for other in solved - {example.text})


def test_the_splits_never_meet():
    """No prompt or document of the test or the validation split is in the training stream, nor in the other."""
    contents = {
        split: {e.content for family in FAMILIES for e in held_out_examples(family, 200, split=split)}
        for split in ("test", "validation")
    }
    assert min(map(len, contents.values())) > 600
    trained = {example.content for example in itertools.islice(training_examples(seed=0), 30_000)}
    assert not contents["test"] & trained and not contents["validation"] & trained
    assert not contents["test"] & contents["validation"]


def test_shares_and_seeds():
    examples = list(itertools.islice(training_examples(seed=3), 4000))
    assert examples[:50] == list(itertools.islice(training_examples(seed=3), 50))
    assert examples[:50] != list(itertools.islice(training_examples(seed=4), 50))
    counts = Counter(example.family for example in examples)
    for family, (_, share) in FAMILIES.items():
        assert counts[family] / 4000 == pytest.approx(share, abs=0.04)


def test_special_ids_are_those_of_illada(tokenizer):
    ids = (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id)
    assert ids == (0, 1, 2, 5)


def test_tokenizer_encodes_any_text_and_every_corpus_word_in_one_token(tokenizer):
    text = "Ünïcode, 漢字 and \t12345!"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    for example in itertools.islice(training_examples(seed=9), 200):
        for word in example.text.split()[1:]:
            assert len(tokenizer.tokenize(" " + word.strip(".:,"))) == 1, word


def test_encoding_ends_with_one_eos_behind_the_answer(tokenizer):
    example = held_out_examples("ordering", 1)[0]
    [(ids, prompt_length)] = encode(tokenizer, [example])
    assert tokenizer.decode(ids[prompt_length:-1]) == example.text
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[prompt_length:-1]
    assert tokenizer.decode(ids[:prompt_length]) == f"<s>user\n{example.prompt}</s><s>assistant\n"


def test_the_windows_of_the_corpus_begin_with_its_opening(tokenizer):
    first = next(iter(CorpusWindows(tokenizer, 64, seed=0, difficulty="hard", opening={"grid": 3})))
    example = next(training_examples(seed=0, difficulty="hard", opening={"grid": 3}))
    assert tokenizer.decode(first["input_ids"]).startswith(f"<s>{example.text}</s><s>Grid:")


def test_windows_are_slices_of_the_concatenation():
    encoded = [([i] * 5, 2) for i in range(6)]
    assert [window["input_ids"] for window in windows(encoded, 8)] == [
        [0, 0, 0, 0, 0, 1, 1, 1],
        [2, 2, 2, 2, 2, 3, 3, 3],
        [4, 4, 4, 4, 4, 5, 5, 5],
    ]
    assert next(windows(encoded, 8))["is_prompt"] == [True, True, False, False, False, True, True, False]


def test_the_end_of_a_window_does_not_tell_the_length_of_an_answer(tokenizer):
    """Windows end anywhere: with EOS as often as the same place of a longer window has one."""

    def share_of_eos(position: int, length: int) -> float:
        rows = itertools.islice(CorpusWindows(tokenizer, length, seed=length), 3000)
        return sum(row["input_ids"][position] == tokenizer.eos_token_id for row in rows) / 3000

    assert 0.75 < share_of_eos(63, length=64) / share_of_eos(63, length=96) < 1.33
