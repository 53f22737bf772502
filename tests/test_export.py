import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_stand_in import serve_hub
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from release_checkpoints import contents, copy_release, read_tensors, release
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
from typer import Typer
from typer.testing import CliRunner

import illada
from illada.conversion import cli, export_to_hub_folder
from illada.llada_names import standard_name

PROMPT = "w7 w8 w9 w10 w11"
LENGTHS = {"max_new_tokens": 16, "block_length": 8}
# Every file at the package's root travels beside a checkpoint.
CODE = {path.name for path in Path(illada.__file__).parent.glob("*.py")} - {"__init__.py", "__main__.py"}
CODE -= {"configuration_llada.py", "modeling_llada.py"}  # what is exported is in the standard form

# What a user without this package does; the import of it is made impossible, installed or not.
STRANGER = """
import json, sys
sys.modules["illada"] = None
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

prompt, lengths, folders = json.loads(sys.argv[1])
answers = {}
for folder in folders:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    inputs = tokenizer(prompt, return_tensors="pt")
    answer = {}
    for auto_class in (AutoModel, AutoModelForCausalLM):
        model = auto_class.from_pretrained(folder, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        output = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, **lengths)
        answer[auto_class.__name__] = output[0].tolist()
    pipe = pipeline("text-generation", model=folder, trust_remote_code=True)
    answer["pipeline"] = pipe(prompt, **lengths)[0]["generated_text"]
    answers[folder] = answer
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Both families, exported from their release's form, by the name of the family."""
    folders = {}
    for family, vocab_size in (("illada", 160), ("llada", 150)):
        source = copy_release(tmp_path_factory.mktemp(family) / "source", family, vocab_size)
        folders[family] = export_to_hub_folder(source, source.with_name("out"), license="mit")
    return folders


@pytest.fixture(scope="module")
def strangers_answers(exports, tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    arguments = json.dumps([PROMPT, LENGTHS, [str(path) for path in exports.values()]])
    environment = {**os.environ, "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", STRANGER, arguments]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    answers = json.loads(result.stdout.splitlines()[-1])
    return {family: answers[str(path)] for family, path in exports.items()}


@pytest.mark.parametrize("family", ["illada", "llada"])
def test_a_stranger_to_this_package_gets_its_tokens(exports, strangers_answers, family):
    tokenizer = AutoTokenizer.from_pretrained(exports[family])
    model = AutoModelForCausalLM.from_pretrained(exports[family])
    assert type(model).__module__.startswith("illada.")
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, **LENGTHS)[0].tolist()
    text = pipeline("text-generation", model=model, tokenizer=tokenizer)(PROMPT, **LENGTHS)[0]["generated_text"]
    assert len(set(tokens[5:])) > 2
    assert strangers_answers[family] == {"AutoModel": tokens, "AutoModelForCausalLM": tokens, "pipeline": text}


@pytest.mark.parametrize("family", ["illada", "llada"])
def test_the_repository_is_complete(exports, family):
    folder = exports[family]
    names = {path.name for path in folder.iterdir()}
    assert {name for name in names if name.endswith(".py")} == CODE
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md"} <= names
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "decision_template.jinja"} <= names
    assert "custom_generate" not in names  # `generate` is the model's own
    config = json.loads((folder / "config.json").read_text())
    for target in config["auto_map"].values():
        module, name = target.split(".")
        assert f"class {name}" in (folder / f"{module}.py").read_text()
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} <= set(config["auto_map"])
    assert AutoTokenizer.from_pretrained(folder).mask_token_id == 5


