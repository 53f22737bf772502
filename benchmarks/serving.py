"""Answers per second and latency of `illada serve`: `python benchmarks/serving.py`.

The server is a process, asked over HTTP for streams of chat completions. Random weights are written to a checkpoint
whose settings are the prefix cache, blocks of 32 and no EOS, so that every request costs the same work at every load:
a prompt of 16 to 256 tokens, drawn with a fixed seed, and an answer of `--answer` tokens.

- closed loop: so many clients, each of which asks again as soon as it has its answer;
- open loop: requests arrive at random (Poisson), at a share of the most answers per second that the closed loop gave
  in the same round, whether or not earlier ones are answered.

Time to the first text is that to the first event with text: a diffusion model settles positions in any order, so this
is where the answer's first token was committed. `--beside transformers-serve` has the unmodified server of
Transformers answer the same requests from the same checkpoint in the same round. Answers per second are medians over
rounds, ratios are taken within a round, and percentiles are over all requests of all rounds.
"""

import asyncio
import itertools
import json
import platform
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated

import httpx
import matplotlib
import torch
import transformers
import typer
from matplotlib import pyplot as plt
from speed import DOCS, SHAPES, Shape, machine
from throughput import ROWS, traffic
from transformers import AutoTokenizer

from illada import EMBEDDED_MODEL, ILLaDAConfig, ILLaDAForCausalLM

matplotlib.use("Agg")

OURS = "illada serve"
THEIRS = "transformers serve"
Beside = Enum("Beside", {"transformers_serve": "transformers-serve"})


@dataclass
class Answer:
    """When an answer came, in seconds after its request."""

    first_text: float
    last_text: float


@dataclass
class Measurement:
    """One load in one round.

    Attributes:
        load (`str`): for instance "8 clients", or "open, 0.6".
        seconds (`float`): from the first request to the last answer.
        rate (`float`, *optional*): of arrivals per second, in an open loop.
        rows (`float`, *optional*): texts written at a time, on average over the passes.
    """

    server: str
    load: str
    round: int
    seconds: float
    answers: list[Answer]
    rate: float | None = None
    rows: float | None = None

    @property
    def answers_per_second(self) -> float:
        return len(self.answers) / self.seconds


# The servers


def write_checkpoint(folder: Path, shape: str, num_positions: int) -> list[str]:
    """Random weights, with the embedded model's tokenizer and a word for each token that it lacks; returns these."""
    torch.manual_seed(0)
    config = ILLaDAConfig(**SHAPES[shape], max_position_embeddings=num_positions)
    model = ILLaDAForCausalLM(config).eval()
    settings = {"block_cache": "prefix", "block_length": 32, "suppress_tokens": [config.eos_token_id]}
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    words = [f" word{number}" for number in range(len(tokenizer), config.vocab_size)]
    tokenizer.add_tokens(words)
    tokenizer.save_pretrained(folder)
    return words


