"""Files of requests: what a line means, one answer to each line whatever happens, and bounded memory."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import psutil
import pytest
import torch
from filelock import FileLock
from processes import heed_interrupts
from test_cli import run
from tiny_models import random_model, tiny_tokenizer

import illada

pytest.importorskip("fastapi", reason="needs the extra `serve`")
from http_server import ThreadServer, wait_until  # noqa: E402

from illada.batch import answer_all  # noqa: E402
from illada.batch import lines as lines_module  # noqa: E402
from illada.batch.lines import Line, dump  # noqa: E402
from illada.batch.output import OutputFile  # noqa: E402

TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def model():
    return random_model(3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    """The folder of a tiny model."""
    folder = tmp_path_factory.mktemp("tiny")
    random_model(3, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def text_of(record: dict) -> str:
    choice = record["response"]["body"]["choices"][0]
    return choice["message"]["content"] if "message" in choice else choice["text"]


def some_requests(count: int) -> list[dict]:
    """Requests of many lengths and settings, greedy and sampled, plain and in OpenAI's form."""
    draw, requests = random.Random(0), []
    for index in range(count):
        prompt = "".join(draw.choices("abcdefgh", k=draw.randint(1, 12)))
        settings = {"max_tokens": draw.randint(1, 12), "block_length": draw.choice([4, 8])}
        settings |= draw.choice([{}, {"temperature": 1.5, "seed": draw.randint(0, 9)}, {"confidence_threshold": 0.3}])
        settings |= draw.choice([{}, {}, {"block_cache": "dual"}])
        if index % 3 == 0:
            body = {"messages": [{"role": "user", "content": prompt}], **settings}
            url = "/v1/chat/completions"
            requests.append({"custom_id": f"r{index}", "method": "POST", "url": url, "body": body})
        else:
            requests.append({"id": f"r{index}", "prompt": prompt, **settings})
    return requests


def answer_by_generate(model, tokenizer, request: dict) -> str:
    """The text that `generate` writes for one of `some_requests`."""
    body = request.get("body", request)
    text = body["prompt"] if "prompt" in body else f"{body['messages'][0]['content']} "
    input_ids = torch.tensor([tokenizer(text)["input_ids"]])
    names = ("block_length", "confidence_threshold", "block_cache", "seed")
    settings = {name: body[name] for name in names if name in body}
    if "temperature" in body:
        settings |= {"do_sample": True, "temperature": body["temperature"]}
    output = model.generate(input_ids, max_new_tokens=body["max_tokens"], **settings)
    return tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("in_order", [False, True])
def test_every_answer_is_that_of_generate(model, tokenizer, in_order):
    requests = some_requests(30)
    records = list(answer_all(model, tokenizer, requests, max_rows=3, in_order=in_order))
    numbers = [record["line"] for record in records]
    assert (numbers if in_order else sorted(numbers)) == list(range(1, 31))
    for record in records:
        request = requests[record["line"] - 1]
        assert record["custom_id"] == f"r{record['line'] - 1}"
        assert record["error"] is None and record["response"]["status_code"] == 200, record
        assert text_of(record) == answer_by_generate(model, tokenizer, request)
    assert len({record["id"] for record in records}) == 30


BODIES = [
    ("/v1/completions", {"prompt": "abc", "max_tokens": 4}),
    ("/v1/completions", {"prompt": ["ab", "cd"], "max_tokens": 3, "n": 2, "logprobs": 0, "seed": 3, "temperature": 2}),
    ("/v1/completions", {"prompt": "a<[MASK]*2>b", "max_tokens": 0}),
    ("/v1/completions", {"prompt": "abc", "suffix": "x", "max_tokens": 2}),
    ("/v1/completions", {"prompt": "abc", "max_tokens": 999}),
    ("/v1/completions", {"prompt": "abc", "tools": []}),
    ("/v1/completions", {"prompt": "abc", "model": "another"}),
    ("/v1/completions", {"prompt": "abc", "block_length": 0}),
    ("/v1/completions", {"prompt": float("nan")}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 4, "stop": "c"}),
    ("/v1/chat/completions", {"messages": []}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "ab"}], "response_format": {"type": "x"}}),
    ("/v1/infill", {"text": "ab<[MASK]>c"}),
    ("/v1/infill", {"text": "no blank"}),
    ("/v1/revise", {"text": "abcd", "fraction": 0.5}),
]


