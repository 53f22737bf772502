"""What only this package's server offers: filled blanks, revision, probabilities, thinking, drafts, metrics."""

import json
import math
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from illada import EMBEDDED_MODEL, ILLaDAModel, MaskedDiffusionGenerationConfig
from illada.text.blanks import encode_with_blanks
from illada.text.prompts import encode_prompt, turn_segments

openai = pytest.importorskip("openai", reason="the server is asked by the `openai` client, which is not installed")
pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("prometheus_client", reason="needs the extra serve")
from http_server import ThreadServer, numbers  # noqa: E402

NAME = "illada-tiny"
QUESTION = [{"role": "user", "content": "Tom has 2 apples. He buys 4 more. How many apples does Tom have now?"}]
BLANKS = "Today Tom has 3 pears and<[MASK]> cups.<[MASK]*3> 4 = 7, so Tom has<[MASK]> things in all."
WRONG = "Today Tom has 3 pears and 4 cups. 3 + 4 = 9, so Tom has 7 things in all."


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


@pytest.fixture(scope="module")
def server(model, tokenizer):
    with ThreadServer(model, tokenizer) as server:
        yield server


@pytest.fixture(scope="module")
def generated(tokenizer):
    """What `generate` makes of token ids, by a model of its own: (tokens after `first`, their output)."""
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)

    def generated(ids: list[int], **settings):
        return model.generate(torch.tensor([ids]), return_dict_in_generate=True, output_trace=True, **settings)

    return generated


def question_ids(tokenizer) -> list[int]:
    return tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)


def asked(server, body: dict, path: str) -> dict:
    status, text, _ = server.post(body, path)
    assert status == 200, text
    return json.loads(text)


def events(server, body: dict, path: str = "/v1/chat/completions") -> list[dict]:
    status, text, _ = server.post({**body, "stream": True}, path)
    assert status == 200, text
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# Conversations


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """The columns of each forward pass."""
    computed, real = [], ILLaDAModel.forward

    def forward(self, input_ids=None, **arguments):
        computed.append(input_ids.numel())
        return real(self, input_ids=input_ids, **arguments)

    monkeypatch.setattr(ILLaDAModel, "forward", forward)
    return computed


