"""An exported checkpoint in the unmodified `transformers serve`, which does not import this package.

Transformers from 5.24 on loads the folder as it was exported. Those from 5.17 to 5.23 look for the name in
`architectures` among their own classes, and load the folder if its `config.json` says `AutoModelForCausalLM` there.
"""

import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
import torch
import transformers
from http_server import wait_until
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoTokenizer

from illada import EMBEDDED_MODEL
from illada.conversion.exporting import export_to_hub_folder

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")

LOADS_AS_EXPORTED = Version(transformers.__version__) >= Version("5.24")
MESSAGES = [{"role": "user", "content": "Tom has 2 apples. He buys 4 more. How many apples does Tom have now?"}]
PROMPT = "Today Tom has"


class Server:
    """A context manager: `transformers serve` as a process, in a folder from which this package is not found."""

    def __init__(self, folder, home, *options: str):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        address = ["--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu"]
        self.command = [
            sys.executable,
            "-m",
            "transformers.cli.transformers",
            "serve",
            str(folder),
            *address,
            *options,
        ]
        self.name, self.home, self.log = str(folder), home, home / "log"
        self.environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.environment |= {"HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "code"), "HF_HUB_OFFLINE": "1"}

    def __enter__(self):
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self.command, cwd=self.home, env=self.environment, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            wait_until(self._is_up, "the server does not start", 240)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception):
        self.process.kill()
        self.process.wait()

    def _is_up(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).status == 200
        except OSError:
            return False

    def post(self, path: str, **body) -> str:
        data = json.dumps({"model": self.name, **body}).encode()
        url = f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        try:
            return urllib.request.urlopen(request, timeout=120).read().decode()
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{error.code} {error.read().decode()}\n{self.log.read_text()[-3000:]}") from error


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export_to_hub_folder(EMBEDDED_MODEL, tmp_path_factory.mktemp("export") / "model")


@pytest.fixture(scope="module")
def texts():
    """What `generate` answers to the messages, and continues the prompt with."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL),
        AutoTokenizer.from_pretrained(EMBEDDED_MODEL),
    )
    chat = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    answers = []
    for ids, budget in ((chat, 40), (tokenizer(PROMPT)["input_ids"], 12)):
        tokens = model.generate(torch.tensor([ids]), max_new_tokens=budget)[0, len(ids) :]
        answers.append(tokenizer.decode(tokens, skip_special_tokens=True))
    return answers


def edit(folder):
    """What docs/serving.md tells to write, for versions that do not find the class otherwise."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["AutoModelForCausalLM"]}))


def check(folder, home, texts, *options: str):
    """Plain and streamed answers are the texts of `generate`."""
    answer, continuation = texts
    with Server(folder, home, "--trust-remote-code", *options) as server:
        chat = json.loads(server.post("/v1/chat/completions", messages=MESSAGES, max_tokens=40))
        assert chat["choices"][0]["message"]["content"] == answer
        stream = server.post("/v1/chat/completions", messages=MESSAGES, max_tokens=40, stream=True)
        events = [
            json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line.startswith("data: {")
        ]
        deltas = [event["choices"][0]["delta"].get("content") or "" for event in events]
        assert "".join(deltas) == answer and sum(map(bool, deltas)) > 1
        plain = json.loads(server.post("/v1/completions", prompt=PROMPT, max_tokens=12))
        assert plain["choices"][0]["text"] == continuation
    log = server.log.read_text()
    assert ("CB: True" in log) == bool(options) and "Traceback" not in log, log


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--continuous-batching",)], ids=["plain", "continuous-batching"])
def test_an_exported_checkpoint_is_served(exported, texts, tmp_path, options):
    if not LOADS_AS_EXPORTED:
        edit(exported)
    check(exported, tmp_path, texts, *options)


@pytest.mark.skipif(not LOADS_AS_EXPORTED, reason="there is no decision pipeline before Transformers 5.24")
def test_transformers_own_decisions_are_read_at_a_mask(exported):
    """The pipeline behind `/v1/systemone` gives what one forward says of a [MASK] after the prompt."""
    decide = transformers.pipeline("decision", model=str(exported))
    question = {"type": "choice", "instructions": "What <b>?", "criteria": {"apples": None, "pears": "the green"}}
    levels = {"type": "score", "instructions": "How many?", "criteria": ["none", "few", "many"]}
    answers = decide({"state": "Tom has 2 apples.", "questions": {"what": question, "number": levels}})

    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    for name, lines, labels in (
        ("what", "What <b>?\nA: apples\nB: pears - the green\nAnswer with one of A, B only.", "AB"),
        ("number", "How many?\nA: none\nB: few\nC: many\nAnswer with one of A, B, C only.", "ABC"),
    ):
        messages = [{"role": "user", "content": f"Tom has 2 apples.\n\n{lines}"}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*ids, tokenizer.mask_token_id]])).logits[0, -1]
        expected = logits[tokenizer.convert_tokens_to_ids(list(labels))].softmax(-1)
        assert list(answers[name]["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.slow
def test_the_edited_checkpoint_is_served_by_every_version(texts, tmp_path):
    folder = export_to_hub_folder(EMBEDDED_MODEL, tmp_path / "model")
    edit(folder)
    check(folder, tmp_path, texts)


@pytest.mark.slow
@pytest.mark.skipif(not LOADS_AS_EXPORTED, reason="loads only from Transformers 5.24 on")
def test_a_saved_model_is_served(texts, tmp_path):
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL).save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED_MODEL).save_pretrained(folder)
    check(folder, tmp_path, texts)
