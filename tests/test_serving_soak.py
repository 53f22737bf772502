"""Many clients for long: every answer is that of `generate` alone, and the server is afterwards as it was before."""

import itertools
import json
import math
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from illada import EMBEDDED_MODEL

psutil = pytest.importorskip("psutil", reason="the server's memory is measured with psutil, which is not installed")
pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")
from http_server import ProcessServer, assert_is_quiet, reset, wait_until_idle  # noqa: E402

NUM_CLIENTS = 16
TEXTS = ["Today Tom has", "Sort the numbers: 17 4 9", "Today Tom has 3 pears and", "Count from 3 to 7"]
PROBE = """
import http.client, sys, threading, time
worst, ended = 0.0, threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
while not ended.wait(0.01):
    begun = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=60)
    connection.request("GET", "/health")
    assert connection.getresponse().read() == b'{"status":"ok"}'
    connection.close()
    worst = max(worst, time.perf_counter() - begun)
print(worst)
"""


@dataclass
class Expected:
    """A request, and what `generate` makes of it.

    Attributes:
        texts (`list[str]`): of the choices.
        logprobs (`list[list[float]]`): of the tokens of each choice, where they are asked for.
    """

    path: str
    body: dict
    texts: list[str]
    logprobs: list[list[float]]


SETTINGS: list[dict] = [
    {},
    {"temperature": 1.5, "seed": 3},
    {"temperature": 2.0, "seed": 11, "top_p": 0.7},
    {"temperature": 0.8, "seed": 5, "top_k": 5, "block_length": 4},
    {"confidence_threshold": 0.6},
    {"preset": "fast"},
    {"block_cache": "prefix", "block_length": 4},
    {"block_cache": "dual", "block_length": 4, "temperature": 1.2, "seed": 8},
    {"block_cache": "frozen", "block_length": 4},
    {"remasking": "entropy", "max_denoising_steps": 3},
    {"suppress_tokens": [7, 8, 9], "repetition_penalty": 1.3},
    {"guidance_scale": 1.5},
]
"""Of `generate`; `seed` stands for a generator, and a `temperature` samples."""


def expectations(model, tokenizer) -> list[Expected]:
    """Distinct requests; each is made plain and as a stream."""

    def written(prompt: str | list[dict], settings: dict, count: int, stop: str | None) -> tuple[list, list]:
        if isinstance(prompt, list):
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        else:
            ids = tokenizer(prompt)["input_ids"]
        own = {name: value for name, value in settings.items() if name != "seed"} | {
            "do_sample": "temperature" in settings,
            "return_dict_in_generate": True,
            "output_trace": True,
        }
        texts, logprobs = [], []
        for index in range(count):
            if "seed" in settings:
                own["generator"] = torch.Generator().manual_seed(settings["seed"] + index)
            output = model.generate(torch.tensor([ids]), **own)
            tokens = output.sequences[0, len(ids) :].tolist()
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            texts.append(text if stop is None else text.partition(stop)[0])
            confidences = output.commit_confidences[0, len(ids) :].tolist()
            shown = [c for t, c in zip(tokens, confidences) if tokenizer.decode([t], skip_special_tokens=True)]
            logprobs.append([math.log(confidence) for confidence in shown])
        return texts, logprobs

    found = []
    for number, (settings, text) in enumerate(itertools.product(SETTINGS, TEXTS)):
        budget, count = 4 + number % 9, 2 if "seed" in settings and number % 3 == 0 else 1
        stop = [None, None, "o", " "][number % 4]
        has_logprobs = stop is None and number % 2 == 0
        body = {**settings, "n": count, **({} if stop is None else {"stop": stop}), "max_tokens": budget}
        given = settings | {"max_new_tokens": budget}
        if number % 3 == 1:
            prompt = [{"role": "user", "content": text}]
            texts, logprobs = written(prompt, given, count, stop)
            body |= {"messages": prompt} | ({"logprobs": True} if has_logprobs else {})
            path = "/v1/chat/completions"
        else:
            prompts = [text, TEXTS[number % len(TEXTS)]] if number % 5 == 0 else [text]
            parts = [written(prompt, given, count, stop) for prompt in prompts]
            texts, logprobs = (list(itertools.chain.from_iterable(each)) for each in zip(*parts))
            body |= {"prompt": prompts} | ({"logprobs": 0} if has_logprobs else {})
            path = "/v1/completions"
        found.append(Expected(path, body, texts, logprobs if has_logprobs else []))
    return found


def answered(server, expected: Expected, stream: bool) -> Expected:
    """What the server makes of the request, in the same form."""
    body = {**expected.body, "stream": stream, **({"stream_options": {"include_drafts": True}} if stream else {})}
    status, text, _ = server.post(body, expected.path)
    assert status == 200, text
    if stream:
        lines = [line.removeprefix("data: ") for line in text.split("\n") if line]
        assert lines.pop() == "[DONE]"
        choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    else:
        choices = json.loads(text)["choices"]
    texts, logprobs = [""] * len(expected.texts), [[] for _ in expected.texts]
    for choice in choices:
        message = choice.get("message") or choice.get("delta") or {}
        texts[choice["index"]] += choice.get("text") or message.get("content") or ""
        shown = choice["logprobs"] or {}
        tokens = shown.get("content", [])
        logprobs[choice["index"]] += shown.get("token_logprobs", [token["logprob"] for token in tokens])
    return Expected(expected.path, expected.body, texts, logprobs if expected.logprobs else [])


def hang_up(server, expected: Expected, chance: random.Random):
    """A client that is killed before it is answered, or as soon as the first byte of the answer is there."""
    connection = server.connect({**expected.body, "stream": chance.random() < 0.7}, expected.path)
    if chance.random() < 0.6:
        connection.recv(1)
    reset(connection) if chance.random() < 0.5 else connection.close()


@pytest.mark.parametrize(
    "count", [pytest.param(60, marks=pytest.mark.slow), pytest.param(2000, marks=pytest.mark.by_hand)]
)
def test_every_answer_under_load_is_generates(tmp_path, count):
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    asked = expectations(model, tokenizer)
    with ProcessServer(tmp_path / "log") as server:
        port = server.url.rpartition(":")[2]
        probe = subprocess.Popen(
            [sys.executable, "-c", PROBE, port], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

        def serve(number: int) -> tuple[Expected, Expected] | None:
            chance = random.Random(number)
            expected = asked[chance.randrange(len(asked))]
            if chance.random() < 0.15:
                return hang_up(server, expected, chance)
            return expected, answered(server, expected, stream=chance.random() < 0.5)

        resident, pairs = [], []
        with ThreadPoolExecutor(NUM_CLIENTS) as clients:
            for numbers in (range(count // 10), range(count // 10, count)):
                pairs += [pair for pair in clients.map(serve, numbers) if pair is not None]
                resident.append(psutil.Process(server.process.pid).memory_info().rss / 2**20)
        wait_until_idle(server)
        worst = float(probe.communicate()[0])
        wrong = [pair for pair in pairs if pair[0].texts != pair[1].texts]
        assert wrong == [] and len(pairs) > 0.75 * count
        for expected, actual in pairs:
            for own, other in zip(expected.logprobs, actual.logprobs, strict=True):
                assert other == pytest.approx(own, abs=1e-4)
        print(
            f"{count} requests, {count - len(pairs)} of them hung up; {resident[0]:.0f} MiB resident after the first "
            f"tenth and {resident[1]:.0f} at the end; /health took {1000 * worst:.0f} ms at most"
        )
        assert resident[1] - resident[0] < 64
    assert_is_quiet(server)