def test_a_frozen_cache_goes_from_turn_to_turn(tokenizer, generated, computed):
    """The second turn computes its new tokens and the answer's last block, and says what it says with no cache."""
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)
    model.config.single_turn = False
    settings = {"block_cache": "frozen", "block_length": 8}
    body = {"messages": QUESTION, "max_completion_tokens": 24, **settings}
    with ThreadServer(model, tokenizer) as server:
        first = asked(server, body, "/v1/chat/completions")["choices"][0]["message"]["content"]
        history = [*QUESTION, {"role": "assistant", "content": first}, {"role": "user", "content": "And now?"}]
        ids = encode_prompt(tokenizer, history)
        answers, columns = [], []
        for _ in range(2):
            computed.clear()
            answers.append(asked(server, {**body, "messages": history}, "/v1/chat/completions"))
            columns.append(computed[0])
            server.worker.cache.clear()
    segments = turn_segments(tokenizer, history, ids, 8)
    num_kept = len(question_ids(tokenizer)) + 8 * ((sum(segments[1:]) - 1) // 8)
    assert len(segments) >= 3 and columns == [len(ids) + 8 - num_kept, len(ids) + 8]
    alone = generated(ids, max_new_tokens=24, prompt_segments=segments, **settings)
    expected = tokenizer.decode(alone.sequences[0, len(ids) :], skip_special_tokens=True)
    assert [answer["choices"][0]["message"]["content"] for answer in answers] == [expected] * 2


# Blanks


@pytest.mark.parametrize("settings", [{}, {"confidence_threshold": 0.5}, {"temperature": 2.0, "seed": 5}], ids=str)
def test_infill_fills_blanks_and_shows_each(server, tokenizer, model, generated, settings):
    ids = encode_with_blanks(tokenizer, BLANKS, model.config.mask_token_id)
    given = {"do_sample": True, **settings} if "temperature" in settings else settings
    output = generated(ids, max_new_tokens=0, **given)
    answer = asked(server, {"model": NAME, "text": BLANKS, **settings}, "/v1/infill")
    blanks = [position for position, token in enumerate(ids) if token == model.config.mask_token_id]
    shown = [token for blank in answer["blanks"] for token in blank["tokens"]]
    assert [len(blank["tokens"]) for blank in answer["blanks"]] == [1, 3, 1]
    assert [token["position"] for token in shown] == blanks
    assert [token["id"] for token in shown] == output.sequences[0, blanks].tolist()
    assert [token["step"] for token in shown] == output.commit_steps[0, blanks].tolist()
    assert [token["confidence"] for token in shown] == pytest.approx(output.commit_confidences[0, blanks].tolist())
    parts = BLANKS.replace("<[MASK]*3>", "<[MASK]>").split("<[MASK]>")
    texts = [tokenizer.decode([token["id"] for token in blank["tokens"]]) for blank in answer["blanks"]]
    assert [blank["text"] for blank in answer["blanks"]] == texts
    assert answer["text"] == parts[0] + "".join(text + part for text, part in zip(texts, parts[1:], strict=True))
    assert answer["usage"]["completion_tokens"] == 5 and answer["usage"]["prompt_tokens"] == len(ids)
    assert answer["usage"]["forward_passes"] == int(output.num_forward_passes[0])


@pytest.mark.parametrize(
    "body, reason",
    [
        ({"text": "no blank"}, "must contain a blank"),
        ({"text": "a<[MASK]*0>"}, "at least one token"),
        ({"text": "a<[MASK]*600>"}, "`text` has"),
        ({}, "`text` field required"),
        ({"text": 3}, "`text`"),
        ({"text": "a<[MASK]>", "max_tokens": 4}, "`max_tokens` is not a field"),
        ({"text": "a<[MASK]>", "preset": "quick"}, "`preset`"),
        ({"text": "a<[MASK]>", "top_p": 0.5}, "`top_p`=0.5 must come with a `temperature`"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_infill_says_what_is_wrong(server, body, reason):
    status, text, _ = server.post(body, "/v1/infill")
    assert status == 400 and reason in json.loads(text)["error"]["message"], text


# Revision


@pytest.mark.parametrize(
    "settings",
    [
        {"threshold": 0.02},
        {"fraction": 0.2, "num_rounds": 3, "num_scoring_passes": 4},
        {"fraction": 1, "num_rounds": 2, "num_scoring_passes": 2, "confidence_threshold": 0.9},
    ],
    ids=str,
)
def test_revise_is_the_models(server, tokenizer, settings):
    expected = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL).revise(
        tokenizer(WRONG, return_tensors="pt")["input_ids"], **settings
    )
    answer = asked(server, {"text": WRONG, **settings}, "/v1/revise")
    assert answer["text"] == tokenizer.decode(expected.sequences[0], skip_special_tokens=True)
    assert answer["num_rounds"] == expected.num_rounds
    positions = [token["position"] for token in answer["tokens"]]
    assert positions == (~expected.confidences[0].isnan()).nonzero().squeeze(-1).tolist()
    assert [token["is_changed"] for token in answer["tokens"]] == expected.changed[0, positions].tolist()
    assert any(token["is_changed"] for token in answer["tokens"])
    confidences = [token["confidence"] for token in answer["tokens"]]
    assert confidences == pytest.approx(expected.confidences[0, positions].tolist(), rel=1e-5, abs=1e-7)
    for token in answer["tokens"]:
        assert token["to"] == tokenizer.decode(expected.sequences[0, token["position"]])


@pytest.mark.parametrize(
    "body, reason",
    [
        ({"text": WRONG}, "Exactly one of `fraction` and `threshold`"),
        ({"text": WRONG, "fraction": 2}, "`fraction` must be a number in (0, 1]"),
        ({"text": WRONG, "fraction": 0.1, "num_rounds": 0}, "`num_rounds`"),
        ({"text": WRONG, "fraction": 0.1, "num_rounds": 1000}, "`num_rounds` must be at most 32"),
        ({"text": "", "fraction": 0.1}, "must have some text"),
        ({"text": BLANKS, "fraction": 0.1}, "/v1/infill fills blanks"),
        ({"text": "word " * 600, "fraction": 0.1}, "`text` has"),
        ({"text": WRONG, "fraction": 0.1, "remasking": "guess"}, "`remasking` must be one of"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_revise_says_what_is_wrong(server, body, reason):
    status, text, _ = server.post(body, "/v1/revise")
    assert status == 400 and reason in json.loads(text)["error"]["message"], text


def test_texts_are_written_between_the_passes_of_a_revision(server, model):
    """A revision of one pass per token takes some forty passes; an answer that comes in between waits for few."""
    seen = []
    handle = model.register_forward_pre_hook(lambda *_: seen.append(threading.current_thread().name))
    try:
        asked(server, {"text": WRONG, "threshold": 0.02}, "/v1/revise")
    finally:
        handle.remove()
    assert set(seen) == {server.worker.manager._thread.name} and len(seen) > 20


# Probabilities of tokens


def test_logprobs_are_the_probabilities_at_commit(server, tokenizer, generated):
    ids = question_ids(tokenizer)
    output = generated(ids)
    tokens = output.sequences[0, len(ids) :].tolist()
    confidences = output.commit_confidences[0, len(ids) :].tolist()
    shown = [(tokenizer.decode(t), math.log(c)) for t, c in zip(tokens, confidences) if t != tokenizer.eos_token_id]
    completion = server.client.chat.completions.create(model=NAME, messages=QUESTION, logprobs=True)
    choice = completion.choices[0]
    assert [token.token for token in choice.logprobs.content] == [text for text, _ in shown]
    assert "".join(bytes(token.bytes).decode() for token in choice.logprobs.content) == choice.message.content
    assert [token.logprob for token in choice.logprobs.content] == pytest.approx([p for _, p in shown], abs=1e-6)
    streamed = [
        token
        for chunk in server.client.chat.completions.create(model=NAME, messages=QUESTION, logprobs=True, stream=True)
        for token in chunk.choices[0].logprobs.content
    ]
    assert [token.token for token in streamed] == [text for text, _ in shown]
    assert [token.logprob for token in streamed] == pytest.approx([p for _, p in shown], abs=1e-6)
    plain = server.client.chat.completions.create(model=NAME, messages=QUESTION)
    assert plain.choices[0].logprobs is None


def test_logprobs_of_completions(server, tokenizer, generated):
    prompt = "Today Tom has<[MASK]> pears and"
    completion = server.client.completions.create(model=NAME, prompt=prompt, max_tokens=6, logprobs=0)
    choice = completion.choices[0]
    ids = tokenizer(prompt.replace("<[MASK]>", "[MASK]"))["input_ids"]
    if tokenizer.mask_token_id not in ids:
        ids = encode_with_blanks(tokenizer, prompt, 5)
    output = generated(ids, max_new_tokens=6)
    tokens, steps = output.sequences[0].tolist(), output.commit_steps[0].tolist()
    rows = [
        (tokenizer.decode(token), math.log(confidence) if step else None)
        for token, step, confidence in zip(tokens, steps, output.commit_confidences[0].tolist())
        if tokenizer.decode(token, skip_special_tokens=True)
    ]
    logprobs = choice.logprobs
    assert logprobs.tokens == [text for text, _ in rows] and "".join(logprobs.tokens) == choice.text
    for actual, (_, expected) in zip(logprobs.token_logprobs, rows, strict=True):
        assert actual == (None if expected is None else pytest.approx(expected, abs=1e-6))
    assert [choice.text[start:][: len(text)] for start, text in zip(logprobs.text_offset, logprobs.tokens)] == [
        text for text, _ in rows
    ]
    # A stop string cuts the tokens with the text.
    stopped = server.client.completions.create(model=NAME, prompt="Today Tom has", max_tokens=9, logprobs=0, stop=" ")
    assert stopped.choices[0].text == "" and stopped.choices[0].logprobs.tokens == []


# Thinking


def thinking_ids(tokenizer) -> list[int]:
    return tokenizer("</think>", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("power", [0.0, 2.0])
def test_thinking_is_told_apart(server, tokenizer, generated, power):
    """The boost writes `</think>` into the answer: at once with power 0, towards its end with a higher one."""
    settings = {"end_think_token_ids": thinking_ids(tokenizer), "end_think_boost": 1000.0, "end_think_power": power}
    settings["block_length"] = 4
    ids = question_ids(tokenizer)
    output = generated(ids, max_new_tokens=24, **settings)
    text = tokenizer.decode(output.sequences[0, len(ids) :], skip_special_tokens=True)
    thought, end, answer = text.partition("</think>")
    assert end
    body = {"messages": QUESTION, "max_tokens": 24, **settings}
    message = asked(server, body, "/v1/chat/completions")["choices"][0]["message"]
    assert message["content"] == answer.lstrip() and message.get("reasoning_content", "") == thought.lstrip()
    deltas = [event["choices"][0]["delta"] for event in events(server, body)]
    assert "".join(delta.get("content", "") for delta in deltas) == answer.lstrip()
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == thought.lstrip()


def test_thinking_without_an_end_is_no_answer(server, tokenizer):
    body = {"messages": QUESTION, "max_tokens": 6, "end_think_token_ids": thinking_ids(tokenizer)}
    message = asked(server, body, "/v1/chat/completions")["choices"][0]["message"]
    plain = asked(server, {"messages": QUESTION, "max_tokens": 6}, "/v1/chat/completions")["choices"][0]["message"]
    assert message["content"] == "" and message["reasoning_content"] == plain["content"] != ""
    assert "reasoning_content" not in plain


@pytest.mark.parametrize(
    "is_open, text, thought, answer",
    [
        (False, "an answer", "", "an answer"),
        (False, " <b>an answer", "", " <b>an answer"),
        (False, "<think>\n1 + 1\n</think>\n\n2.", "1 + 1\n", "2."),
        (True, "1 < 2</think>yes </think>", "1 < 2", "yes </think>"),
        (True, "<think>so</think> yes", "so", "yes"),
        (True, "no end </thin", "no end </thin", ""),
        (True, "</think>yes", "", "yes"),
        (False, "<thin", "", "<thin"),
        (False, "", "", ""),
    ],
)
def test_thinking_is_divided_wherever_its_text_is_cut(is_open, text, thought, answer):
    from illada.serving.settled import Thinking

    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1):
            thinking, parts = Thinking(is_open), []
            for piece in (text[:first], text[first:second]):
                parts.append(thinking.divide(piece, is_last=False))
            parts.append(thinking.divide(text[second:], is_last=True))
            assert tuple(map("".join, zip(*parts))) == (thought, answer), (text[:first], text[first:second])


def test_an_answer_may_be_sent_back_with_its_thinking(server):
    past = [*QUESTION, {"role": "assistant", "content": "6.", "reasoning_content": "2 + 4 = 6"}, *QUESTION]
    assert asked(server, {"messages": past, "max_tokens": 4}, "/v1/chat/completions")["choices"]


# Drafts


def test_drafts_are_events_for_those_who_ask(server, tokenizer, generated):
    ids = question_ids(tokenizer)
    output = generated(ids, max_new_tokens=12)
    body = {"messages": QUESTION, "max_tokens": 12, "stream_options": {"include_drafts": True}}
    told = [event["choices"][0] for event in events(server, body) if event["choices"]]
    drafts = [choice["draft"] for choice in told if "draft" in choice]
    steps, tokens = output.commit_steps[0, len(ids) :], output.sequences[0, len(ids) :]
    assert [draft["forward_passes"] for draft in drafts] == list(range(1, int(output.num_forward_passes[0]) + 1))
    for draft in drafts:
        assert [token["position"] for token in draft["tokens"]] == list(range(12))
        for token in draft["tokens"][: len(tokens)]:
            assert 0 < token["confidence"] <= 1
            if 0 < steps[token["position"]] <= draft["forward_passes"]:
                assert token["is_committed"] and token["text"] == tokenizer.decode(tokens[token["position"]])
            else:
                assert not token["is_committed"]
    text = "".join(choice["delta"].get("content", "") for choice in told)
    assert text == tokenizer.decode(tokens, skip_special_tokens=True)
    assert not any("draft" in event["choices"][0] for event in events(server, {**body, "stream_options": {}}))


# The server about itself


def test_metrics_count_what_was_done(server):
    def change(name: str) -> float:
        return after.get(name, 0) - before.get(name, 0)

    before = numbers(server)
    completion = server.client.chat.completions.create(model=NAME, messages=QUESTION, max_tokens=12)
    events(server, {"prompt": "Today", "max_tokens": 3}, "/v1/completions")
    server.post({"prompt": []}, "/v1/completions")
    server.get("/no/such/page")
    after = numbers(server)
    assert change('illada_requests_total{endpoint="/v1/chat/completions",status="200"}') == 1
    assert change('illada_requests_total{endpoint="/v1/completions",status="200"}') == 1
    assert change('illada_requests_total{endpoint="/v1/completions",status="400"}') == 1
    assert change('illada_requests_total{endpoint="other",status="404"}') == 1
    assert change('illada_request_seconds_count{endpoint="/v1/completions"}') == 2
    assert change("illada_first_text_seconds_count") == 2
    usage = completion.usage
    assert change("illada_written_tokens_total") == usage.completion_tokens + 3
    assert change("illada_tokens_per_forward_count") == 2
    assert change("illada_row_passes_total") == change("illada_passes_total") > usage.forward_passes
    assert after["illada_rows"] == 8 and after["illada_rows_in_use"] == after["illada_requests_waiting"] == 0


def test_a_prompt_beyond_the_servers_limit_is_refused(model, tokenizer):
    with ThreadServer(model, tokenizer, max_prompt_tokens=8) as server:
        body = {"prompt": list(range(10, 18)), "max_tokens": 1}
        assert asked(server, body, "/v1/completions")["usage"]["prompt_tokens"] == 8
        for path, field, longer in (
            ("/v1/completions", "prompt", {"prompt": list(range(10, 19))}),
            ("/v1/chat/completions", "messages", {"messages": QUESTION}),
            ("/v1/infill", "text", {"text": BLANKS}),
            ("/v1/revise", "text", {"text": WRONG, "fraction": 0.5}),
        ):
            status, text, _ = server.post(longer, path)
            error = json.loads(text)["error"]
            assert status == 400 and error["param"] == field and "at most 8 tokens" in error["message"], text
            assert error["code"] == "context_length_exceeded"


def test_a_request_keeps_its_id(server):
    def ids(given: str | None) -> tuple[str, str]:
        headers = {} if given is None else {"X-Request-Id": given}
        raw = server.client.completions.with_raw_response.create(
            model=NAME, prompt="Today", max_tokens=1, extra_headers=headers
        )
        return raw.headers["x-request-id"], raw.parse().id

    assert ids("my-id.1") == ("my-id.1", "cmpl-my-id.1")
    made = ids(None)[0]
    assert len(made) == 32 and ids(None)[0] != made
    for bad in ("x" * 129, "two words", "a,b"):
        assert ids(bad)[0] not in (bad, made)


def test_every_setting_of_generate_is_a_field_or_is_named_otherwise():
    """A setting that is added later is a field of requests without another edit."""
    from illada.serving import fields
    from illada.standard_fields import READ

    own = MaskedDiffusionGenerationConfig.field_names()
    others = fields._NAMED_OTHERWISE | fields._OF_THE_SERVER | {"temperature", "seed", *fields.NARROWING}
    assert fields.SETTINGS | others >= {name for name in own if name in READ}
    assert fields.SETTINGS <= fields.WritingFields.model_fields.keys() and not fields.SETTINGS & others
    assert {"block_length", "confidence_threshold", "block_cache", "commit_rule", "suppress_tokens"} <= fields.SETTINGS
    assert not {"compile", "mask_token_id", "num_beams", "output_trace"} & fields.WritingFields.model_fields.keys()


ODD = [-1, 0, 1.5, 10**30, True, "", "x", [], ["x"], [[1]], [-1], {}, {"a": 1}, [None], "\ud83d\ude00"]


def test_absurd_values_are_never_a_fault(server):
    """Every field of every body with every kind of JSON value: an answer or a reason, at once."""
    from illada.serving import fields

    bodies = {
        "/v1/chat/completions": {"messages": QUESTION, "max_tokens": 1},
        "/v1/completions": {"prompt": "Today", "max_tokens": 1},
        "/v1/infill": {"text": "a<[MASK]>"},
        "/v1/revise": {"text": "a b", "fraction": 0.5, "num_scoring_passes": 1},
    }
    own = {
        "/v1/chat/completions": (
            "messages",
            "stop",
            "n",
            "stream",
            "stream_options",
            "logprobs",
            "tools",
            "max_tokens",
        ),
        "/v1/completions": ("prompt", "suffix", "echo", "logprobs", "stop", "n", "stream", "max_tokens"),
        "/v1/infill": ("text", *fields.WritingFields.model_fields),
        "/v1/revise": ("text", "fraction", "threshold", "num_rounds", "num_scoring_passes"),
    }
    for path, body in bodies.items():
        for name in own[path]:
            for value in ODD:
                status, text, _ = server.post({**body, name: value}, path)
                assert status in (200, 400, 404), (path, name, value, text)
                assert status == 200 or json.loads(text)["error"]["message"], (path, name, value, text)