def test_a_body_means_what_it_means_over_http(model, tokenizer):
    """Every endpoint: the same answer, and the same refusal, but for what names the answer itself."""

    def without_names(body: dict) -> dict:
        return {key: value for key, value in body.items() if key not in ("id", "created")}

    requests = [
        {"custom_id": "", "method": "POST", "url": url, "body": {"model": "illada-tiny", **body}}
        for url, body in BODIES
    ]
    records = list(answer_all(model, tokenizer, requests, name="illada-tiny", in_order=True))
    with ThreadServer(model, tokenizer) as server:
        for (url, body), record in zip(BODIES, records, strict=True):
            status, text, _ = server.post({"model": "illada-tiny", **body}, url)
            assert record["response"]["status_code"] == status
            assert without_names(record["response"]["body"]) == without_names(json.loads(text)), body
    assert {record["response"]["status_code"] for record in records} == {200, 400, 404}


NO_REQUESTS = [
    (b"nonsense", None, "not valid JSON"),
    (b"[1]", None, "must be a JSON object, got '[1]'"),
    (b"\xff\xfe", None, "not valid UTF-8"),
    (b"[" * 100_000, None, "not valid JSON"),
    (b"1" * 5000, None, "JSON"),
    (b"{}", None, "must have `prompt`, `messages`, or"),
    (b'{"id": "x", "text": "a"}', "x", "must have `prompt`, `messages`, or"),
    (b'{"id": [1], "prompt": "a"}', None, "`id`"),
    (b'{"custom_id": "c", "method": "POST", "url": "/v1/completions"}', "c", "`body` field required"),
    (b'{"custom_id": "c", "method": "GET", "url": "/v1/completions", "body": {}}', "c", "`method`"),
    (b'{"custom_id": 7, "method": "POST", "url": "/v1/completions", "body": {}}', 7, "`custom_id`"),
    (b'{"custom_id": "c", "method": "POST", "url": "/health", "body": {}}', "c", "`url` must be one of /v1/chat"),
    (b'{"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": 3}', "c", "`body`"),
    (b'{"custom_id": "c", "prompt": "a"}', "c", "`method` field required"),
    (b'{"id": "s", "prompt": "a", "stream": true}', "s", "`stream` must be left out or false"),
]


@pytest.fixture
def batch(capsys, monkeypatch, tmp_path, checkpoint):
    """The command on `tmp_path`'s in.jsonl and out.jsonl: exit code, standard error, records."""
    monkeypatch.chdir(tmp_path)

    def run_batch(*options: str, data: bytes | None = None):
        if data is not None:
            (tmp_path / "in.jsonl").write_bytes(data)
        arguments = ["in.jsonl", "out.jsonl", "--model", str(checkpoint), *options]
        code, out, err = run(capsys, monkeypatch, "batch", *arguments)
        assert out == ""
        return code, err, records_of(tmp_path / "out.jsonl") if code == 0 else None

    return run_batch


def records_of(path) -> list[dict]:
    return [json.loads(text) for text in path.read_bytes().splitlines()] if path.is_file() else []


def as_lines(requests: list[dict]) -> bytes:
    return b"".join(dump(request) + b"\n" for request in requests)


def test_what_is_no_request_gets_an_error_and_the_rest_goes_on(batch):
    good = b'{"id": "good", "prompt": "abc", "max_tokens": 2}'
    data = b"\n".join([bad for bad, _, _ in NO_REQUESTS] + [good])
    code, err, records = batch("--in-order", data=data)
    assert code == 0 and len(records) == len(NO_REQUESTS) + 1
    for (_, custom_id, message), record in zip(NO_REQUESTS, records):
        assert record["response"] is None and record["custom_id"] == custom_id, record
        assert record["error"]["code"] == "invalid_line" and message in record["error"]["message"], record
        assert record["error"]["message"].endswith(".") and len(record["error"]["message"]) < 400
    assert records[-1]["custom_id"] == "good" and records[-1]["response"]["status_code"] == 200
    assert err == f"illada: {len(records)} lines in out.jsonl, {len(NO_REQUESTS)} with an error.\n"


