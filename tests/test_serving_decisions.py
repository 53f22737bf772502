"""`/v1/decisions` in the forms of the `openai` package: the probabilities are those of `decide`."""

import json
import re
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from illada import EMBEDDED_MODEL
from illada.evaluation import Blank, Choice, Predicate, Score, decide

openai = pytest.importorskip("openai", reason="the server is asked by the `openai` client, which is not installed")
pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("prometheus_client", reason="needs the extra serve")
from http_server import ThreadServer  # noqa: E402

NAME = "illada-tiny"
TEXT = "Tom has 2 apples and 11 pears."
BLANKS = "Today Tom has 3 pears and<[MASK]> cups. 3 + 4 = 7, so Tom has<[MASK]> things in all."
QUESTIONS = [
    {"type": "predicate", "name": "fruit", "instructions": "Has Tom any fruit?"},
    {
        "type": "choice",
        "instructions": "What has Tom most of?",
        "choices": [{"value": "apples"}, {"value": "pears", "description": "green ones"}, {"value": False}],
    },
    {
        "type": "score",
        "name": "number",
        "instructions": "How many are they?",
        "levels": [{"label": "none"}, {"label": "few", "description": "up to ten"}, {"label": "many"}],
    },
]


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float64)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


@pytest.fixture(scope="module")
def server(model, tokenizer):
    with ThreadServer(model, tokenizer, limits={"max_rows": 2}) as server:
        yield server


def asked(server, body: dict) -> dict:
    status, text, _ = server.post(body, "/v1/decisions")
    assert status == 200, text
    return json.loads(text)


def test_questions_in_words_through_the_openai_client(server, model, tokenizer):
    predicate, choice, score = decide(
        model,
        tokenizer,
        TEXT,
        [
            Predicate("Has Tom any fruit?"),
            Choice("What has Tom most of?", ["apples", "pears", "false"], ["", "green ones", ""]),
            Score("How many are they?", ["none", "few", "many"], ["", "up to ten", ""]),
        ],
    )
    decision = server.client.decisions.create(model=NAME, input=TEXT, questions=QUESTIONS)
    first, second, third = decision.answers
    assert decision.model == NAME
    assert (first.type, first.name, first.probability) == (
        "predicate",
        "fruit",
        pytest.approx(predicate.probabilities[0]),
    )
    assert (second.type, second.name) == ("choice", None)
    assert second.choice == ["apples", "pears", False][choice.best]
    assert [each.value for each in second.probabilities] == ["apples", "pears", False]
    assert [each.probability for each in second.probabilities] == pytest.approx(choice.probabilities)
    assert second.confidence == pytest.approx(choice.confidence)
    assert (third.type, third.name, third.score) == ("score", "number", pytest.approx(score.score))
    assert [(each.value, each.label) for each in third.probabilities] == [(0, "none"), (1, "few"), (2, "many")]
    assert [each.probability for each in third.probabilities] == pytest.approx(score.probabilities)
    assert third.confidence == pytest.approx(score.confidence)
    masses = [answer.label_mass for answer in decision.answers]
    assert masses == pytest.approx([predicate.label_mass, choice.label_mass, score.label_mass])
    usage = decision.usage
    assert usage.output_tokens == 0 and usage.total_tokens == usage.input_tokens > 100


def test_blanks_of_the_input(server, model, tokenizer):
    questions = [
        {"type": "blank", "choices": [{"value": " 3"}, {"value": " 4"}]},
        {"type": "blank", "name": "sum", "index": 1, "choices": [{"value": " 7"}, {"value": " 8"}]},
    ]
    answers = asked(server, {"input": BLANKS, "questions": questions})["answers"]
    for answer, other in zip(
        answers, decide(model, tokenizer, BLANKS, [Blank([" 3", " 4"]), Blank([" 7", " 8"], 1)]), strict=True
    ):
        assert [each["probability"] for each in answer["probabilities"]] == pytest.approx(other.probabilities)
        assert answer["label_mass"] == pytest.approx(other.label_mass)
    assert [answer["choice"] for answer in answers] == [" 4", " 7"] and answers[1]["name"] == "sum"


def test_input_may_be_messages(server):
    plain = asked(server, {"input": "Tom has 2 apples.\n\nMia has\n3.", "questions": QUESTIONS[:1]})
    parts = [{"type": "input_text", "text": "Mia has"}, {"type": "input_text", "text": "3."}]
    messages = [{"role": "user", "content": "Tom has 2 apples."}, {"role": "user", "content": parts}]
    assert asked(server, {"input": messages, "questions": QUESTIONS[:1]}) == plain


def test_the_model_is_asked_between_passes_in_its_own_thread(server, model):
    """No pass is larger than those in which texts are written."""
    seen = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((threading.current_thread().name, len(kwargs["input_ids"]))),
        with_kwargs=True,
    )
    try:
        asked(server, {"input": TEXT, "questions": QUESTIONS * 3})
    finally:
        handle.remove()
    assert {name for name, _ in seen} == {server.worker.manager._thread.name}
    assert max(rows for _, rows in seen) == 2


