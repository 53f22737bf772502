"""More than one device: two processes with tensor parallelism, and layers placed by a device map."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensor_parallel import generate
from tiny_models import random_model
from transformers import AutoModelForCausalLM

TESTS = Path(__file__).parent


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    # Transformers 5.20 splits a head only if its size is a multiple of the processes.
    model = random_model(0, vocab_size=38, num_layers=3, num_attention_heads=4, num_key_value_heads=2)
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def one_process(checkpoint: Path) -> list:
    return generate(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64))


@pytest.mark.slow
def test_tensor_parallel_processes_write_what_one_writes(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{TESTS.parent}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output = tmp_path / "texts.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*launch, TESTS / "tensor_parallel.py", checkpoint, output], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    parallel = json.loads(output.read_text())
    assert parallel["local_rows"] == 8  # each process holds half of the 16 query rows
    assert parallel["texts"] == one_process(checkpoint)


def test_layers_on_several_devices_write_what_one_writes(checkpoint, tmp_path):
    """One layer lives on disk and is fetched by hooks for each pass, as `device_map="auto"` does where memory ends."""
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    for device_map in ("auto", places):
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float64, device_map=device_map, offload_folder=tmp_path / "offload"
        )
        assert generate(model) == one_process(checkpoint)
    assert model.model.layers[1].mlp.up_proj.weight.device.type == "meta"
