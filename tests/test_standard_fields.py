"""Every field of the installed `GenerationConfig` is read, harmless or refused by name; unknown names are refused."""

import json
import logging

import pytest
import torch
from tiny_models import EOS, MASK, prompt_of, random_model, tiny_tokenizer
from transformers import CompileConfig, GenerationConfig

from illada import ILLaDAForCausalLM, MaskedDiffusionGenerationConfig, standard_fields
from illada.standard_fields import HARMLESS, READ, REFUSED

FIELDS = sorted(name for name in vars(GenerationConfig()) if not name.startswith("_"))
NOT_READ = sorted(set(FIELDS) - READ - HARMLESS.keys())
PROMPT = torch.tensor([[7, 8, 9]])
SAMPLE = {"do_sample": True, "seed": 0}
ENDING = {"sequence_bias": {(EOS,): 100.0}}

# {field: arguments under which it changes what `generate` returns, the field among them}
READ_FIELDS = {
    "max_length": {"max_new_tokens": None, "max_length": 5},
    "max_new_tokens": {"max_new_tokens": 5},
    "max_time": {"max_new_tokens": 12, "suppress_tokens": [EOS], "max_time": 1e-9},
    "do_sample": {"do_sample": True, "seed": 0},
    "temperature": {**SAMPLE, "temperature": 9.0},
    "top_k": {**SAMPLE, "temperature": 9.0, "top_k": 1},
    "top_p": {**SAMPLE, "temperature": 9.0, "top_p": 0.01},
    "top_h": {**SAMPLE, "temperature": 9.0, "top_h": 0.01},
    "min_p": {**SAMPLE, "temperature": 9.0, "min_p": 0.99},
    "typical_p": {**SAMPLE, "temperature": 9.0, "typical_p": 0.01},
    "epsilon_cutoff": {**SAMPLE, "temperature": 9.0, "epsilon_cutoff": 0.9},
    "eta_cutoff": {**SAMPLE, "temperature": 2.0, "eta_cutoff": 0.9},
    "repetition_penalty": {"repetition_penalty": 20.0},
    "suppress_tokens": {"suppress_tokens": list(range(6, 30))},
    "bad_words_ids": {"bad_words_ids": [[token] for token in range(6, 30)]},
    "sequence_bias": {"sequence_bias": {(20,): 100.0}},
    "guidance_scale": {"guidance_scale": 3.0},
    "num_return_sequences": {**SAMPLE, "num_return_sequences": 2},
    "return_dict_in_generate": {"return_dict_in_generate": True},
    "eos_token_id": {**ENDING, "eos_token_id": None},
    "pad_token_id": {"inputs": torch.tensor([[8, 8, 9], [9, 8, 9]]), "pad_token_id": 8},
    "min_length": {**ENDING, "min_length": 6},
    "min_new_tokens": {**ENDING, "min_new_tokens": 3},
    "stop_strings": {"sequence_bias": {(6,): 100.0}, "max_new_tokens": 12, "stop_strings": ["a"]},
}
ELSEWHERE = {"bos_token_id", "compile_config", "remove_invalid_values"}  # in tests of their own, below

# {refused field: a value of its kind}; the others are tried with 7
VALUES = {
    "early_stopping": True,
    "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.7,
    "assistant_ensemble_weight": 0.5,
    "cache_implementation": "static",
    "dola_layers": "low",
    "constraints": [1],
    "force_words_ids": [[3]],
    "watermarking_config": {"bias": 1.0},
    "exponential_decay_length_penalty": (1, 2.0),
}


@pytest.fixture(scope="module")
def model():
    return random_model(0)


def _generate(model, **arguments):
    return model.generate(**{"inputs": PROMPT, "max_new_tokens": 4, "block_length": 4, **arguments})


def test_every_field_of_the_installed_version_is_listed_once():
    listed = [*READ, *HARMLESS, *REFUSED]
    assert set(FIELDS) <= set(listed)
    assert len(listed) == len(set(listed))
    assert READ == READ_FIELDS.keys() | ELSEWHERE


@pytest.mark.parametrize("name", sorted(READ_FIELDS))
def test_what_is_read_changes_what_comes_back(model, name):
    arguments = {"tokenizer": tiny_tokenizer(), **READ_FIELDS[name]}
    without = {key: value for key, value in arguments.items() if key != name}
    results = [_generate(model, **arguments), _generate(model, **without)]
    assert type(results[0]) is not type(results[1]) or not torch.equal(*results)


def test_bos_is_read_by_revise(model):
    text = torch.tensor([[12, 8, 9]])
    assert not model.revise(text, fraction=1.0).confidences[0, 0].isnan()
    assert model.revise(text, fraction=1.0, bos_token_id=12).confidences[0, 0].isnan()


def test_the_compile_config_is_what_torch_gets(model, monkeypatch):
    given = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: given.append(options) or function)
    _generate(model, block_cache="dual", compile=True, compile_config=CompileConfig(mode="default", fullgraph=True))
    assert given[0]["mode"] == "default" and given[0]["fullgraph"] is True


def test_invalid_values_are_removed_when_asked(model):
    def break_one(module, arguments, output):
        output.logits[:, 20] = torch.nan

    hook = model.register_forward_hook(break_one)
    try:
        with pytest.raises(ValueError, match="NaN"):
            _generate(model)
        assert MASK not in _generate(model, remove_invalid_values=True)
    finally:
        hook.remove()


