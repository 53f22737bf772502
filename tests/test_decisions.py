"""Probabilities of given answers: against plain loops of one forward per factor, and against enumeration."""

import itertools
import math
import random

import pytest
import torch
from tiny_models import EOS, MASK, random_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import illada
from illada import EMBEDDED_MODEL
from illada.evaluation import (
    Blank,
    Choice,
    ChoiceText,
    Decision,
    Predicate,
    Score,
    choice_probabilities,
    decide,
)

TEXT = "Today Tom has 3 pears and<[MASK]> cups. 3 + 4 = 7, so Tom has<[MASK]> things in all."


@pytest.fixture(scope="module")
def embedded():
    return AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float64)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


@torch.no_grad()
def next_token(model, ids: list[int], position: int) -> torch.Tensor:
    """(V,): what the model would write at a [MASK] of one text, by a forward of its own."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, position].double()
    logits[MASK] = -torch.inf
    return logits.softmax(-1)


def written(model, before: list[int], choice: list[int], after: list[int], width: int) -> float:
    """Probability that a place of `width` tokens is filled with `choice` from left to right."""
    product = 1.0
    for count in range(min(len(choice) + 1, width)):
        ids = before + choice[:count] + [MASK] * (width - count) + after
        token = choice[count] if count < len(choice) else EOS
        product *= next_token(model, ids, len(before) + count)[token].item()
    return product


def expected(model, question: ChoiceText, width: int | None = None) -> Decision:
    width = width or max(map(len, question.choices))
    values = [written(model, question.before, choice, question.after, width) for choice in question.choices]
    return Decision([value / sum(values) for value in values], sum(values))


def assert_same(actual: Decision, other: Decision, tolerance: float = 1e-9):
    assert actual.probabilities == pytest.approx(other.probabilities, rel=tolerance, abs=1e-300)
    assert actual.label_mass == pytest.approx(other.label_mass, rel=tolerance, abs=1e-300)
    assert sum(actual.probabilities) == pytest.approx(1, abs=1e-12)


def random_question(rng: random.Random, longest: int = 4) -> ChoiceText:
    """Prompts of any length, choices of one length or several, some with a common beginning, text after some."""

    def tokens(count: int) -> list[int]:
        return [rng.randrange(6, 37) for _ in range(count)]

    after = tokens(rng.randint(1, 5)) if rng.random() < 0.4 else []
    fixed = rng.randint(1, longest) if after or rng.random() < 0.3 else None
    begin = tokens(rng.randint(0, 1))
    choices = {tuple((begin + tokens(4))[: fixed or rng.randint(1, longest)]) for _ in range(rng.randint(4, 8))}
    choices |= {tuple(tokens(fixed or 1)), tuple(tokens(fixed or longest))}
    return ChoiceText(tokens(rng.randint(0, 20)), [list(choice) for choice in sorted(choices)], after)


# Token ids


@pytest.mark.parametrize("seed", range(6))
def test_probabilities_are_those_of_a_loop(seed):
    rng, model = random.Random(seed), random_model(seed)
    question = random_question(rng)
    [actual] = choice_probabilities(model, [question])
    assert_same(actual, expected(model, question))


@pytest.mark.slow
def test_probabilities_are_those_of_a_loop_many_times():
    for seed in range(300):
        rng, model = random.Random(seed), random_model(seed % 7)
        questions = [random_question(rng) for _ in range(5)]
        together = choice_probabilities(model, questions, batch_size=rng.randint(1, 9))
        for question, actual in zip(questions, together, strict=True):
            assert_same(actual, expected(model, question))


def test_a_batch_gives_what_each_question_gives_alone():
    rng, model = random.Random(3), random_model(3)
    questions = [random_question(rng) for _ in range(12)]
    alone = [choice_probabilities(model, [question], batch_size=1)[0] for question in questions]
    for batch_size in (1, 3, 64):
        for actual, other in zip(choice_probabilities(model, questions, batch_size=batch_size), alone, strict=True):
            assert_same(actual, other, 1e-11)


def test_everything_that_may_be_written_sums_to_one():
    """All answers of one and of two tokens: what is left is the empty answer, an EOS at once."""
    model, before = random_model(1, vocab_size=13), [7, 8, 9]
    tokens = [token for token in range(13) if token not in (MASK, EOS)]
    choices = [[token] for token in tokens] + [list(pair) for pair in itertools.product(tokens, tokens)]
    [decision] = choice_probabilities(model, [ChoiceText(before, choices)])
    empty = next_token(model, [*before, MASK, MASK], 3)[EOS].item()
    assert 0.001 < empty < 0.999 and decision.label_mass == pytest.approx(1 - empty, abs=1e-12)
    [decision] = choice_probabilities(model, [ChoiceText(before, [[token] for token in tokens])])
    assert decision.label_mass == pytest.approx(1 - next_token(model, [*before, MASK], 3)[EOS].item(), abs=1e-12)


def test_choices_of_one_token_are_the_softmax_of_their_logits():
    model, before, tokens = random_model(2), [9, 10, 11], [6, 20, 30]
    [decision] = choice_probabilities(model, [ChoiceText(before, [[token] for token in tokens])])
    logits = model(input_ids=torch.tensor([[*before, MASK]])).logits[0, 3]
    assert decision.probabilities == pytest.approx(logits[tokens].softmax(-1).tolist(), rel=1e-12)


def test_any_eos_of_the_model_ends_a_shorter_choice():
    model = random_model(4)
    model.generation_config.eos_token_id = [EOS, 3]
    [decision] = choice_probabilities(model, [ChoiceText([9], [[10], [11, 12]])])
    first, ends = next_token(model, [9, MASK, MASK], 1), next_token(model, [9, 10, MASK], 2)
    then = next_token(model, [9, 11, MASK], 2)
    values = [(first[10] * (ends[EOS] + ends[3])).item(), (first[11] * then[12]).item()]
    assert_same(decision, Decision([value / sum(values) for value in values], sum(values)))


def test_how_many_rows_the_model_is_asked():
    """One row for choices of one token; one for each beginning that choices of more tokens have."""
    model, calls = random_model(0), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    choice_probabilities(model, [ChoiceText([7], [[8], [9], [10]]), ChoiceText([7, 8], [[8], [9]])])
    choice_probabilities(model, [ChoiceText([7], [[8, 9], [8, 10], [9, 9]])])
    choice_probabilities(model, [ChoiceText([7], [[8, 9], [8, 10], [9, 9]])], batch_size=2)
    assert calls == [2, 3, 2, 1]


@pytest.mark.parametrize(
    "question, reason",
    [
        (ChoiceText([7], [[8]], name="`q`"), "`q` must have at least two choices, got 1"),
        (ChoiceText([7], [], name="`q`"), "`q` must have at least two choices, got 0"),
        (ChoiceText([7], [[8], []], name="`q`"), "`q` must have choices of at least one token, got choice 1"),
        (ChoiceText([7], [[8], [9], [8]], name="`q`"), "the same tokens in choice 0 and choice 2"),
        (ChoiceText([7], [[8], [MASK]]), r"without \[MASK\] and EOS, got choice 1"),
        (ChoiceText([7], [[8], [9, EOS]]), r"without \[MASK\] and EOS, got choice 1"),
        (ChoiceText([7], [[8], [37]]), r"outside the vocabulary, \[0, 37\)"),
        (ChoiceText([-1], [[8], [9]]), r"outside the vocabulary, \[0, 37\)"),
        (ChoiceText([7], [[8], [9, 9]], [10]), "choices of 2 tokens each, since text follows, got 1 in choice 0"),
        (ChoiceText([7] * 63, [[8, 9], [9, 9]]), "takes 65 tokens, more than the model's 64 positions"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_questions_that_cannot_be_decided_are_refused(question, reason):
    model = random_model(0)
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was asked"))
    good = ChoiceText([7], [[8], [9]])
    with pytest.raises(ValueError, match=reason):
        choice_probabilities(model, [good, question])


def test_models_that_cannot_decide_are_refused():
    question = ChoiceText([7], [[8], [9]])
    with pytest.raises(ValueError, match="training mode"):
        choice_probabilities(random_model(0).train(), [question])
    with pytest.raises(ValueError, match="`batch_size` must be"):
        choice_probabilities(random_model(0), [question], batch_size=0)
    broken = random_model(0)
    with torch.no_grad():
        broken.lm_head.weight[9] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite at a question"):
        choice_probabilities(broken, [question])


def test_choices_too_improbable_for_a_float_keep_their_ratio():
    """Products of many factors underflow; their logarithms do not."""
    model = random_model(5, max_position_embeddings=512)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    generator = random.Random(0)
    choices = [[generator.randrange(6, 37) for _ in range(200)] for _ in range(2)]
    choices[1][:-1] = choices[0][:-1]
    [decision] = choice_probabilities(model, [ChoiceText([7], choices)], batch_size=50)
    last = next_token(model, [7, *choices[0][:-1], MASK], 200)
    odds = (last[choices[0][-1]].log() - last[choices[1][-1]].log()).item()
    assert decision.label_mass == 0
    assert math.log(decision.probabilities[0] / decision.probabilities[1]) == pytest.approx(odds, abs=1e-6)


def test_what_a_decision_says():
    decision = Decision([0.2, 0.5, 0.3], 0.4)
    assert decision.best == 1 and decision.confidence == pytest.approx(0.2)
    assert decision.score == pytest.approx(1.1)


# Text

QUESTIONS = [
    Predicate("Has Tom apples?"),
    Choice("What has Tom?", ["apples", "pears", "cups"], ["", "sweet ones", ""]),
    Score("How many are they?", ["none", "few", "many"]),
]
MESSAGES = {
    0: "Tom has 2 apples.\n\nHas Tom apples?\nAnswer Yes or No only.",
    1: "Tom has 2 apples.\n\nWhat has Tom?\nA: apples\nB: pears - sweet ones\nC: cups\n"
    "Answer with the letter of one option only.",
    2: "Tom has 2 apples.\n\nHow many are they?\n0: none\n1: few\n2: many\nAnswer with the number of one level only.",
}
LABELS = {0: ["Yes", "No"], 1: ["A", "B", "C"], 2: ["0", "1", "2"]}


@pytest.mark.parametrize("chat", [True, False, None])
def test_questions_in_words(embedded, tokenizer, chat):
    actual = decide(embedded, tokenizer, "Tom has 2 apples.", QUESTIONS, chat=chat)
    for index, message in MESSAGES.items():
        if chat is False:
            prompt = f"{message}\nAnswer:"
            before = tokenizer(prompt)["input_ids"]
            whole = [tokenizer(f"{prompt} {label}")["input_ids"] for label in LABELS[index]]
        else:
            turn = [{"role": "user", "content": message}]
            before = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
            prompt = tokenizer.decode(before)
            whole = [tokenizer(prompt + label, add_special_tokens=False)["input_ids"] for label in LABELS[index]]
        assert all(ids[: len(before)] == before for ids in whole)
        question = ChoiceText(before, [ids[len(before) :] for ids in whole])
        assert_same(actual[index], expected(embedded, question), 1e-8)


def test_several_texts_are_asked_all_questions(embedded, tokenizer):
    texts = ["Tom has 2 apples.", "Mia has 11 pears, and she finds 3 more of them.", "Sort the numbers: 4 2"]
    together = decide(embedded, tokenizer, texts, QUESTIONS, batch_size=4)
    assert [len(answers) for answers in together] == [3, 3, 3]
    for text, answers in zip(texts, together, strict=True):
        for question, answer in zip(QUESTIONS, answers, strict=True):
            assert_same(answer, decide(embedded, tokenizer, text, [question])[0], 1e-9)
    assert decide(embedded, tokenizer, [], QUESTIONS) == []


def test_blanks_are_decided_in_one_row(embedded, tokenizer):
    calls = []
    handle = embedded.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    first, second = decide(embedded, tokenizer, TEXT, [Blank([" 3", " 4", " 5"]), Blank([" 7", " 8"], index=1)])
    handle.remove()
    assert calls == [1]
    assert first.best == 1 and second.best == 0 and min(first.confidence, second.confidence) > 0.9
    before, middle, after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in TEXT.split("<[MASK]>"))
    before = [tokenizer.bos_token_id, *before]
    choices = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" 3", " 4", " 5")]
    assert_same(first, expected(embedded, ChoiceText(before, choices, [*middle, MASK, *after])), 1e-8)
    choices = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" 7", " 8")]
    assert_same(second, expected(embedded, ChoiceText([*before, MASK, *middle], choices, after)), 1e-8)


def test_the_space_before_a_blank_is_the_choices(embedded, tokenizer):
    spaced = TEXT.replace("and<", "and <")
    [actual] = decide(embedded, tokenizer, spaced, [Blank(["3", "4", "5"])])
    assert_same(actual, decide(embedded, tokenizer, TEXT, [Blank([" 3", " 4", " 5"])])[0])


def test_a_blank_at_the_end_may_stay_shorter(embedded, tokenizer):
    text = "Today Tom has 3 pears and<[MASK]*3>"
    [actual] = decide(embedded, tokenizer, text, [Blank([" 4 cups.", " 4", " 4 pens"])])
    before = [tokenizer.bos_token_id, *tokenizer("Today Tom has 3 pears and", add_special_tokens=False)["input_ids"]]
    whole = [tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in (" 4 cups.", " 4", " 4 pens")]
    assert [len(ids) for ids in whole] == [3, 1, 2]
    assert_same(actual, expected(embedded, ChoiceText(before, whole), width=3), 1e-8)


def test_labels_that_would_be_one_with_the_text_are_refused():
    """`a` and `b` are one token together: a choice `b` after `a` has no tokens of its own."""
    model, tokenizer = random_model(0), tiny_tokenizer()
    with pytest.raises(ValueError, match=r"`questions\[0\]` has a choice whose first token .* 'b' after 'a'"):
        decide(model, tokenizer, "a<[MASK]>", [Blank(["b", "c"])])
    [decision] = decide(model, tokenizer, "a<[MASK]>", [Blank([" ", "c"][1:] + ["d"])])
    assert sum(decision.probabilities) == pytest.approx(1)


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: Predicate(" "), "`instructions` must be a text that is not empty, got ' '"),
        (lambda: Choice("q", ["a", " "]), "`choices` must not have an empty text, got ' '"),
        (lambda: Choice("q", ["a", "b", "a"]), "`choices` must be different texts, got 'a' twice"),
        (lambda: Choice("q", ["a"]), "`choices` must be 2 to 26 texts, got 1"),
        (lambda: Choice("q", [str(number) for number in range(27)]), "`choices` must be 2 to 26 texts, got 27"),
        (lambda: Choice("q", "ab"), "`choices` must be a sequence of texts, got 'ab'"),
        (lambda: Choice("q", ["a", "b"], ["c"]), "`descriptions` must be one for each choice"),
        (lambda: Score("q", ["a", "a"]), "`levels` must be different texts, got 'a' twice"),
        (lambda: Score("q", [str(number) for number in range(11)]), "`levels` must be 2 to 10 texts, got 11"),
        (lambda: Blank(["a"]), "`choices` must be at least 2 texts, got 1"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_questions_that_make_no_sense_are_refused(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()


@pytest.mark.parametrize(
    "text, questions, reason",
    [
        ("a", [], "`questions` must be at least one"),
        (TEXT, [Blank([" 3", " 4"], index=2)], r"`questions\[0\]` asks about blank 2 of a text that has 2"),
        ("no blank", [Blank([" 3", " 4"])], r"asks about blank 0 of a text that has 0"),
        (TEXT, [Blank([" 3", " 4 cups"])], "has a blank of 1 tokens, and ' 4 cups' has 2"),
        (TEXT.replace(">", "*2>", 1), [Blank([" 3 cups", " 4"])], "2 tokens each, since text follows, got 1 in ' 4'"),
        (TEXT, [Predicate("q")], "must not have a blank"),
        ("word " * 600, [Predicate("q")], "tokens, and there is room for 512"),
        ("word " * 600 + "<[MASK]>", [Blank(["a", "b"])], "tokens, and there is room for 512"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_questions_that_do_not_fit_the_text_are_refused(embedded, tokenizer, text, questions, reason):
    with pytest.raises(ValueError, match=reason):
        decide(embedded, tokenizer, text, questions)


def test_chat_needs_a_template():
    with pytest.raises(ValueError, match="`chat` needs a checkpoint with a chat template"):
        decide(random_model(0), tiny_tokenizer(), "a", [Predicate("b")], chat=True)


def test_it_is_public():
    assert illada.decide is decide
