import json
import pickle
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from release_checkpoints import (
    FIXTURES,
    HEADS,
    contents,
    copy_release,
    read_tensors,
    release,
    write_release,
    write_shards,
)
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from illada import ILLaDAConfig, ILLaDAForCausalLM
from illada.conversion import CheckpointError, convert
from illada.llada_names import llada_name, standard_name

FAMILIES = ["illada", "llada"]
ONE_SHARD, MANY_SHARDS = "5GB", "50KB"


def assert_same_tensors(folder, other):
    tensors, others = read_tensors(folder), read_tensors(other)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), others[name].view(torch.uint8)), name


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shard_size", [ONE_SHARD, MANY_SHARDS], ids=["one-shard", "many-shards"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_exact(tmp_path, family, dtype, shard_size, tied):
    source = write_release(tmp_path / "release", family, dtype, tied, num_files=1 if shard_size == ONE_SHARD else 3)
    before = contents(source)
    standard = convert(source, tmp_path / "standard", max_shard_size=shard_size)
    back = convert(standard.out, tmp_path / "back", to=family, max_shard_size=shard_size)
    assert_same_tensors(source, back.out)
    assert contents(source) == before
    assert (standard.num_shards > 1) == (shard_size == MANY_SHARDS)
    assert standard.tied == tied and standard.dtype == dtype
    # The model fits in memory, so that both formats were run.
    assert standard.num_layers_compared == back.num_layers_compared == {"illada": 3, "llada": 2}[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_golden_release_becomes_a_standard_checkpoint(tmp_path, family):
    out = convert(release(family), tmp_path / "out").out
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "illada" and config["architectures"] == ["ILLaDAForCausalLM"]
    assert config["mask_token_id"] == 5 and config["dtype"] == "float32"
    assert not {"auto_map", "torch_dtype", "rope_theta", "d_model", "block_type"} & set(config)

    golden = load_file(FIXTURES / family / "logits.safetensors")
    model = AutoModel.from_pretrained(out)
    assert type(model) is ILLaDAForCausalLM
    assert model.config.rope_full_precision == (family == "llada")
    with torch.no_grad():
        logits = model(golden["input_ids"]).logits
    torch.testing.assert_close(logits, golden["logits_no_mask"], atol=1e-4, rtol=0)


def test_a_converted_llada_generates_the_golden_runs(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(convert(release("llada"), tmp_path / "out").out)
    for run in json.loads((FIXTURES / "llada" / "generation.json").read_text()):
        output = model.generate(
            torch.tensor([run["prompt"]]),
            max_new_tokens=run["gen_length"],
            block_length=run["block_length"],
            max_denoising_steps=run["steps"] * run["block_length"] // run["gen_length"],
            eos_token_id=None,
        )
        assert output[0].tolist() == run["sequence"]


@pytest.mark.parametrize(("family", "canvas"), [("illada", "growing"), ("llada", "fixed")])
def test_generation_settings_are_completed_and_kept(tmp_path, family, canvas):
    source = copy_release(tmp_path / "source", family)
    stated = {"_from_model_config": True, "temperature": 0.3, "do_sample": True, "pad_token_id": 7}
    (source / "generation_config.json").write_text(json.dumps(stated))
    settings = AutoModel.from_pretrained(convert(source, tmp_path / "out").out).generation_config
    assert (settings.temperature, settings.do_sample, settings.pad_token_id) == (0.3, True, 7)
    assert (settings.eos_token_id, settings.mask_token_id, settings.canvas) == (2, 5, canvas)


def test_the_tokenizer_is_carried_over_and_knows_its_mask(tmp_path):
    source = copy_release(tmp_path / "source", "illada", vocab_size=160)
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\nText.\n")
    (source / "LICENSE").write_text("Text.")
    (source / "modeling_illada.py").write_text("raise RuntimeError")
    assert AutoTokenizer.from_pretrained(source).mask_token is None
    out = convert(source, tmp_path / "out").out
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == ("<[MASK]>", 5)
    assert tokenizer("w7 <[MASK]> w9").input_ids == [7, 5, 9]
    message = [{"role": "user", "content": "w8"}]
    assert tokenizer.apply_chat_template(message, return_dict=False) == [8, 9]
    for name in ("tokenizer.json", "README.md", "LICENSE"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert not list(out.glob("*.py"))


def test_a_tokenizer_of_another_mask_is_refused(tmp_path):
    source = copy_release(tmp_path / "source", "illada", vocab_size=160)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**settings, "mask_token": "w9"}))
    with pytest.raises(ValueError, match="`mask_token_id` is 5 in the configuration and 9 in the tokenizer"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_that_differs_is_kept_although_the_config_says_tied(tmp_path):
    tensors = read_tensors(release("illada"))
    tensors[HEADS["illada"]] = tensors[HEADS["illada"]] + 1
    source = write_release(tmp_path / "source", "illada", tensors=tensors)
    conversion = convert(source, tmp_path / "out")
    assert conversion.untied_by_tensors and not conversion.tied
    assert json.loads((conversion.out / "config.json").read_text())["tie_word_embeddings"] is False
    model = AutoModel.from_pretrained(conversion.out)
    assert torch.equal(model.lm_head.weight, tensors[HEADS["illada"]])


def test_dtype_casts_every_tensor(tmp_path):
    out = convert(release("llada"), tmp_path / "out", dtype="bfloat16", max_shard_size=MANY_SHARDS).out
    original = {standard_name(name): tensor for name, tensor in read_tensors(release("llada")).items()}
    written = read_tensors(out)
    assert written.keys() == original.keys()
    assert all(torch.equal(written[name], tensor.bfloat16()) for name, tensor in original.items())
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_illada_checkpoint_can_take_the_llada_form(tmp_path):
    """Grouped queries, another epsilon and the tied head survive under the other names."""
    out = convert(release("illada"), tmp_path / "out", to="llada").out
    golden = load_file(FIXTURES / "illada" / "logits.safetensors")
    with torch.no_grad():
        logits = AutoModel.from_pretrained(out)(golden["input_ids"]).logits
    torch.testing.assert_close(logits, golden["logits_no_mask"], atol=1e-4, rtol=0)


def test_what_the_llada_form_cannot_say_is_refused(tmp_path):
    config = ILLaDAConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=32, attention_bias=True,
    )  # fmt: skip
    ILLaDAForCausalLM(config).save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="`attention_bias` must be False in the LLaDA format, got True"):
        convert(tmp_path / "source", tmp_path / "out", to="llada")
    assert not (tmp_path / "out").exists()


