"""Every argument of `generate`: a bad value is a ValueError that names it, before the first forward pass."""

import logging
import re

import pytest
import torch
from tiny_models import EOS, MASK, PAD, random_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import CompileConfig, GenerationConfig, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from illada import MaskedDiffusionGenerationConfig

PROMPT = torch.tensor([[7, 8, 9]])
NAN, INF = float("nan"), float("inf")

NOT_LENGTHS = ("5", 5.0, -1, 0, True, [5])
NOT_COUNTS = ("5", 5.0, -1, True, [5])
NOT_TOKENS = ("2", 2.0, -1, 37, True)
NOT_FLAGS = ("yes", 1, [True])

# {field: values that no call may accept}
BAD_FIELDS = {
    # lengths and steps
    "max_new_tokens": (*NOT_LENGTHS, 62),  # 0 because nothing is masked, 62 because 64 positions hold 61 more tokens
    "min_length": (*NOT_COUNTS, 8),  # a prompt of 3 and 4 new tokens
    "min_new_tokens": (*NOT_COUNTS, 5),  # above `max_new_tokens`, 4
    "block_length": NOT_LENGTHS,
    "max_denoising_steps": NOT_LENGTHS,
    "num_drafts": NOT_LENGTHS,
    "max_time": ("1", 0, -1, INF, True),
    # choices
    "canvas": ("grow", 3, ["growing"], ""),
    "remasking": ("low", 3, ["random"], ""),
    # rules
    "confidence_threshold": ("0.9", 0, -0.5, 2, NAN, True),
    "confidence_factor": ("1", 0, -1, INF, True),
    "entropy_bound": ("1", -1, NAN, True),
    "frechet_margin": ("0.2", -0.1, 1, NAN, True),
    "guidance_scale": ("1", -1, NAN, True),
    # ids
    "mask_token_id": (*NOT_TOKENS, [5]),
    "pad_token_id": (*NOT_TOKENS, [1], MASK),
    "eos_token_id": (*NOT_TOKENS, [2, 37], [2, "3"], [2.0], [-1], MASK, [2, MASK]),
    "suppress_tokens": ("ab", 7, [37], [-1], [1.5]),
    "bad_words_ids": ("ab", [], [3], [[]], [[3, 4]], [[7], [3, 4]], [[37]], [[-1]], [["a"]], ((3,),)),
    "sequence_bias": (
        "ab",
        {},
        [],
        {(3, 4): 1.0},
        {(): 1.0},
        {(37,): 1.0},
        {3: 1.0},
        {(3,): "1"},
        {(3,): NAN},
        {(3,): INF},
        [[[3, 4], 1.0]],
        [[[3], 1.0], [[37], 1.0]],
        [[3, 1.0]],
        [[[3]]],
    ),
    "end_think_token_ids": ("ab", 7, [], [7, 37], [-1], [1.5], [MASK]),
    "bos_token_id": NOT_TOKENS[:3],
    "compile_config": ({}, "max-autotune"),
    "remove_invalid_values": NOT_FLAGS,
    "end_think_boost": ("1", -1, NAN, True),
    "end_think_power": ("1", -1, INF, True),
    "repetition_penalty": ("1", 0, -1, NAN),
    # output
    "do_sample": NOT_FLAGS,
    "output_trace": NOT_FLAGS,
    "defer_eos": NOT_FLAGS,
    "return_dict_in_generate": NOT_FLAGS,
    "num_return_sequences": (*NOT_LENGTHS, 2),  # 2 because a greedy call has one answer
    "stop_strings": (5, "", [], [""], ["a", 5]),
    # what assumes writing from left to right: beams, assisted decoding, forced tokens, n-grams
    "num_beams": (2,),
    "num_beam_groups": (2,),
    "diversity_penalty": (0.5,),
    "length_penalty": (2.0,),
    "early_stopping": (True, "never"),
    "constraints": ([1],),
    "force_words_ids": ([[3]],),
    "penalty_alpha": (0.5,),
    "dola_layers": ("low",),
    "prompt_lookup_num_tokens": (3,),
    "assistant_early_exit": (1,),
    "use_mtp": (True,),
    "cache_implementation": ("static",),
    "token_healing": (True,),
    "forced_bos_token_id": (3,),
    "forced_eos_token_id": (3,),
    "begin_suppress_tokens": ([3],),
    "no_repeat_ngram_size": (2,),
    "encoder_no_repeat_ngram_size": (2,),
    "encoder_repetition_penalty": (1.5,),
    "exponential_decay_length_penalty": ((1, 2.0),),
    "watermarking_config": ({"bias": 1.0},),
    "output_attentions": (True,),
    "output_hidden_states": (True,),
    "output_scores": (True,),
    "output_logits": (True,),
}