@contextmanager
def serving(command: list[str], log: Path, is_up: str) -> Iterator[str]:
    """The URL of a server that `command` starts, once `is_up` answers there.

    Raises:
        RuntimeError: if it does not come up.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as file:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 120
        while not _answers(url + is_up):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{' '.join(command)} did not come up:\n{log.read_text()[-2000:]}")
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


# The clients


async def ask(client: httpx.AsyncClient, body: dict) -> Answer:
    """Reads the stream of one answer, and makes sure that all of it was written."""
    begun, first, reason = time.perf_counter(), None, None
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"status {response.status_code}: {(await response.aread()).decode()[:500]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RuntimeError(str(event["error"]))
            choice = event["choices"][0]
            if first is None and choice.get("delta", {}).get("content"):
                first = time.perf_counter() - begun
            reason = choice.get("finish_reason") or reason
    if reason != "length":
        raise RuntimeError(f"An answer ended with {reason!r}, and should have used up its budget.")
    last = time.perf_counter() - begun
    return Answer(last if first is None else first, last)


async def closed_loop(client: httpx.AsyncClient, bodies: list[dict], num_clients: int) -> list[Answer]:
    """So many clients share the requests; each asks for the next as soon as it has its answer."""
    waiting, answers = iter(bodies), []

    async def ask_again():
        for body in waiting:
            answers.append(await ask(client, body))

    await asyncio.gather(*(ask_again() for _ in range(num_clients)))
    return answers


async def open_loop(client: httpx.AsyncClient, bodies: list[dict], rate: float, seed: int) -> list[Answer]:
    """Requests arrive by chance, `rate` of them per second."""
    chance, tasks = random.Random(seed), []
    for body in bodies:
        tasks.append(asyncio.create_task(ask(client, body)))
        await asyncio.sleep(chance.expovariate(rate))
    return await asyncio.gather(*tasks)


def bodies_of(lengths: list[int], words: list[str], model: str, num_tokens: int) -> list[dict]:
    """A message of so many tokens each, all words that are one."""
    chance = random.Random(0)
    texts = ["".join(chance.choices(words, k=length)) for length in lengths]
    shared = {"model": model, "max_tokens": num_tokens, "stream": True}
    return [{"messages": [{"role": "user", "content": text}], **shared} for text in texts]


# The measurement


class Bench:
    """Measures servers, and keeps what it has measured."""

    def __init__(self, urls: dict[str, str], bodies: dict[str, list[dict]]):
        self.urls, self.bodies = urls, bodies
        self.measurements: list[Measurement] = []

    async def measure(self, server: str, load: str, number: int, rate: float | None = None) -> Measurement:
        bodies = self.bodies[server]
        async with httpx.AsyncClient(base_url=self.urls[server], timeout=600) as client:
            before, begun = await self._passes(client, server), time.perf_counter()
            if rate is None:
                answers = await closed_loop(client, bodies, int(load.split()[0]))
            else:
                answers = await open_loop(client, bodies, rate, seed=number)
            seconds = time.perf_counter() - begun
            after = await self._passes(client, server)
        rows = (after[1] - before[1]) / (after[0] - before[0]) if before else None
        measured = Measurement(server, load, number, seconds, answers, rate, rows)
        self.measurements.append(measured)
        print(f"round {number}, {server}, {load}: {measured.answers_per_second:.3f} answers/s", flush=True)
        return measured

    async def _passes(self, client: httpx.AsyncClient, server: str) -> tuple[float, float] | None:
        if server != OURS:
            return None
        lines = (await client.get("/metrics")).text.splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return float(values["illada_passes_total"]), float(values["illada_row_passes_total"])

    async def run(self, clients: list[int], shares: list[float], beside_clients: list[int], rounds: int):
        for server in self.urls:  # warm up
            async with httpx.AsyncClient(base_url=self.urls[server], timeout=600) as client:
                await ask(client, self.bodies[server][0])
        for number in range(rounds):
            closed = [await self.measure(OURS, _clients(count), number) for count in clients]
            most = max(measured.answers_per_second for measured in closed)
            for share in shares:
                await self.measure(OURS, f"open, {share:g}", number, rate=share * most)
            for server in self.urls.keys() - {OURS}:
                for count in beside_clients:
                    await self.measure(server, _clients(count), number)


def _clients(count: int) -> str:
    return f"{count} client{'s' * (count > 1)}"


# The page


def summary(measurements: list[Measurement]) -> list[dict]:
    """A line for each server and load."""
    lines = []
    for server, load in dict.fromkeys((measured.server, measured.load) for measured in measurements):
        own = [measured for measured in measurements if (measured.server, measured.load) == (server, load)]
        base = {
            measured.round: measured
            for measured in measurements
            if (measured.server, measured.load) == (OURS, _clients(1))
        }
        answers = list(itertools.chain.from_iterable(measured.answers for measured in own))
        is_closed = own[0].rate is None
        lines.append(
            {
                "server": server,
                "load": load,
                "rate": None if is_closed else median(measured.rate for measured in own),
                "answers_per_second": median(measured.answers_per_second for measured in own),
                "beside_one_client": [
                    measured.answers_per_second / base[measured.round].answers_per_second
                    for measured in own
                    if is_closed and measured.round in base
                ],
                "rows": None if own[0].rows is None else median(measured.rows for measured in own),
                "first_text": _percentiles([answer.first_text for answer in answers]),
                "last_text": _percentiles([answer.last_text for answer in answers]),
            }
        )
    return lines


def _percentiles(seconds: list[float]) -> tuple[float, float]:
    """The 50th and the 95th."""
    cuts = quantiles(seconds, n=100, method="inclusive")
    return cuts[49], cuts[94]


def write_page(path: Path, results: dict, lines: list[dict]):
    rows = []
    for line in lines:
        cells = [line["server"], line["load"], f"{line['answers_per_second']:.2f}"]
        cells.append(f"{median(line['beside_one_client']):.2f}" if line["beside_one_client"] else "")
        cells.append("" if line["rows"] is None else f"{line['rows']:.1f}")
        cells += [f"{seconds:.2f}" for seconds in (*line["first_text"], *line["last_text"])]
        rows.append(f"| {' | '.join(cells)} |")
    spread = "; ".join(
        f"{line['server']}, {line['load']}: {', '.join(f'{ratio:.2f}' for ratio in line['beside_one_client'])}"
        for line in lines
        if line["beside_one_client"] and line["load"] != _clients(1)
    )
    path.write_text(
        f"""# The server's speed

What clients of `illada serve` wait for, asked over HTTP for streams. Made by `python benchmarks/serving.py`; the
docstring there says what is measured.

{results["requests"]} requests with prompts of 16 to {results["longest_prompt"]} tokens and answers of
{results["answer"]} at each load, shape `{results["shape"]}` with random weights, prefix cache, {ROWS} rows;
{results["machine"]}. Rounds: {results["rounds"]}.{results["note"]}

| server | load | answers/s | beside one client | rows in use | first text, s | its 95th | last text, s | its 95th |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}