@cache
def standard_names():
    config = ILLaDAConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        vocab_size=32,
    )  # fmt: skip
    with torch.device("meta"):
        return list(ILLaDAForCausalLM(config).state_dict())


@given(st.integers(0, 10_000), st.data())
def test_names_survive_there_and_back(layer, data):
    name = data.draw(st.sampled_from(standard_names())).replace(".0.", f".{layer}.")
    assert llada_name(name).startswith("model.transformer.")
    assert standard_name(llada_name(name)) == name == standard_name(name)


def problems_of(source, tmp_path, **arguments):
    before = contents(source)
    with pytest.raises(CheckpointError) as error:
        convert(source, tmp_path / "out", **arguments)
    assert contents(source) == before
    assert [path.name for path in tmp_path.iterdir()] == [source.name]
    assert "\n" not in str(error.value)
    for names in error.value.problems.values():
        assert all(name in str(error.value) for name in names)
    return error.value.problems


def test_missing_extra_and_misshapen_tensors_are_listed(tmp_path):
    tensors = read_tensors(release("llada"))
    del tensors["model.transformer.blocks.1.up_proj.weight"], tensors["model.transformer.ff_out.weight"]
    tensors["model.transformer.wpe.weight"] = torch.zeros(2)
    tensors["model.transformer.blocks.2.q_proj.weight"] = torch.zeros(48, 48)
    tensors["model.transformer.ln_f.weight"] = torch.zeros(47)
    problems = problems_of(write_release(tmp_path / "source", "llada", tensors=tensors), tmp_path)
    assert problems == {
        "missing": ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"],
        "extra": ["model.transformer.blocks.2.q_proj.weight", "model.transformer.wpe.weight"],
        "misshapen": ["model.transformer.ln_f.weight [47] instead of [48]"],
    }