def test_the_model_card_has_what_the_hub_indexes(exports):
    card = ModelCard.load(exports["illada"] / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "mit" and data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation" and "masked-diffusion" in data["tags"]
    num_parameters = sum(tensor.numel() for tensor in read_tensors(exports["illada"]).values())
    assert f"{num_parameters:,}" in card.text and "{{" not in card.text


def test_the_model_card_shows_how_this_checkpoint_is_used(exports, tmp_path):
    text = ModelCard.load(exports["illada"] / "README.md").text
    assert "# out\n" in text and "tokenizer.apply_chat_template(chat, " in text
    bare = ModelCard.load(export_to_hub_folder(release("illada"), tmp_path / "bare") / "README.md").text
    assert "# bare\n" in bare and "apply_chat_template" not in bare and 'tokenizer("' in bare


def test_no_path_of_this_machine_is_published(exports, tmp_path):
    for folder in exports.values():
        for name, content in contents(folder).items():
            assert str(folder.parent).encode() not in content, name


def test_a_card_that_is_there_keeps_its_text_and_license(tmp_path):
    source = copy_release(tmp_path / "source", "illada")
    text = "---\nlicense: apache-2.0\nbase_model: user/base\ntags:\n- mine\n---\n# Mine\n\nFigures.\n"
    (source / "README.md").write_text(text)
    card = ModelCard.load(export_to_hub_folder(source, tmp_path / "out") / "README.md")
    assert card.text.strip() == "# Mine\n\nFigures."
    assert card.data.license == "apache-2.0" and card.data.base_model == "user/base"
    assert "mine" in card.data.tags and "illada" in card.data.tags
    assert (source / "README.md").read_text() == text


def adapted(family="llada"):
    """A model with a LoRA adapter that changes what it says."""
    torch.manual_seed(0)
    model = AutoModel.from_pretrained(release(family))
    config = LoraConfig(target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    return get_peft_model(model, config).eval()


def logits_of(model):
    with torch.no_grad():
        return model(torch.arange(6, 38)[None]).logits


@pytest.mark.parametrize("way", ["model", "adapter folder", "base and adapter"])
def test_adapters_are_merged(tmp_path, way):
    model = adapted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "adapter")
    source = {"model": model, "adapter folder": tmp_path / "adapter", "base and adapter": release("llada")}[way]
    adapter = tmp_path / "adapter" if way == "base and adapter" else None
    merged = AutoModel.from_pretrained(export_to_hub_folder(source, tmp_path / "out", adapter=adapter))
    torch.testing.assert_close(logits_of(merged), logits_of(model), atol=1e-4, rtol=0)
    assert (logits_of(merged) - logits_of(AutoModel.from_pretrained(release("llada")))).abs().max() > 0.1
    assert merged.generation_config.canvas == "fixed"
    assert not any("lora" in name for name in read_tensors(tmp_path / "out"))
    # The caller's model is as it was.
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_pickled_adapter_needs_the_flag(tmp_path):
    adapted().save_pretrained(tmp_path / "adapter", safe_serialization=False)
    with pytest.raises(FileNotFoundError, match="holds no adapter_model.safetensors; `allow_pickle`"):
        export_to_hub_folder(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_of_the_adapter_wins(tmp_path):
    source = copy_release(tmp_path / "source", "llada", vocab_size=150)
    model = adapted()
    model.save_pretrained(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = "another"
    tokenizer.save_pretrained(tmp_path / "adapter")
    out = export_to_hub_folder(source, tmp_path / "out", adapter=tmp_path / "adapter")
    assert AutoTokenizer.from_pretrained(out).chat_template == "another"


def test_a_model_in_memory_is_written_in_the_standard_form(tmp_path):
    model = AutoModel.from_pretrained(release("llada"), dtype=torch.bfloat16)
    model.generation_config.temperature = 0.25
    source = copy_release(tmp_path / "source", "llada", vocab_size=150)
    tokenizer = AutoTokenizer.from_pretrained(source)
    out = export_to_hub_folder(model, tmp_path / "out", tokenizer=tokenizer, base_model="GSAI-ML/LLaDA-8B-Base")
    written = read_tensors(out)
    assert written.keys() == {standard_name(name) for name in read_tensors(release("llada"))}
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in written.items())
    settings = json.loads((out / "generation_config.json").read_text())
    assert settings["canvas"] == "fixed" and settings["temperature"] == 0.25
    assert AutoTokenizer.from_pretrained(out).mask_token_id == 5
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == "GSAI-ML/LLaDA-8B-Base" and card.data.license == "unknown"


def test_the_last_checkpoint_of_a_training_run_is_taken(tmp_path):
    for step, family in ((5, "illada"), (10, "llada"), (9, "illada")):
        copy_release(tmp_path / "run" / f"checkpoint-{step}", family)
        (tmp_path / "run" / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"")
        (tmp_path / "run" / f"checkpoint-{step}" / "training_args.bin").write_bytes(b"")
    out = export_to_hub_folder(tmp_path / "run", tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 2
    assert not list(out.glob("*.pt")) and not list(out.glob("*.bin"))


def test_a_model_of_another_family_is_refused(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=16)
    with pytest.raises(ValueError, match="`model_type` in LlamaForCausalLM must be one of 'illada', 'llada'"):
        export_to_hub_folder(LlamaForCausalLM(config), tmp_path / "out")
    assert not list(tmp_path.iterdir())


app = Typer()
app.command("convert")(cli.convert)
app.command("export")(cli.export)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serve_hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield hub


def test_push_uploads_the_folder_and_nothing_else(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    out = tmp_path / "out"
    result = run("export", out, "--model", release("illada"), "--license", "mit", "--push", "user/tiny", "--private")
    assert result.exit_code == 0, result.output
    assert f"Uploaded: {hub.url}/user/tiny/commit/1" in result.output
    assert hub.repositories["user/tiny"]["visibility" if "visibility" in hub.repositories["user/tiny"] else "private"]
    assert hub.files == contents(out)
    assert hub.tokens == {"Bearer hf_secret"}
    assert not any(b"hf_secret" in content for content in hub.files.values())


def test_push_without_a_token_says_how_to_log_in(hub, tmp_path):
    result = run("export", tmp_path / "out", "--model", release("illada"), "--push", "user/tiny")
    assert isinstance(result.exception, OSError)
    assert "log in with `hf auth login`, or set HF_TOKEN" in str(result.exception)
    assert not (tmp_path / "out").exists() and not hub.repositories


def test_push_to_a_malformed_id_is_refused(tmp_path):
    result = run("export", tmp_path / "out", "--model", release("illada"), "--push", "a/b/c")
    assert "`repo_id` must be an id on the Hub such as 'user/model', got 'a/b/c'" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_a_refused_upload_leaves_the_folder(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.refuse_uploads = True
    result = run("export", tmp_path / "out", "--model", release("illada"), "--push", "user/tiny")
    assert isinstance(result.exception, OSError)
    assert "`repo_id` 'user/tiny' refused the upload" in str(result.exception) and "\n" not in str(result.exception)
    assert (tmp_path / "out" / "model.safetensors").exists() and not hub.files


def test_the_convert_command(tmp_path):
    result = run("convert", release("llada"), tmp_path / "out", "--dtype", "bfloat16", "--max-shard-size", "100KB")
    assert result.exit_code == 0, result.output
    assert "21 tensors, 130,656 bytes, 2 file(s), bfloat16, LM head not tied." in result.output
    assert "Verified: every tensor byte for byte; logits equal through 2 layer(s)." in result.output
    again = run("convert", release("llada"), tmp_path / "out")
    assert isinstance(again.exception, FileExistsError)
    assert run("convert", release("llada"), tmp_path / "out", "--overwrite").exit_code == 0
    assert run("convert", tmp_path / "out", tmp_path / "back", "--to", "llada").exit_code == 0
    assert read_tensors(tmp_path / "back").keys() == read_tensors(release("llada")).keys()


@pytest.mark.parametrize("command", ["convert", "export"])
def test_help_holds_an_example(command):
    help_text = run(command, "--help").output
    assert f"Example: illada {command} " in " ".join(help_text.split())
