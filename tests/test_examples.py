"""The example scripts run, each with small settings; the embedded model stands in for the 8B checkpoint."""

import json
import sys
from pathlib import Path

import pytest

import illada
from illada.tiny.corpus import FAMILIES, held_out_examples

EXAMPLES = Path(illada.__file__).parents[1] / "examples"
SMALL = [
    "max_steps=2",
    "length=64",
    "per_device_train_batch_size=2",
    "lr_scheduler_type=constant",
    "lr_scheduler_kwargs={}",
    "save_strategy=no",
    "use_cpu=true",
    "disable_tqdm=true",
]


@pytest.fixture
def run_example(tmp_path, monkeypatch):
    def run(name: str, *arguments: str, settings: list[str] = SMALL):
        """Runs a copy, in which every released name is that of the embedded model."""
        for suffix in (".py", ".yaml"):
            text = (EXAMPLES / f"{name}{suffix}").read_text().replace('device_map="auto"', 'device_map="cpu"')
            text = text.replace("GSAI-ML/iLLaDA-8B-Instruct", str(illada.EMBEDDED_MODEL))
            (tmp_path / f"{name}{suffix}").write_text(text)
        script = tmp_path / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(script), *arguments, *settings])
        exec(compile(script.read_text(), str(script), "exec"), {"__name__": "__main__", "__file__": str(script)})

    return run


@pytest.fixture
def chats(tmp_path) -> str:
    examples = [example for family in FAMILIES for example in held_out_examples(family, 4) if example.prompt]
    lines = [
        {"messages": [{"role": "user", "content": e.prompt}, {"role": "assistant", "content": e.text}]}
        for e in examples
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_pretrain_from_scratch(run_example, tmp_path, capsys):
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps({"text": f"Tom has {n} apples."}) + "\n" for n in range(40)))
    run_example("pretrain_from_scratch", str(documents), str(tmp_path / "model"))
    assert "nats per token" in capsys.readouterr().out
    assert (tmp_path / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["finetune_on_chats", "lora", "lora_8b"])
def test_examples_on_chats(run_example, chats, tmp_path, capsys, name):
    run_example(name, chats, str(tmp_path / "output"), "Sort the numbers: 3 1 2")
    assert capsys.readouterr().out.strip()
    is_adapter = (tmp_path / "output" / "adapter_model.safetensors").is_file()
    assert is_adapter == name.startswith("lora")
    assert (tmp_path / "output" / "model.safetensors").is_file() != is_adapter


@pytest.mark.parametrize("name", ["pretrain_from_scratch", "finetune_on_chats", "lora", "lora_8b"])
def test_without_arguments_an_example_says_how_it_is_called(run_example, name):
    with pytest.raises(SystemExit, match=rf"(?s)python examples/{name}\.py \w+\.jsonl"):
        run_example(name, settings=[])