def test_lines_of_any_making(batch, tokenizer, monkeypatch):
    """A byte order mark, CRLF, blank lines, no newline at the end, names in any script, and half a surrogate pair."""
    monkeypatch.setattr(lines_module, "MAX_LINE_BYTES", 200)
    one = '{{"id": {}, "prompt": "ab", "max_tokens": 1}}'.format
    data = b"".join(
        [
            b"\xef\xbb\xbf" + one('"first"').encode() + b"\r\n",
            b"\r\n  \t \n" + b" " * 100 + one('"größer \u65e5\u672c \u2028"').encode() + b"\r\n",
            one(r'"\ud800"').encode() + b"\n",
            one('"' + "x" * 200 + '"').encode() + b"\n",
            one('"' + "x" * 5000 + '"').encode() + b"\n",
            one("null").encode(),
        ]
    )
    code, err, records = batch("--in-order", data=data)
    assert code == 0 and [record["line"] for record in records] == [1, 4, 5, 6, 7, 8]
    names = [record["custom_id"] for record in records]
    assert names == ["first", "größer \u65e5\u672c \u2028", "\ud800", None, None, None]
    assert [record["error"] and record["error"]["message"] for record in records[3:]] == [
        "A line must have at most 200 bytes.",
        "A line must have at most 200 bytes.",
        None,
    ]


@pytest.mark.parametrize("data", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_an_empty_file_has_an_empty_answer(batch, tmp_path, data):
    for _ in range(2):
        code, err, records = batch(data=data)
        assert (code, records) == (0, []) and (tmp_path / "out.jsonl").read_bytes() == b""


def test_answers_come_as_they_are_finished_or_in_order(model, tokenizer):
    slow = {"prompt": "abc", "max_tokens": 40, "block_length": 8, "min_new_tokens": 40}
    quick = {"prompt": "abc", "max_tokens": 1}
    requests = [slow, *[quick] * 20]
    order = [record["line"] for record in answer_all(model, tokenizer, requests, max_rows=2)]
    assert order.index(1) > 5 and sorted(order) == list(range(1, 22))
    order = [record["line"] for record in answer_all(model, tokenizer, requests, max_rows=2, in_order=True)]
    assert order == list(range(1, 22))


@pytest.mark.parametrize("in_order", [False, True])
def test_the_generator_is_lazy_and_ends_its_work(model, tokenizer, in_order):
    """An endless source is read a little ahead of the records; whoever stops leaves no thread behind."""
    before, taken = threading.active_count(), 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield {"prompt": "ab", "max_tokens": 1}

    records = answer_all(model, tokenizer, endless(), max_rows=2, in_order=in_order)
    assert taken == 0 and threading.active_count() == before
    assert len(list(islice(records, 300))) == 300
    assert 300 <= taken <= 300 + 2 * 64
    records.close()
    wait_until(lambda: threading.active_count() == before, "a thread is left")


def test_it_works_where_an_event_loop_runs(model, tokenizer):
    """As in a notebook."""

    async def main():
        return list(answer_all(model, tokenizer, [{"prompt": "ab", "max_tokens": 1}]))

    assert len(asyncio.run(main())) == 1


def test_what_the_source_raises_is_raised(model, tokenizer):
    def broken():
        yield {"prompt": "ab", "max_tokens": 1}
        raise OSError("the source is gone")

    with pytest.raises(OSError, match="the source is gone"):
        list(answer_all(model, tokenizer, broken()))
    with pytest.raises(ValueError, match="`max_rows` must be at least 1, got 0"):
        answer_all(model, tokenizer, [], max_rows=0)


def test_lines_are_not_answered_by_an_engine_that_has_ended(model, tokenizer, monkeypatch):
    """They are left for the next run."""

    def end(manager):
        raise SystemExit("the device is gone")

    requests = ({"prompt": "ab", "max_tokens": 2} for _ in range(100))
    records = answer_all(model, tokenizer, requests)
    assert next(records)["response"]["status_code"] == 200
    monkeypatch.setattr("illada.continuous_batching.ContinuousBatchingManager._step", end)
    with pytest.raises(RuntimeError, match="The thread that runs the model has ended"):
        for record in records:
            assert record["response"]["status_code"] == 200


# The file of answers


def made_up_record(line: Line) -> dict:
    return line.record(f"r{line.number}", {"status_code": 200, "request_id": "x", "body": {"text": "é" * line.number}})


def test_a_file_that_is_cut_anywhere_is_continued(tmp_path):
    """After any byte: what is whole counts, a part of a record does not, and each line is there once."""
    lines = [Line(number, b"%d" % number) for number in (1, 2, 4, 7)]
    whole = b"".join(dump(made_up_record(line)) + b"\n" for line in lines)
    path = tmp_path / "out.jsonl"
    with OutputFile(path, {}):
        pass
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        with OutputFile(path, {}) as output:
            assert output.num_done == whole[:end].count(b"\n")
            assert output.check_lines(lines) == 4
            for line in lines:
                if not output.has(line):
                    output.write(made_up_record(line))
                output.write(made_up_record(line))  # a second time, which changes nothing
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda text: b"my own notes\n", "its line 1 is no record"),
        (lambda text: text + b'{"id": "batch_req_0", "line": 1}\n', "its line 5 is no record"),
        (lambda text: text + b"[]\n", "its line 5 is no record"),
        (lambda text: text + text.splitlines(keepends=True)[0], "its line 5 answers a line of `INPUT` for a second"),
    ],
)
def test_a_file_of_something_else_is_left_alone(batch, tmp_path, damage, message):
    data = as_lines([{"prompt": "ab", "max_tokens": 1}] * 4)
    assert batch(data=data)[0] == 0
    path = tmp_path / "out.jsonl"
    path.write_bytes(damage(path.read_bytes()))
    before = path.read_bytes()
    code, err, _ = batch()
    assert code == 2 and len(err.splitlines()) == 1 and "`OUTPUT`" in err and message in err, err
    assert path.read_bytes() == before