# {field: values that no sampling call may accept}
BAD_SAMPLING_FIELDS = {
    "temperature": ("1", 0, -1, INF),
    "top_k": ("1", -1, 2.5),
    "top_p": ("1", -0.5, 2.0, NAN),
    "top_h": (-1.0, 2.0),
    "min_p": ("1", -0.5, 2.0),
    "typical_p": ("1", -0.5, 0, 2.0),
    "epsilon_cutoff": ("1", -0.5, 1.0),
    "eta_cutoff": ("1", -0.5, 1.0),
    "num_return_sequences": ("2", 2.0, 0, -1),
}

# {argument: values} of the signature
BAD_ARGUMENTS = {
    "generation_config": ({"max_new_tokens": 4}, 5),
    "logits_processor": (5, lambda ids, scores: scores),
    "stopping_criteria": (5, lambda ids, scores: True),
    "on_step": (5, "print"),
    "streamer": (5, print),
    "generator": (5, "seed"),
    "attention_mask": (
        [[1, 1, 1]],
        torch.ones(3),
        torch.ones(1, 4),
        torch.ones(2, 3),
        torch.ones(1, 1, 3, 3),
        torch.tensor([[1, 1, 0]]),  # padding on the right
        torch.tensor([[1, 0, 1]]),  # and inside
    ),
    "preset": ("slow", 3, ["fast"]),
    # unknown ones, a misspelt name and arguments of other ways of writing among them
    "confidense_threshold": (0.5,),
    "eos_token_ids": ([2], None),  # a property of the config
    "update": (True,),  # and methods of it
    "to_dict": (1,),
    "field_names": (1,),
    "_from_model_config": (True,),
    "steps": (4,),
    "assistant_model": ("a model",),
    "negative_prompt_ids": (PROMPT,),
    "prefix_allowed_tokens_fn": (lambda batch, ids: [7],),
}

BAD_PROMPTS = (
    [[7, 8]],
    "text",
    torch.tensor([7, 8, 9]),  # no batch
    torch.ones(1, 2, 3).long(),
    torch.tensor([[7.0, 8.0]]),
    torch.tensor([[True, False]]),
    torch.ones(1, 0).long(),  # empty
    torch.ones(0, 3).long(),
    torch.tensor([[7, 37]]),  # out of the vocabulary of 37 tokens
    torch.tensor([[-1, 7]]),
    torch.tensor([[PAD, PAD], [7, 8]]),  # a row of padding
    None,
)

CONFLICTS = [
    # (names of which one must be in the message, arguments)
    (["temperature", "do_sample"], {"do_sample": True, "temperature": 0.0}),
    (["min_new_tokens"], {"max_new_tokens": None, "max_length": 6, "min_new_tokens": 4}),
    (["min_length", "max_length"], {"max_new_tokens": None, "max_length": 6, "min_length": 7}),
    (["min_new_tokens"], {"max_new_tokens": None, "min_new_tokens": 257}),
    (["compile_config", "compile"], {"compile_config": CompileConfig()}),
    (["disable_compile"], {"compile": True, "block_cache": "dual", "disable_compile": True}),
    (["confidence_threshold"], {"confidence_threshold": 0.5, "confidence_factor": 0.5}),
    (["confidence_threshold"], {"confidence_threshold": 0.5, "entropy_bound": 0.5}),
    (["entropy_bound"], {"confidence_factor": 0.5, "entropy_bound": 0.5}),
    (["entropy_bound", "frechet_margin"], {"entropy_bound": 0.5, "frechet_margin": 0.5}),
    (["tokenizer"], {"stop_strings": "a"}),
    (["tokenizer"], {"stop_strings": ["a", "b"], "tokenizer": 5}),
    (["mask_token_id"], {"mask_token_id": 2}),  # EOS
    (["mask_token_id"], {"mask_token_id": PAD}),
    (["inputs", "input_ids"], {"input_ids": PROMPT}),  # twice
    (["max_length"], {"max_new_tokens": None, "max_length": 2}),  # below the prompt
    (["max_length"], {"max_new_tokens": None, "max_length": 3}),  # nothing to write
    (["max_length"], {"max_new_tokens": None, "max_length": 65}),  # beyond the model's positions
    (["max_length"], {"max_new_tokens": None, "max_length": "9"}),
    (["max_position_embeddings"], {"inputs": torch.full((1, 64), 7), "max_new_tokens": None}),  # no room at all
    (["streamer"], {"inputs": PROMPT.repeat(2, 1), "streamer": BaseStreamer()}),
    (["streamer"], {"do_sample": True, "num_return_sequences": 2, "streamer": BaseStreamer()}),
]