def test_two_names_of_one_tensor_are_duplicates(tmp_path):
    tensors = read_tensors(release("llada"))
    tensors["model.embed_tokens.weight"] = tensors["model.transformer.wte.weight"].clone()
    problems = problems_of(write_release(tmp_path / "source", "llada", tensors=tensors), tmp_path)
    assert {"model.embed_tokens.weight", "model.transformer.wte.weight"} == set(problems["duplicate"])


def test_files_that_disagree_with_the_index_are_listed(tmp_path):
    tensors = read_tensors(release("llada"))
    source = write_release(tmp_path / "source", "llada", num_files=2)
    files = {"part-0.safetensors": list(tensors)[:10], "part-1.safetensors": list(tensors)[9:]}
    write_shards(source, files, tensors)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["not.there"] = "part-0.safetensors"
    del index["weight_map"][list(tensors)[0]]
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert problems_of(source, tmp_path) == {
        "missing": ["not.there"],
        "extra, not in the index": [list(tensors)[0]],
        "duplicate": [list(tensors)[9]],
    }


def test_values_that_are_not_finite_are_refused(tmp_path):
    tensors = read_tensors(release("llada"))
    tensors["model.transformer.blocks.0.q_proj.weight"][3, 4] = float("nan")
    problems = problems_of(write_release(tmp_path / "source", "llada", tensors=tensors), tmp_path)
    assert problems == {"not finite": ["model.transformer.blocks.0.q_proj.weight"]}


def test_a_cast_that_overflows_is_refused(tmp_path):
    tensors = read_tensors(release("llada"))
    tensors["model.transformer.blocks.1.ff_proj.weight"][0, 0] = 1e6
    problems = problems_of(write_release(tmp_path / "source", "llada", tensors=tensors), tmp_path, dtype="float16")
    assert problems == {"not finite in torch.float16": ["model.transformer.blocks.1.ff_proj.weight"]}