@pytest.mark.parametrize("name", NOT_READ)
@pytest.mark.filterwarnings("ignore:Passing ContinuousBatchingConfig:FutureWarning")
def test_a_field_that_is_not_read_is_refused_by_name(model, name):
    value, calls = VALUES.get(name, 7), []
    config = GenerationConfig()
    setattr(config, name, value)
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        for arguments in ({name: value}, {"generation_config": config}):
            with pytest.raises(ValueError, match=f"^`{name}` must be unset, got .*: [a-z].*\\.$"):
                _generate(model, **arguments)
    finally:
        hook.remove()
    assert not calls


@pytest.mark.parametrize("name", NOT_READ)
def test_the_value_that_transformers_fills_in_is_accepted(model, name):
    default = GenerationConfig._get_default_generation_params().get(name)
    assert torch.equal(_generate(model, **{name: default}), _generate(model))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_cache", False),
        ("use_cache", True),
        ("renormalize_logits", True),
        ("disable_compile", True),
        ("trust_remote_code", True),  # an argument of Transformers' `generate`, about `custom_generate`
    ],
)
def test_what_is_harmless_changes_nothing(model, name, value):
    assert torch.equal(_generate(model, **{name: value}), _generate(model))


def test_a_field_that_a_later_version_adds_is_refused(monkeypatch):
    monkeypatch.setattr(standard_fields, "STANDARD", standard_fields.STANDARD | {"think_harder"})
    config = MaskedDiffusionGenerationConfig()
    config.think_harder = 3
    with pytest.raises(ValueError, match="`think_harder` must be unset, got 3"):
        config.validate()


def test_a_misspelt_name_is_refused_wherever_it_stands(model):
    hint = "did you mean `confidence_threshold`"
    with pytest.raises(ValueError, match=f"`confidence_treshold` is an unknown argument.*{hint}"):
        _generate(model, confidence_treshold=0.9)
    with pytest.raises(ValueError, match=f"`confidence_treshold` is an unknown field; {hint}"):
        MaskedDiffusionGenerationConfig(confidence_treshold=0.9)
    late = MaskedDiffusionGenerationConfig()
    late.confidence_treshold = 0.9
    for config in (GenerationConfig(confidence_treshold=0.9), late):
        with pytest.raises(
            ValueError, match=f"`confidence_treshold` is an unknown field of `generation_config`; {hint}"
        ):
            _generate(model, generation_config=config)
        with pytest.raises(ValueError, match="`confidence_treshold`"):
            model.revise(PROMPT, fraction=0.5, generation_config=config)


@pytest.mark.parametrize("name", ["update", "to_dict"])
def test_the_name_of_a_method_is_no_field(model, name):
    with pytest.raises(ValueError, match=f"`{name}` is an unknown field"):
        MaskedDiffusionGenerationConfig(**{name: 1})
    for config in (MaskedDiffusionGenerationConfig(), GenerationConfig()):
        setattr(config, name, 1)
        with pytest.raises(ValueError, match=f"`{name}` is an unknown field of `generation_config`"):
            _generate(model, generation_config=config)


def test_eos_token_ids_is_told_of_eos_token_id(model):
    for call in (lambda **fields: _generate(model, **fields), MaskedDiffusionGenerationConfig):
        with pytest.raises(ValueError, match="`eos_token_ids` is an unknown .*; did you mean `eos_token_id`"):
            call(eos_token_ids=[2])


def test_a_file_with_unknown_fields_loads_with_a_warning_and_is_saved_as_it_was(model, tmp_path, caplog, monkeypatch):
    model.save_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "confidence_treshold": 0.9, "chat_format": "raw"}))
    logger = logging.getLogger("transformers")
    logger.warning_once.__func__.cache_clear()
    monkeypatch.setattr(logger, "propagate", True)
    loaded = ILLaDAForCausalLM.from_pretrained(tmp_path)
    assert any("['chat_format', 'confidence_treshold']" in record.getMessage() for record in caplog.records)
    message = "is an unknown field of the model's `generation_config`"
    with pytest.raises(ValueError, match=f"`chat_format` {message}: "):
        loaded.generate(PROMPT, max_new_tokens=2)
    del loaded.generation_config.chat_format
    with pytest.raises(ValueError, match=f"`confidence_treshold` {message}; did you mean"):
        loaded.generate(PROMPT, max_new_tokens=2)
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/generation_config.json").read_text())["confidence_treshold"] == 0.9
    del loaded.generation_config.confidence_treshold
    loaded.generate(PROMPT, max_new_tokens=2)


def test_a_file_that_transformers_has_filled_loads(model, tmp_path):
    """Older files list defaults, and notes that are no settings."""
    model.save_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    filled = GenerationConfig._get_default_generation_params()
    del filled["max_length"], filled["top_k"]  # settings that would be read
    notes = {"_from_model_config": False, "transformers_version": "4.46.3", "use_cache": True, "_commit_hash": "a"}
    path.write_text(json.dumps({**filled, **json.loads(path.read_text()), **notes}))
    loaded = ILLaDAForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(_generate(loaded), _generate(model))


def test_biases_are_saved_as_a_list(tmp_path):
    config = MaskedDiffusionGenerationConfig(sequence_bias=[[[8], -1.5]], bad_words_ids=[[9]])
    config.save_pretrained(tmp_path)
    loaded = MaskedDiffusionGenerationConfig.from_pretrained(tmp_path)
    assert (loaded.token_biases, loaded.bad_words_ids) == ([(8, -1.5)], [[9]])
    with pytest.raises(ValueError, match="`sequence_bias` must be a list"):
        MaskedDiffusionGenerationConfig(sequence_bias={(8,): -1.5}).save_pretrained(tmp_path)


def test_a_bias_acts_in_blanks(model):
    blanks = prompt_of(5, blanks=(1, 3))
    assert _generate(model, inputs=blanks, max_new_tokens=0, sequence_bias={(20,): 1e4}).tolist() == [
        [7, 20, 7, 20, 7]
    ]