def test_a_file_that_was_there_is_left_alone(batch, tmp_path):
    (tmp_path / "out.jsonl").write_bytes(b"notes")
    code, err, _ = batch(data=as_lines([{"prompt": "ab"}]))
    assert code == 2 and "was not begun by `illada batch`" in err
    assert (tmp_path / "out.jsonl").read_bytes() == b"notes"


def test_a_changed_input_is_refused_and_a_longer_one_continued(batch, tmp_path):
    requests = [{"prompt": letter, "max_tokens": 1} for letter in "abcd"]
    assert batch(data=as_lines(requests))[0] == 0
    first = (tmp_path / "out.jsonl").read_bytes()
    changed = [requests[0], {"prompt": "z", "max_tokens": 1}, *requests[2:]]
    for data, message in (
        (as_lines(changed), "line 2 of `INPUT` has changed"),
        (as_lines(requests[:3]), "no more all the lines"),
        (b"\n" + as_lines(requests), "line 2 of `INPUT` has changed"),
    ):
        code, err, _ = batch(data=data)
        assert code == 2 and message in err and len(err.splitlines()) == 1, err
        assert (tmp_path / "out.jsonl").read_bytes() == first
    code, err, records = batch(data=as_lines([*requests, {"prompt": "e", "max_tokens": 1}]))
    assert code == 0 and len(records) == 5 and (tmp_path / "out.jsonl").read_bytes().startswith(first)