def test_wrong_dtypes_are_listed(tmp_path):
    name = "model.transformer.ln_f.weight"
    source = write_release(tmp_path / "source", "llada")
    tensors = read_tensors(source)
    write_shards(source, {"model.safetensors": list(tensors)}, tensors | {name: torch.ones(48, dtype=torch.int8)})
    assert problems_of(source, tmp_path) == {"wrong dtype": [f"{name} (I8)"]}
    assert problems_of(source, tmp_path, dtype="bfloat16") == {"wrong dtype": [f"{name} (I8)"]}

    write_shards(source, {"model.safetensors": list(tensors)}, tensors | {name: torch.ones(48, dtype=torch.bfloat16)})
    (problem,) = problems_of(source, tmp_path)["wrong dtype"]
    assert problem.startswith(f"{name} (bfloat16, the others are float32")
    assert convert(source, tmp_path / "out", dtype="float32").dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": "gguf"}, "`to` must be one of 'standard', 'illada', 'llada', got 'gguf'"),
        ({"dtype": "int8"}, "`dtype` must be one of .*'bfloat16'.*, got 'int8'"),
        ({"max_shard_size": "5 apples"}, "`max_shard_size` must be positive, .* got '5 apples'"),
        ({"max_shard_size": 0}, "`max_shard_size` must be positive, .* got 0"),
        ({"source": "no/such/folder"}, "`source` must be a folder or a Hub id, got 'no/such/folder'"),
    ],
    ids=["to", "dtype", "size-text", "size-zero", "source"],
)
def test_bad_arguments_are_named_before_anything_is_written(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        convert(**{"source": release("llada"), "out": tmp_path / "out", **arguments})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "source").mkdir()
    with pytest.raises(FileNotFoundError, match="is no checkpoint: it has no config.json"):
        convert(tmp_path / "source", tmp_path / "out")
    (tmp_path / "source" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="`model_type` in .* must be one of 'illada', 'llada', got 'llama'"):
        convert(tmp_path / "source", tmp_path / "out")
    (tmp_path / "source" / "config.json").write_text((release("llada") / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        convert(tmp_path / "source", tmp_path / "out")
    (tmp_path / "source" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        convert(tmp_path / "source", tmp_path / "out")


class Malicious:
    def __reduce__(self):
        return (print, ("executed",))


def test_pickles_need_a_flag_and_hold_tensors_alone(tmp_path, capsys):
    source = write_release(tmp_path / "source", "llada")
    tensors = read_tensors(source)
    (source / "model.safetensors").unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled weights alone .*: pass `allow_pickle`"):
        convert(source, tmp_path / "refused")
    conversion = convert(source, tmp_path / "out", allow_pickle=True)
    assert_same_tensors(
        convert(conversion.out, tmp_path / "back", to="llada").out, write_release(tmp_path / "x", "llada")
    )

    torch.save({**tensors, "extra": Malicious()}, source / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin is damaged or holds more than tensors"):
        convert(source, tmp_path / "refused", allow_pickle=True)
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(ValueError, match="pytorch_model.bin is damaged or holds more than tensors"):
        convert(source, tmp_path / "refused", allow_pickle=True)
    assert "executed" not in capsys.readouterr().out
    assert not (tmp_path / "refused").exists()


def test_safetensors_win_over_a_pickle(tmp_path):
    source = copy_release(tmp_path / "source", "llada")
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious()))
    assert convert(source, tmp_path / "out").num_tensors == 21


def test_a_hub_id_is_read_from_the_cache(tmp_path, monkeypatch):
    """As the Hub's cache has it: a snapshot of links into a folder of blobs."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        OSError, match="`source` 'GSAI-ML/LLaDA-8B-Base' is no folder here and could not be downloaded"
    ):
        convert("GSAI-ML/LLaDA-8B-Base", tmp_path / "out")

    repository, commit = tmp_path / "hub" / "models--GSAI-ML--LLaDA-8B-Base", "0" * 40
    snapshot = repository / "snapshots" / commit
    for path in (repository / "blobs", repository / "refs", snapshot):
        path.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for path in release("llada").iterdir():
        (repository / "blobs" / path.stem).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{path.stem}")
    conversion = convert("GSAI-ML/LLaDA-8B-Base", tmp_path / "out")
    assert conversion.num_tensors == 21
    assert not any(path.is_symlink() for path in conversion.out.iterdir())


def test_out_is_replaced_only_when_asked(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    assert convert(release("llada"), out).out == out  # an empty folder is as good as none
    before = contents(out)
    with pytest.raises(FileExistsError, match="`out` must be a new or an empty folder, .*; `overwrite` replaces it"):
        convert(release("illada"), out)
    assert contents(out) == before
    (out / "mine.txt").write_text("")
    convert(release("illada"), out, overwrite=True)
    assert not (out / "mine.txt").exists() and len(read_tensors(out)) == 29
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_overwrite_leaves_what_was_there(tmp_path):
    out = convert(release("llada"), tmp_path / "out").out
    before = contents(out)
    tensors = read_tensors(release("illada"))
    tensors["model.norm.weight"][0] = float("inf")
    source = write_release(tmp_path / "source", "illada", tensors=tensors)
    with pytest.raises(CheckpointError, match="not finite: model.norm.weight"):
        convert(source, out, overwrite=True)
    assert contents(out) == before


def test_out_must_lie_apart_from_the_source(tmp_path):
    source = copy_release(tmp_path / "models" / "source", "llada")
    for out in (source, source / "out", source.parent):
        with pytest.raises(ValueError, match="`out` must lie apart from `source`"):
            convert(source, out, overwrite=True)
    assert contents(source) == contents(release("llada"))
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="`out` must be a new folder, .* is a file"):
        convert(source, tmp_path / "file", overwrite=True)


def test_progress_is_shown(tmp_path, capsys):
    convert(release("llada"), tmp_path / "out")
    assert "Converting" in capsys.readouterr().err
