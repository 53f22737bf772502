"""What `convert` and `export` refuse, they refuse in one sentence, before weights are loaded or written."""

import json

import pytest
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from release_checkpoints import copy_release, release, write_tokenizer
from transformers import AutoModel

import illada  # noqa: F401
from illada.conversion import convert, converting, export_to_hub_folder, exporting, push_to_hub
from illada.tiny import EMBEDDED_MODEL


@pytest.fixture(autouse=True)
def no_work(monkeypatch):
    """Loading or writing weights fails, so that whatever is refused was refused before."""

    def too_late(*arguments, **settings):
        raise AssertionError("weights were loaded or written")

    for module, name in (
        (exporting, "load_whole_model"),
        (exporting, "write_model"),
        (converting, "write_weights"),
        (converting, "verify_logits"),
    ):
        monkeypatch.setattr(module, name, too_late)


@pytest.fixture
def adapter(tmp_path):
    config = LoraConfig(target_modules=["q_proj"])
    get_peft_model(AutoModel.from_pretrained(release("llada")), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(error, message, function, *arguments, **settings):
    with pytest.raises(error, match=message) as raised:
        function(*arguments, **settings)
    assert "\n" not in str(raised.value) and "AssertionError" not in str(raised.value)


def assert_nothing_written(tmp_path, out="out"):
    assert not (tmp_path / out).exists() and not list(tmp_path.glob(".*"))


def folder_of_strange_tokens(tmp_path):
    """A tokenizer that calls another token [MASK]."""
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer(tmp_path / "tokenizer", 160)
    settings = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings | {"mask_token": "w9"}))
    return tmp_path / "tokenizer"


BAD_TOKENIZERS = {
    "a type": (lambda path: 5, ValueError, "`tokenizer` must be a tokenizer, a folder or a Hub id, got a int"),
    "no folder": (lambda path: "no/such/folder", ValueError, "`tokenizer` must be a folder or a Hub id, got 'no/such"),
    "not cached": (lambda path: "user/absent", OSError, "`tokenizer` 'user/absent' is no folder here and could not"),
    "empty folder": (lambda path: path, ValueError, "`tokenizer` must be a tokenizer's folder or Hub id, got .* none"),
    "another mask": (folder_of_strange_tokens, ValueError, "`mask_token_id` is 5 in the configuration and 9"),
}


@pytest.mark.parametrize("source", ["checkpoint", "model", "adapter"])
@pytest.mark.parametrize("kind", BAD_TOKENIZERS)
def test_a_bad_tokenizer(tmp_path, adapter, kind, source):
    make, error, message = BAD_TOKENIZERS[kind]
    model = {"checkpoint": release("llada"), "adapter": adapter}.get(source) or AutoModel.from_pretrained(
        release("llada")
    )
    refused(error, message, export_to_hub_folder, model, tmp_path / "out", tokenizer=make(tmp_path))
    assert_nothing_written(tmp_path)


BAD_ARGUMENTS = {
    "license": ({"license": "foo"}, ValueError, "`license` must be an identifier of the Hub such as .*, got 'foo'"),
    "misspelt": ({"license": "apache2.0"}, ValueError, "Did you mean 'apache-2.0'"),
    "adapter": ({"adapter": "no/such/folder"}, ValueError, "`adapter` must be a folder or a Hub id, got 'no/such"),
    "no adapter": ({"adapter": release("illada")}, FileNotFoundError, "`adapter` .* contains no adapter"),
    "not cached": ({"adapter": "user/absent"}, OSError, "`adapter` 'user/absent' is no folder here"),
    "source": ({"source": "no/such/folder"}, ValueError, "`source` must be a folder or a Hub id, got 'no/such"),
    "hub id": ({"source": "a..b/c"}, ValueError, "`source` must be a folder or a Hub id, got 'a..b/c'"),
}


@pytest.mark.parametrize("kind", BAD_ARGUMENTS)
def test_a_bad_argument_of_export(tmp_path, kind):
    arguments, error, message = BAD_ARGUMENTS[kind]
    refused(error, message, export_to_hub_folder, **{"source": release("llada"), "out": tmp_path / "out"} | arguments)
    assert_nothing_written(tmp_path)