def test_changed_options_are_refused_by_name(batch, tmp_path, checkpoint):
    data = as_lines([{"prompt": "ab", "max_tokens": 1}])
    assert batch("--steps", "2", data=data)[0] == 0
    for options, name in (
        ([], "--steps"),
        (["--steps", "3"], "--steps"),
        (["--steps", "2", "--in-order"], "--in-order"),
        (["--steps", "2", "--block-cache", "dual"], "--block-cache"),
        (["--steps", "2", "--max-new-tokens", "5"], "--max-new-tokens"),
        (["--steps", "2", "--name", "x"], "--name"),
        (["--steps", "2", "--dtype", "bfloat16"], "--dtype"),
        (["--steps", "2", "--model", "illada-tiny"], "--model"),
    ):
        code, err, _ = batch(*options)
        assert code == 2 and err.startswith(f"illada: `{name}` must be") and len(err.splitlines()) == 1, err
        assert len(records_of(tmp_path / "out.jsonl")) == 1
    assert batch("--steps", "2", "--max-rows", "3")[0] == 0  # nothing that an answer depends on


def test_records_that_are_taken_out_are_written_again(batch, tmp_path):
    data = as_lines([{"prompt": letter, "max_tokens": 3} for letter in "abcd"])
    _, _, before = batch(data=data)
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))
    _, _, after = batch()
    assert sorted(record["id"] for record in before) == sorted(record["id"] for record in after)


@pytest.mark.parametrize("order", [[], ["--in-order"]])
def test_paths_that_cannot_be_used(batch, capsys, monkeypatch, tmp_path, order):
    (tmp_path / "in.jsonl").write_bytes(as_lines([{"prompt": "ab"}]))
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.jsonl").symlink_to("in.jsonl")
    os.link(tmp_path / "in.jsonl", tmp_path / "hard.jsonl")
    for arguments, name in (
        (["folder", "out.jsonl"], "INPUT"),
        (["missing.jsonl", "out.jsonl"], "INPUT"),
        (["/dev/null", "out.jsonl"], "INPUT"),
        (["in.jsonl", "folder"], "OUTPUT"),
        (["in.jsonl", "/dev/null"], "OUTPUT"),
        (["in.jsonl", "in.jsonl"], "OUTPUT"),
        (["in.jsonl", "link.jsonl"], "OUTPUT"),
        (["in.jsonl", "hard.jsonl"], "OUTPUT"),
        (["in.jsonl", "no/out.jsonl"], "OUTPUT"),
    ):
        code, out, err = run(capsys, monkeypatch, "batch", *arguments, *order)
        assert (code, out) == (2, "") and f"`{name}`" in err and len(err.splitlines()) == 1, err
    assert len(list(tmp_path.iterdir())) == 4 and (tmp_path / "in.jsonl").stat().st_size


def test_a_second_process_is_refused(batch, tmp_path):
    data = as_lines([{"prompt": "ab", "max_tokens": 1}])
    with FileLock(tmp_path / ".out.jsonl.lock"):
        code, err, _ = batch(data=data)
        assert code == 1 and "is being written by another process" in err
        assert not (tmp_path / "out.jsonl").exists()
    assert batch()[0] == 0 and not (tmp_path / ".out.jsonl.lock").exists()


def test_a_terminal_shows_progress_and_a_pipe_nothing(batch, monkeypatch):
    data = as_lines([{"prompt": letter, "max_tokens": 1} for letter in "abc"])
    assert len(batch(data=data)[1].splitlines()) == 1
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal then
    code, err, _ = batch(data=data + as_lines([{"prompt": "d", "max_tokens": 1}] * 3))
    assert code == 0 and "6/6" in err and "lines/s" in err and "0:00:00" in err


def test_a_full_disk_is_one_line(batch, monkeypatch):
    def full(self, record):
        raise OSError(28, "No space left on device")

    data = as_lines([{"prompt": "a", "max_tokens": 1}] * 40)
    with monkeypatch.context() as patched:
        patched.setattr(OutputFile, "write", full)
        code, err, _ = batch(data=data)
        assert code == 1 and err == "illada: [Errno 28] No space left on device\n"
    assert batch()[0] == 0


# Processes