def _cases(table: dict) -> list:
    def name_of(value) -> str:
        return re.sub(" at 0x.*", "", repr(value))[:30]  # no address: the workers of a run compare their names

    return [
        pytest.param(name, value, id=f"{name}-{name_of(value)}") for name, values in table.items() for value in values
    ]


@pytest.fixture(scope="module")
def model():
    model = random_model(0)
    model.num_calls = 0

    def count(*_):
        model.num_calls += 1

    model.register_forward_pre_hook(count)
    return model


def _message(model, **arguments) -> str:
    model.num_calls = 0
    with pytest.raises(ValueError) as error:
        model.generate(**{"inputs": PROMPT, "max_new_tokens": 4, "block_length": 4, **arguments})
    assert model.num_calls == 0
    return str(error.value)


@pytest.mark.parametrize(("name", "value"), _cases(BAD_FIELDS))
def test_a_bad_field_is_named(model, name, value):
    assert f"`{name}`" in _message(model, **{name: value})


@pytest.mark.parametrize(("name", "value"), _cases(BAD_SAMPLING_FIELDS))
def test_a_bad_field_of_sampling_is_named(model, name, value):
    assert f"`{name}`" in _message(model, do_sample=True, **{name: value})


@pytest.mark.parametrize(("name", "value"), _cases(BAD_ARGUMENTS))
def test_a_bad_argument_is_named(model, name, value):
    assert name in _message(model, **{name: value})


@pytest.mark.parametrize("prompt", BAD_PROMPTS, ids=str)
def test_a_bad_prompt_is_named(model, prompt):
    assert "`input_ids`" in _message(model, inputs=prompt)


@pytest.mark.parametrize(("names", "arguments"), CONFLICTS, ids=lambda case: "+".join(case))
def test_a_conflict_is_named(model, names, arguments):
    message = _message(model, **arguments)
    assert all(name in message for name in names)


def test_the_message_holds_the_value_and_what_is_allowed(model):
    assert _message(model, confidence_threshold=1.5) == "`confidence_threshold` must be a number in (0, 1], got 1.5."
    assert "padding_side = 'left'" in _message(model, attention_mask=torch.tensor([[1, 1, 0]]))


def test_a_config_is_checked_when_it_is_made():
    with pytest.raises(ValueError, match="`block_length` must be an integer of at least 1, got 0"):
        MaskedDiffusionGenerationConfig(block_length=0)
    config = MaskedDiffusionGenerationConfig(block_length=4)
    with pytest.raises(ValueError, match="`canvas`"):
        config.update(canvas="square")