Seconds from a request to its first and its last text: the 50th percentile, and beside it the 95th. "Open" is a share
of the most answers per second of the closed loop, at which requests arrive. "Beside one client" is the ratio of
answers per second to those of `illada serve` with one client in the same round, and the median is given. Each round:
{spread or "one client only"}.

A closed loop counts its end, when fewer requests than clients are left.

![Answers per second](serving_speed.png)
""",
        encoding="utf-8",
    )
    _plot(path.with_suffix(".png"), results, lines)


def _plot(path: Path, results: dict, lines: list[dict]):
    figure, (closed, opened) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for server in dict.fromkeys(line["server"] for line in lines):
        own = [line for line in lines if line["server"] == server and line["rate"] is None]
        counts = [int(line["load"].split()[0]) for line in own]
        closed.plot(counts, [line["answers_per_second"] for line in own], "o-", label=server)
    closed.set(xlabel="clients", ylabel="answers per second", title="Closed loop", ylim=0)
    closed.legend(fontsize=8)
    own = [line for line in lines if line["rate"] is not None]
    for name, key, style in (("first text", "first_text", "o-"), ("last text", "last_text", "s-")):
        for label, index, fill in (("median", 0, "full"), ("95th percentile", 1, "none")):
            values = [line[key][index] for line in own]
            opened.plot([line["rate"] for line in own], values, style, fillstyle=fill, label=f"{name}, {label}")
    opened.set(xlabel="arrivals per second", ylabel="seconds", title="Open loop", ylim=0)
    if own:
        opened.legend(fontsize=8)
    for axes in (closed, opened):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Shape {results['shape']}, {results['machine']}", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(
    shape: Annotated[Shape, typer.Option(help="Model.")] = Shape["30m"],
    clients: Annotated[list[int], typer.Option(help="Clients of a closed loop; repeatable.")] = [1, 2, 4, 8, 16],  # noqa: B006
    share: Annotated[
        list[float], typer.Option(help="Arrivals of an open loop, as a share of the most answers/s; 0 is none.")
    ] = [0.3, 0.6, 0.9],  # noqa: B006
    requests: Annotated[int, typer.Option(help="Requests at each load.", min=2)] = 24,
    longest_prompt: Annotated[int, typer.Option(help="In tokens.", min=16)] = 256,
    answer: Annotated[int, typer.Option(help="Tokens of an answer.", min=1)] = 32,
    rounds: Annotated[int, typer.Option(min=1)] = 2,
    beside: Annotated[Beside | None, typer.Option(help="Another server to measure in the same rounds.")] = None,
    beside_clients: Annotated[list[int], typer.Option(help="Its clients; repeatable.")] = [1, 8],  # noqa: B006
    device: Annotated[str, typer.Option()] = "cuda" if torch.cuda.is_available() else "cpu",
    page: Annotated[Path, typer.Option(help="Page to write, with a plot beside it.")] = DOCS / "serving_speed.md",
):
    """Measures, prints, and writes a page with a table and a plot."""
    if torch.device(device).type == "cpu" and shape.name == "8b":
        raise typer.BadParameter("shape 8b is meant for a GPU.")
    lengths = [len(request["input_ids"]) for request in traffic(requests, longest_prompt, longest_answer=32)]
    with tempfile.TemporaryDirectory() as place, ExitStack() as servers:
        folder, checkpoint = Path(place), Path(place) / "model"
        words = write_checkpoint(checkpoint, shape.name, max(1024, 2 * longest_prompt + answer))
        command = [sys.executable, "-m", "illada", "serve", "--model", str(checkpoint), "--device", device]
        url = servers.enter_context(serving([*command, "--max-rows", str(ROWS)], folder / "log", "/health"))
        urls, bodies, note = {OURS: url}, {OURS: bodies_of(lengths, words, checkpoint.name, answer)}, ""
        if beside is not None:
            try:
                command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(checkpoint)]
                command += ["--trust-remote-code", "--device", device]
                urls[THEIRS] = servers.enter_context(serving(command, folder / "log of theirs", "/health"))
                bodies[THEIRS] = bodies_of(lengths, words, str(checkpoint), answer)
            except RuntimeError as error:
                print(f"`{THEIRS}` is left out: {error}", flush=True)
                note = f" `{THEIRS}` could not be started."
        bench = Bench(urls, bodies)
        asyncio.run(bench.run(clients, [each for each in share if each > 0], beside_clients, rounds))
    lines = summary(bench.measurements)
    for line in lines:
        print(line)
    shown = f"{torch.get_num_threads()} threads on {platform.machine()}" if device == "cpu" else machine(device)
    results = {
        "shape": shape.name,
        "requests": requests,
        "longest_prompt": longest_prompt,
        "answer": answer,
        "rounds": rounds,
        "note": note,
        "machine": f"{shown}, torch {torch.__version__}, Transformers {transformers.__version__}",
    }
    write_page(page, results, lines)


if __name__ == "__main__":
    typer.run(main)
