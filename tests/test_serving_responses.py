"""`/v1/responses` by the `openai` client: the text is that of `generate`, whole and as events."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from illada import EMBEDDED_MODEL

openai = pytest.importorskip("openai", reason="the server is asked by the `openai` client, which is not installed")
pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("prometheus_client", reason="needs the extra serve")
from http_server import ThreadServer  # noqa: E402

NAME = "illada-tiny"
QUESTION = "Tom has 2 apples. He buys 4 more. How many apples does Tom have now?"


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
    """What `generate` answers to the question, by a model of its own."""
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)
    messages = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    def generated(**settings) -> str:
        tokens = model.generate(torch.tensor([ids]), **settings)[0, len(ids) :]
        return tokenizer.decode(tokens, skip_special_tokens=True)

    return generated


def test_a_response_is_what_generate_writes(server, generated):
    response = server.client.responses.create(model=NAME, input=QUESTION)
    assert response.output_text == generated() and response.status == "completed"
    assert response.id.startswith("resp-") and response.object == "response" and response.incomplete_details is None
    [message] = response.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    usage = response.usage
    assert usage.output_tokens > 10 and usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.forward_passes >= usage.output_tokens


def test_a_budget_that_is_used_up_is_said(server, generated):
    response = server.client.responses.create(model=NAME, input=QUESTION, max_output_tokens=5)
    assert response.output_text == generated(max_new_tokens=5)
    assert response.status == response.output[0].status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"


def test_settings_of_generate_are_fields(server, generated):
    response = server.client.responses.create(
        model=NAME, input=QUESTION, temperature=2, max_output_tokens=16, extra_body={"seed": 3, "block_length": 8}
    )
    settings = {"do_sample": True, "temperature": 2.0, "seed": 3, "block_length": 8}
    assert response.output_text == generated(max_new_tokens=16, **settings)


@pytest.mark.parametrize("budget, last", [(60, "response.completed"), (5, "response.incomplete")])
def test_events_are_the_clients(server, generated, budget, last):
    events = list(server.client.responses.create(model=NAME, input=QUESTION, max_output_tokens=budget, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        last,
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"} and len(kinds) > 9
    text = generated(max_new_tokens=budget)
    assert "".join(event.delta for event in events[4:-4]) == text
    assert events[-4].text == text and events[-3].part.text == text and events[-2].item.content[0].text == text
    assert events[-1].response.output_text == text and events[-1].response.usage.output_tokens > 3
    assert events[0].response.status == "in_progress" and events[0].response.output == []
    # The client's own accumulation of the events.
    if last == "response.completed":
        with server.client.responses.stream(model=NAME, input=QUESTION, max_output_tokens=budget) as stream:
            assert stream.get_final_response().output_text == text


def test_messages_and_answers_sent_back(server, generated):
    part = {"type": "input_text", "text": QUESTION}
    asked = [{"role": "user", "content": [part]}]
    first = server.client.responses.create(model=NAME, input=asked)
    assert first.output_text == generated()
    again = [
        {"role": "user", "content": "Sort the numbers: 4 2"},
        *first.output,
        {"role": "user", "content": QUESTION},
    ]
    second = server.client.responses.create(model=NAME, input=again)  # of a conversation this model sees the end
    assert second.output_text == generated()


@pytest.mark.parametrize("power", [0.0, 2.0])
def test_thinking_is_an_item_of_its_own(server, tokenizer, power):
    ids = tokenizer("</think>", add_special_tokens=False)["input_ids"]
    settings = {"end_think_token_ids": ids, "end_think_boost": 1000.0, "end_think_power": power, "block_length": 4}
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 24, **settings}
    chat = json.loads(server.post(body)[1])["choices"][0]["message"]
    response = server.client.responses.create(model=NAME, input=QUESTION, max_output_tokens=24, extra_body=settings)
    assert response.output_text == chat["content"]
    thoughts = [item.content[0].text for item in response.output if item.type == "reasoning"]
    assert thoughts == ([chat["reasoning_content"]] if chat.get("reasoning_content") else [])
    events = list(
        server.client.responses.create(
            model=NAME, input=QUESTION, max_output_tokens=24, extra_body=settings, stream=True
        )
    )
    deltas = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
    assert "".join(deltas) == "".join(thoughts)
    assert [item.type for item in events[-1].response.output] == [item.type for item in response.output]


@pytest.mark.parametrize(
    "body, reason",
    [
        ({}, "`input` field required"),
        ({"input": []}, "`input`"),
        ({"input": 3}, "`input`"),
        ({"input": [{"role": "tool", "content": "a"}]}, "`input"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]}, "`input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "a"}]}]}, "`input"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "`tools` must be left out or []"),
        ({"input": "a", "previous_response_id": "resp-1"}, "`previous_response_id` must be left out"),
        ({"input": "a", "store": True}, "`store` must be left out or False"),
        ({"input": "a", "background": True}, "`background` must be left out or False"),
        ({"input": "a", "conversation": "c"}, "`conversation` must be left out"),
        ({"input": "a", "reasoning": {"effort": "low"}}, "`reasoning` must be left out"),
        ({"input": "a", "text": {"format": {"type": "json_object"}}}, "`text.format` must be left out"),
        ({"input": "a", "include": ["message.output_text.logprobs"]}, "`include` must be left out"),
        ({"input": "a", "truncation": "auto"}, "`truncation` must be left out or 'disabled'"),
        ({"input": "a", "max_output_tokens": 0}, "`max_output_tokens`"),
        ({"input": "a", "max_output_tokens": 10**6}, "`max_output_tokens` must be at most"),
        ({"input": "word " * 600}, "`input` has"),
        ({"input": "a<[MASK]>"}, "`input` must not have a blank"),
        ({"input": "a", "instructions": "b"}, "chat template refuses"),
        ({"input": "a", "messages": []}, "`messages` is not a field"),
        ({"input": "a", "stream": True, "stream_options": {"include_usage": True}}, "include_usage` is not a field"),
        ({"input": "a", "top_p": 0.5}, "`top_p`=0.5 must come with a `temperature`"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_is_not_supported_is_said(server, body, reason):
    status, text, _ = server.post(body, "/v1/responses")
    error = json.loads(text)["error"]
    assert status == 400 and reason in error["message"] and error["type"] == "invalid_request_error", text


def test_a_stream_that_fails_says_why(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)
    with ThreadServer(model, tokenizer) as server:
        model.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(openai.APIError, match="The server failed on request"):
            list(server.client.responses.create(model=NAME, input=QUESTION, stream=True))


ODD = [-1, 0, 1.5, 10**30, True, "", "x", [], ["x"], [[1]], {}, {"a": 1}, [None], "\ud83d\ude00"]


def test_absurd_values_are_never_a_fault(server):
    from illada.serving.responding import ResponsesBody

    for field in ResponsesBody.model_fields:
        if field in ("input", "instructions", "max_output_tokens", "stream", "text", "tools", "seed", "block_length"):
            for value in ODD:
                status, text, _ = server.post({"input": "a", "max_output_tokens": 1, field: value}, "/v1/responses")
                assert status in (200, 400), (field, value, text)
