"""What lm-eval's arguments may be for the model `illada`: what it cannot honour is refused, before work begins."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Literal, get_args

import torch
from lm_eval.models.huggingface import HFLM
from transformers.generation import GenerationConfig

from ..generation_config import MaskedDiffusionGenerationConfig
from .likelihood import check_sampling
from .pairs import check_forward_settings

Score = Literal["likelihood", "confidence"]

LOADING_ARGUMENTS = frozenset(
    "attn_implementation cache_dir device_map distributed_config local_files_only quantization_config token "
    "use_safetensors variant".split()
)
"""Arguments of `from_pretrained` that may be given besides those of `HFLM`."""

UNUSED_ARGUMENTS = {
    "softmax_dtype": "scores are taken in fp32, or in the model's precision if that is higher",
    "logits_cache": "a masked token depends on both sides, so that no logits can be shared",
}
"""Arguments of `HFLM` that would change nothing here, and why."""

ARGUMENTS_OF_A_CHECKPOINT = LOADING_ARGUMENTS | {
    "autogptq",
    "delta",
    "dtype",
    "gguf_file",
    "gptqmodel",
    "max_cpu_memory",
    "max_memory_per_gpu",
    "offload_folder",
    "parallelize",
    "peft",
    "subfolder",
    "tp_plan",
}
"""Arguments that `HFLM` reads while it loads a checkpoint, and not if it is given a model."""

SET_BY_THE_HARNESS = {
    "attention_mask": "",
    "input_ids": "",
    "inputs": "",
    "max_length": ": use `max_gen_toks`",
    "num_return_sequences": ": use `repeats` of the task",
    "pad_token_id": "",
    "return_dict_in_generate": "",
    "stop": ": use `until`",
    "stop_strings": ": use `until`",
    "streamer": "",
    "tokenizer": "",
}
"""Arguments of `generate` that a task may not set, and what to use instead."""


class WrongArgument(ValueError):
    """An argument that is unknown, bad, or cannot be honoured."""


@contextmanager
def _blaming_arguments() -> Iterator[None]:
    """Whatever is wrong inside is the fault of an argument."""
    try:
        yield
    except ValueError as error:
        raise WrongArgument(str(error)) from error


@_blaming_arguments()
def check_model_arguments(pretrained, own: dict, others: dict):
    """Raises [`WrongArgument`] for arguments of the model that are unknown, bad, or without an effect.

    Args:
        pretrained: a checkpoint, or a model that is loaded already.
        own: the adapter's other arguments, by name.
        others: those of `HFLM` and of `from_pretrained`.
    """
    if unknown := sorted(set(others) - {*inspect.signature(HFLM.__init__).parameters, *LOADING_ARGUMENTS}):
        raise ValueError(
            f"The lm-eval model `illada` got unknown arguments {unknown}: it takes {', '.join(['pretrained', *own])}, "
            f"the arguments of lm-eval's `hf`, and {', '.join(sorted(LOADING_ARGUMENTS))}."
        )
    given = {name: value for name, value in others.items() if value not in (None, False)}
    if given.keys() >= {"peft", "delta"}:
        raise ValueError("`peft` and `delta` cannot both be given.")
    for name, reason in UNUSED_ARGUMENTS.items():
        if name in given:
            raise ValueError(f"`{name}` has no effect with the model `illada`, got {given[name]!r}: {reason}.")
    if isinstance(pretrained, torch.nn.Module) and (unread := sorted(ARGUMENTS_OF_A_CHECKPOINT & set(given))):
        raise ValueError(f"`{unread[0]}` is for loading a checkpoint: `pretrained` is a model that is loaded already.")
    if own["score"] not in get_args(Score):
        raise ValueError(f"`score` must be one of {', '.join(map(repr, get_args(Score)))}, got {own['score']!r}.")
    if others.get("backend", "causal") != "causal":
        raise ValueError(
            f"`backend` must be 'causal', the harness's name for one sequence, got {others['backend']!r}."
        )
    for name in ("append_eos", "check_greedy", "add_bos_token"):
        value = own.get(name, others.get(name))
        if not (value is None or isinstance(value, bool)):
            raise ValueError(f"`{name}` must be True or False, got {value!r}.")
    check_forward_settings(1, own["guidance_scale"])
    check_sampling(own["num_samples"], own["sampling"])
    _check_batch_size(others.get("batch_size", 1), others.get("max_batch_size"))
    _check_device(own["device"], getattr(pretrained, "device", None))


def _check_batch_size(batch_size, max_batch_size):
    if batch_size != "auto" and not (str(batch_size).isdecimal() and int(batch_size) >= 1):
        raise ValueError(f"`batch_size` must be a positive integer or 'auto', got {batch_size!r}.")
    if max_batch_size is not None and not (isinstance(max_batch_size, Integral) and max_batch_size >= 1):
        raise ValueError(f"`max_batch_size` must be an integer of at least 1, got {max_batch_size!r}.")


def _check_device(device: str | None, place: torch.device | None):
    """`HFLM` takes a device that it does not know for the default one, and leaves a model at its `place`."""
    if device is None:
        return
    try:
        kind, index = torch.device(device).type, torch.device(device).index or 0
    except RuntimeError:
        kind, index = None, 0
    if place is not None and kind != place.type:
        raise ValueError(f"`device` must be that of the model, {place}, got {device!r}.")
    if kind not in ("cpu", "cuda", "mps", "npu", "xpu", "hpu"):
        raise ValueError(f"`device` must be a device of torch's, such as cpu, cuda, cuda:1 or mps, got {device!r}.")
    if kind == "cuda" and index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"`device` must be one that torch finds, got {device!r}: it finds {count} CUDA devices.")


@_blaming_arguments()
def check_generation_arguments(own: GenerationConfig, task: str, gen_kwargs: dict, settings: dict, max_length: int):
    """Raises [`WrongArgument`] for generation arguments of a task that are unknown, bad, or cannot be honoured.

    Args:
        own: the model's settings.
        task: name of the task.
        gen_kwargs: what the task gives.
        settings: what is left of it for `generate`, and the harness's `until` and `max_gen_toks`.
        max_length: positions of the model.
    """
    where = f"in `gen_kwargs` of task {task!r}"
    for name, instead in SET_BY_THE_HARNESS.items():
        if gen_kwargs.get(name) is not None:
            raise ValueError(f"`{name}` cannot be set {where}, got {gen_kwargs[name]!r}{instead}.")
    settings = dict(settings)
    max_gen_toks, until, infill = settings.pop("max_gen_toks"), settings.pop("until"), settings.pop("infill", False)
    if not 0 <= max_gen_toks < max_length:
        raise ValueError(
            f"`max_gen_toks` must be below the model's {max_length} positions (`max_length`) and not negative, got "
            f"{max_gen_toks} {where}."
        )
    if not all(isinstance(text, str) and text for text in until):
        raise ValueError(f"`until` must be texts that are not empty, got {until!r} {where}.")
    if not isinstance(infill, bool):
        raise ValueError(f"`infill` must be True or False, got {infill!r} {where}.")
    if infill and until:
        raise ValueError(
            f"`until` must be empty with `infill`, got {until!r} {where}: the harness would cut the context, which is "
            "part of the result, at them."
        )
    try:
        MaskedDiffusionGenerationConfig.merged(own, None, **settings).validate()
    except ValueError as error:
        raise ValueError(f"{error} (Given {where}.)") from error
