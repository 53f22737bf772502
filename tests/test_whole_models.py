"""A checkpoint that lacks a tensor, or holds one too many, is an error, not a model with random weights."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from release_checkpoints import read_tensors, release, write_release, write_shards
from transformers import AutoModel

import illada  # noqa: F401
from illada.conversion import CheckpointError, export_to_hub_folder, load_whole_model

NORM = "model.norm.weight"


def broken(folder, way):
    """The golden iLLaDA checkpoint with a fault, and the problems that name it."""
    tensors = read_tensors(release("illada"))
    if way == "compiled":  # saved from a model that was compiled
        renamed = {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}
        return write_release(folder, "illada", tensors=renamed), {"missing": {*tensors}, "extra": {*renamed}}
    if way == "lost entry":
        write_release(folder, "illada")
        (folder / "model.safetensors").unlink()
        write_shards(folder, {"a.safetensors": [name for name in tensors if name != NORM]}, tensors)
        return folder, {"missing": {NORM}}
    tensors[NORM] = torch.ones(3)
    return write_release(folder, "illada", tensors=tensors), {"misshapen": {f"{NORM} [3] instead of [48]"}}


WAYS = ["compiled", "lost entry", "misshapen"]


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_is_not_whole_is_refused(tmp_path, way):
    folder, problems = broken(tmp_path / "source", way)
    with pytest.raises(CheckpointError) as raised:
        load_whole_model(folder)
    assert {kind: set(names) for kind, names in raised.value.problems.items()} == problems
    assert str(folder) in str(raised.value) and len(str(raised.value)) < 2000


@pytest.mark.parametrize("way", WAYS)
def test_export_merges_no_adapter_into_a_model_that_is_not_whole(tmp_path, way):
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(AutoModel.from_pretrained(release("illada")), config).save_pretrained(tmp_path / "adapter")
    folder, _ = broken(tmp_path / "source", way)
    with pytest.raises(CheckpointError, match="missing|misshapen"):
        export_to_hub_folder(folder, tmp_path / "out", adapter=tmp_path / "adapter")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["illada", "llada"])
def test_a_release_is_whole(family):
    expected = AutoModel.from_pretrained(release(family)).state_dict()
    state = load_whole_model(release(family)).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in expected.items())


def test_an_error_over_many_tensors_stays_readable():
    error = CheckpointError("here", {"missing": [f"t{index}" for index in range(300)]})
    assert str(error).endswith("t8, t9 and 290 more.") and len(error.problems["missing"]) == 300