def test_an_adapter_on_an_adapter(tmp_path, adapter):
    message = "`adapter` must be absent if `source` is an adapter itself"
    refused(ValueError, message, export_to_hub_folder, adapter, tmp_path / "out", adapter=adapter)


def test_a_base_that_is_not_there(tmp_path, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "user/absent"}))
    message = "`base_model_name_or_path` 'user/absent' is no folder here"
    refused(OSError, message, export_to_hub_folder, adapter, tmp_path / "out")


def test_the_name_of_the_embedded_model(monkeypatch, tmp_path, adapter):
    """`illada train` writes it into its adapters."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "illada-tiny"}))
    opened = []
    monkeypatch.setattr(exporting, "load_whole_model", lambda checkpoint, **_: opened.append(checkpoint) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_to_hub_folder(adapter, tmp_path / "out")
    assert opened == [EMBEDDED_MODEL]


BAD_FILES = ["config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"]


@pytest.mark.parametrize("work", [convert, export_to_hub_folder])
@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("encoding", ["latin-1", "utf-8-sig"])
def test_a_file_in_another_encoding_is_named(tmp_path, work, name, encoding):
    source = copy_release(tmp_path / "source", "llada", vocab_size=150)
    content = json.loads((source / name).read_text()) if (source / name).exists() else {}
    text = json.dumps(content | {"author": "é"}, ensure_ascii=False)
    (source / name).write_bytes(text.encode(encoding))
    refused(ValueError, f"{name} is not valid JSON: ", work, source, tmp_path / "out")
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8-sig"])
def test_an_adapter_in_another_encoding_is_named(tmp_path, adapter, encoding):
    text = json.dumps({**json.loads((adapter / "adapter_config.json").read_text()), "author": "é"}, ensure_ascii=False)
    (adapter / "adapter_config.json").write_bytes(text.encode(encoding))
    refused(ValueError, "adapter_config.json is not valid JSON: ", export_to_hub_folder, adapter, tmp_path / "out")
    arguments = (release("llada"), tmp_path / "out")
    refused(ValueError, "adapter_config.json is not valid JSON: ", export_to_hub_folder, *arguments, adapter=adapter)


@pytest.mark.parametrize("card", [b"---\nlicense: [\n---\nText.\n", "---\nauthor: é\n---\n".encode("latin-1")])
def test_a_malformed_card_is_named(tmp_path, card):
    source = copy_release(tmp_path / "source", "llada")
    (source / "README.md").write_bytes(card)
    refused(ValueError, "README.md is no model card: ", export_to_hub_folder, source, tmp_path / "out")
    assert_nothing_written(tmp_path)


def test_a_lora_folder_where_a_checkpoint_is_wanted(tmp_path, adapter):
    message = (
        "`source` must be a checkpoint, got the adapter .*: `convert_adapter` .* `export_to_hub_folder` merges it"
    )
    refused(ValueError, message, convert, adapter, tmp_path / "out")
    assert_nothing_written(tmp_path)


def test_pushing_names_the_arguments_of_the_caller(tmp_path):
    refused(ValueError, "`repo_id` must be an id on the Hub .* got 'a/b/c'", push_to_hub, tmp_path, "a/b/c")


@pytest.mark.parametrize("change", ["shrunk vocabulary", "adapter outside a PeftModel"])
def test_a_model_in_memory_that_cannot_be_exported(tmp_path, change):
    model = AutoModel.from_pretrained(release("llada"))
    if change == "adapter outside a PeftModel":
        inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model)
        refused(ValueError, "`source` must be a `PeftModel`", export_to_hub_folder, model, tmp_path / "out")
    else:
        model.resize_token_embeddings(3, mean_resizing=False)
        message = r"LLaDAModelLM is no configuration of this family: `mask_token_id` must be in \[0, 3\), got 5"
        refused(ValueError, message, export_to_hub_folder, model, tmp_path / "out")
    assert_nothing_written(tmp_path)