def test_a_long_text_is_read_row_by_row_where_rows_are_bounded(model, tokenizer):
    with ThreadServer(model, tokenizer, limits={"max_rows": 8, "max_tokens": 128}) as server:
        body = {"input": TEXT, "questions": QUESTIONS[1:]}
        assert len(asked(server, body)["answers"]) == 2
        status, text, _ = server.post({**body, "input": TEXT * 20}, "/v1/decisions")
        assert status == 400 and json.loads(text)["error"]["code"] == "context_length_exceeded", text


def test_decisions_are_counted(server):
    def numbers() -> dict[str, float]:
        lines = [line.rpartition(" ") for line in server.get("/metrics")[1].splitlines() if line[:1] != "#"]
        return {name: float(value) for name, _, value in lines}

    before = numbers()
    usage = asked(server, {"input": TEXT, "questions": QUESTIONS})["usage"]
    after = numbers()
    name = 'illada_requests_total{endpoint="/v1/decisions",status="200"}'
    assert after[name] - before.get(name, 0) == 1
    assert after["illada_prompt_tokens_total"] - before["illada_prompt_tokens_total"] == usage["input_tokens"]
    assert after["illada_written_tokens_total"] == before["illada_written_tokens_total"]


def choice(*values, **more) -> dict:
    return {"type": "choice", "instructions": "q", "choices": [{"value": value} for value in values], **more}


LETTERS = [str(number) for number in range(27)]


@pytest.mark.parametrize(
    "body, reason",
    [
        ({"questions": QUESTIONS}, "`input` field required"),
        ({"input": "a"}, "`questions` field required"),
        ({"input": "a", "questions": []}, "`questions`"),
        ({"input": " ", "questions": QUESTIONS}, "`input` must have some text"),
        ({"input": "a", "questions": QUESTIONS * 22}, "`questions`"),
        ({"input": "a", "questions": [{"type": "guess"}]}, "`questions.0`"),
        ({"input": "a", "questions": [{"type": "predicate", "instructions": ""}]}, "instructions`"),
        ({"input": "a", "questions": [choice("x")]}, "`questions.0`: `choices` must be 2 to 26 texts, got 1"),
        ({"input": "a", "questions": [choice(*LETTERS)]}, "`choices` must be 2 to 26 texts, got 27"),
        ({"input": "a", "questions": [choice("x", "y", "x")]}, "`choices` must be different texts, got 'x' twice"),
        ({"input": "a", "questions": [choice("x", " ")]}, "`choices` must not have an empty text"),
        ({"input": "a", "questions": [choice("true", True)]}, "`choices` must be different texts, got 'true' twice"),
        ({"input": "a", "questions": [choice("x", 3)]}, "`questions.0"),
        ({"input": "a<[MASK]>", "questions": QUESTIONS}, "must not have a blank"),
        ({"input": "a", "questions": [{"type": "blank", "choices": [{"value": "x"}, {"value": "y"}]}]}, "has 0"),
        ({"input": "word " * 600, "questions": QUESTIONS}, "`input` has"),
        ({"input": [{"role": "assistant", "content": "a"}], "questions": QUESTIONS}, "`input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}], "questions": QUESTIONS}, "`input"),
        ({"input": "a", "questions": QUESTIONS, "temperature": 1}, "`temperature` is not a field"),
        ({"input": "a", "questions": QUESTIONS, "prompt_cache_key": "k"}, "`prompt_cache_key` must be left out"),
        (
            {
                "input": "a<[MASK]*400>",
                "questions": [{"type": "blank", "choices": [{"value": f" {n}" + " 1 1" * 60} for n in range(10)]}],
            },
            "at most 1024 tokens in choices of several",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cannot_be_decided_is_said(server, body, reason):
    status, text, _ = server.post(body, "/v1/decisions")
    error = json.loads(text)["error"]
    assert status == 400 and reason in error["message"], text
    assert error["type"] == "invalid_request_error" and error["param"] in (*body, "input", "questions"), text


def test_another_model_is_not_there(server):
    status, text, _ = server.post({"model": "other", "input": "a", "questions": QUESTIONS}, "/v1/decisions")
    assert status == 404 and json.loads(text)["error"]["code"] == "model_not_found"


ODD = [-1, 0, 1.5, 10**30, True, "", "x", [], ["x"], [[1]], {}, {"a": 1}, [None], "\ud83d\ude00", None]


def test_absurd_values_are_never_a_fault(server):
    body = {"input": "a b", "questions": [choice("x", "y", name="n")]}
    for value in ODD:
        bodies = [{**body, field: value} for field in ("model", "input", "questions", "user", "safety_identifier")]
        for field in ("type", "instructions", "choices", "name"):
            bodies.append({**body, "questions": [{**body["questions"][0], field: value}]})
        bodies.append({**body, "questions": [choice("x", value)]})
        bodies.append({"input": BLANKS, "questions": [{"type": "blank", "index": value, "choices": []}]})
        for each in bodies:
            status, text, _ = server.post(each, "/v1/decisions")
            assert status in (200, 400, 404), (each, text)
            assert status == 200 or json.loads(text)["error"]["message"], (each, text)


def test_the_line_of_the_documentation(server):
    page = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()
    [body] = re.findall(r"curl \S+/v1/decisions -H \"Content-Type: application/json\" -d '(.*?)'", page, re.DOTALL)
    answers = asked(server, json.loads(body))["answers"]
    assert [answer["choice"] for answer in answers] == [" 4", " 7"]
    assert all(answer["confidence"] > 0.9 for answer in answers)