def start(tmp_path, checkpoint, *options: str, **settings) -> subprocess.Popen:
    command = [sys.executable, "-m", "illada", "batch", "in.jsonl", "out.jsonl", "--model", str(checkpoint), *options]
    environment = {**os.environ, "PYTHONPATH": str(Path(illada.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, preexec_fn=heed_interrupts, **settings
    )


def wait_for_records(process: subprocess.Popen, path, count: int):
    """Returns when the file has so many lines, or the process has ended."""

    def is_there() -> bool:
        return process.poll() is not None or (path.is_file() and path.read_bytes().count(b"\n") >= count)

    wait_until(is_there, f"there are never {count} records")


def survive(tmp_path, checkpoint, batch, num_kills: int, seed: int, *options: str):
    """Kills a run at random moments, starts it again, and compares what there is in the end."""
    draw = random.Random(seed)
    num_lines = 60 * num_kills
    requests = [
        request | {"id": index} for index, request in enumerate(some_requests(num_lines)) if "prompt" in request
    ]
    (tmp_path / "in.jsonl").write_bytes(as_lines(requests))
    path = tmp_path / "out.jsonl"
    counts = []
    for _ in range(num_kills):
        process = start(tmp_path, checkpoint, *options)
        done = path.read_bytes().count(b"\n") if path.is_file() else 0
        wait_for_records(process, path, done + draw.randint(0, 40))
        time.sleep(draw.random() * 0.05)
        process.kill()
        process.communicate()
        counts.append(path.read_bytes().count(b"\n") if path.is_file() else 0)
    code, err, records = batch(*options)
    numbers = [record["line"] for record in records]
    assert code == 0 and sorted(numbers) == list(range(1, len(requests) + 1)), counts
    assert sorted(numbers) == numbers or "--in-order" not in options
    model = random_model(3, dtype=torch.float32)
    for record in records:
        request = requests[record["line"] - 1]
        assert record["custom_id"] == request["id"]
        assert text_of(record) == answer_by_generate(model, tiny_tokenizer(), request)
    print("records after each kill:", counts, "of", len(requests))


@pytest.mark.slow
def test_killed_and_started_again_it_writes_each_line_once(tmp_path, checkpoint, batch):
    survive(tmp_path, checkpoint, batch, 2, 0)


@pytest.mark.by_hand
@pytest.mark.parametrize("options", [[], ["--in-order"]])
def test_ten_kills(tmp_path, checkpoint, batch, options):
    survive(tmp_path, checkpoint, batch, 10, 1, *options)


@pytest.mark.slow
def test_an_interrupt_says_how_to_go_on(tmp_path, checkpoint, batch):
    """And a standard output that nobody reads is no matter, since nothing is written there."""
    requests = [{"id": index, "prompt": "abc", "max_tokens": 8} for index in range(400)]
    (tmp_path / "in.jsonl").write_bytes(as_lines(requests))
    reader, writer = os.pipe()
    os.close(reader)
    process = start(tmp_path, checkpoint, stdout=writer)
    os.close(writer)
    wait_for_records(process, tmp_path / "out.jsonl", 5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert err.decode() == "illada: interrupted; the same command continues out.jsonl.\n"
    assert 5 <= len(records_of(tmp_path / "out.jsonl")) < 400
    code, _, records = batch()
    assert code == 0 and sorted(record["custom_id"] for record in records) == list(range(400))


@pytest.mark.by_hand
def test_memory_is_bounded(tmp_path, checkpoint):
    """10,000 lines: after the first tenth, the process takes no more."""
    requests = ({"prompt": "abcd" * 5, "max_tokens": 4, "user": "x" * 2000} for _ in range(10_000))
    (tmp_path / "in.jsonl").write_bytes(as_lines(requests))
    path = tmp_path / "out.jsonl"
    process = start(tmp_path, checkpoint)
    sizes = []
    for count in range(1000, 10_001, 1000):
        deadline = time.monotonic() + 300
        while process.poll() is None and (not path.is_file() or path.read_bytes().count(b"\n") < count):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        if process.poll() is None:
            sizes.append(psutil.Process(process.pid).memory_info().rss / 2**20)
    assert process.wait() == 0 and len(records_of(path)) == 10_000
    print("MiB at each thousand lines:", [round(size) for size in sizes])
    assert len(sizes) >= 8 and max(sizes) - sizes[0] < 16