def test_a_tokenizer_alone_is_no_conflict(model):
    """`transformers serve` always passes one."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 7}, unk_token="a")))
    model.generate(PROMPT, max_new_tokens=2, tokenizer=tokenizer)


@pytest.mark.parametrize(
    "arguments",
    [
        {"confidence_threshold": 1},  # the ends of the intervals
        {"confidence_threshold": 1e-9},
        {"entropy_bound": 0},
        {"frechet_margin": 0},
        {"guidance_scale": 0},
        {"max_new_tokens": 61},
        {"max_new_tokens": None, "max_length": 4},
        {"max_denoising_steps": 99},
        {"eos_token_id": None},
        {"eos_token_id": [2, 36]},
        {"suppress_tokens": []},
        {"temperature": 0.0},  # greedy in other words
        {"do_sample": True, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "top_k": 0, "temperature": 1},
        {"num_beams": 1, "use_cache": True, "length_penalty": 1.0, "streamer": None, "assistant_model": None},
        {"attention_mask": torch.tensor([[False, True, True]])},
        {"attention_mask": torch.tensor([[0.0, 1.0, 1.0]])},
        {"inputs": PROMPT.int()},
        {"inputs": torch.tensor([[7, MASK]]), "max_new_tokens": 0},
    ],
    ids=str,
)
def test_a_good_value_at_the_border_is_accepted(model, arguments):
    output = model.generate(**{"inputs": PROMPT, "max_new_tokens": 4, **arguments})
    assert output.shape[0] == 1 and MASK not in output


def test_plain_generation_configs_are_understood(model):
    expected = model.generate(PROMPT, max_new_tokens=5)
    assert torch.equal(model.generate(PROMPT, GenerationConfig(max_new_tokens=5)), expected)
    assert torch.equal(model.generate(PROMPT, GenerationConfig(max_length=8)), expected)
    assert torch.equal(model.generate(PROMPT, MaskedDiffusionGenerationConfig(max_new_tokens=5)), expected)
    assert torch.equal(model.generate(PROMPT, GenerationConfig(max_new_tokens=9), max_new_tokens=5), expected)


@pytest.mark.parametrize(
    ("given", "arguments", "expected"),
    [
        ({}, {"preset": "fast", "entropy_bound": 0.1}, {"entropy_bound": 0.1}),
        ({"confidence_factor": 1.0}, {"preset": "fast"}, {"confidence_threshold": 0.9}),
        ({"confidence_factor": 1.0}, {"confidence_threshold": 0.5}, {"confidence_threshold": 0.5}),
        ({"max_new_tokens": 9}, {"max_length": 5}, {"max_length": 5}),
        ({"max_denoising_steps": 1, "confidence_factor": 1.0}, {"preset": "exact"}, {}),
        ({}, {"preset": "exact", "max_denoising_steps": 3}, {"max_denoising_steps": 3}),
    ],
    ids=str,
)
def test_of_fields_that_exclude_each_other_the_nearest_source_wins(given, arguments, expected):
    """Keyword arguments, then the preset, then the config of the call."""
    names = ("confidence_threshold", "confidence_factor", "entropy_bound", "max_denoising_steps")
    names += ("max_new_tokens", "max_length")
    config = MaskedDiffusionGenerationConfig.merged(None, MaskedDiffusionGenerationConfig(**given), **arguments)
    assert {name: getattr(config, name) for name in names if getattr(config, name) is not None} == expected


def test_the_callers_config_and_the_models_are_left_alone(model):
    config = MaskedDiffusionGenerationConfig(max_new_tokens=3)
    before = config.to_dict(), model.generation_config.to_dict()
    model.generate(PROMPT, config, block_length=2, canvas="fixed", pad_token_id=4)
    assert (config.to_dict(), model.generation_config.to_dict()) == before


@pytest.fixture
def warnings_of(model, caplog, monkeypatch):
    """The warnings of Transformers' logger in a call in which pad is EOS."""
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "propagate", True)  # as it is where the variable `CI` is set

    def call(prompts, **arguments):
        logger.warning_once.__func__.cache_clear()
        caplog.clear()
        model.generate(torch.tensor(prompts), max_new_tokens=1, pad_token_id=EOS, **arguments)
        return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]

    with caplog.at_level(logging.WARNING, logger="transformers"):
        yield call


@pytest.mark.parametrize("prompts", [[[EOS, 7, 8], [7, 8, 9]], [[EOS, EOS, 7]], [[EOS, EOS, 7], [EOS, 7, 8]]])
def test_pads_that_are_eos_and_no_mask_give_a_warning(warnings_of, prompts):
    (message,) = warnings_of(prompts)
    assert f"`attention_mask` is not given and cannot be inferred, since `pad_token_id`={EOS} is an EOS" in message


@pytest.mark.parametrize(
    ("prompts", "arguments"),
    [
        ([[EOS, 7, 8], [7, 8, 9]], {"attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}),
        ([[7, 8, 9], [7, EOS, EOS]], {}),  # no row begins with one
        ([[EOS, 7, 8], [EOS, 8, 9]], {}),  # a BOS
        ([[EOS, 7, 8]], {}),
    ],
    ids=str,
)
def test_there_is_no_warning_where_nothing_looks_like_padding(warnings_of, prompts, arguments):
    assert warnings_of(prompts, **arguments) == []


def test_the_warning_comes_once(warnings_of, model, caplog):
    assert len(warnings_of([[EOS, 7, 8], [7, 8, 9]])) == 1
    model.generate(torch.tensor([[EOS, 7, 8], [7, 8, 9]]), max_new_tokens=1, pad_token_id=EOS)
    assert sum("cannot be inferred" in record.getMessage() for record in caplog.records) == 1
