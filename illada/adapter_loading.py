"""Adapters of PEFT: those with the names of LLaDA's released code act in full, and no tensor is dropped in silence.

PEFT puts an adapter where the names in its configuration match, and drops the tensors that then have no place.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch

from .llada_names import standard_name

PREFIX = "base_model.model."  # of every tensor in a file of PEFT
_DOWNLOAD_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
_UNTRANSLATED_FIELDS = ("layer_replication", "target_parameters", "trainable_token_indices")


def rename_adapter(
    config: dict[str, Any], tensors: Iterable[str], rename: Callable[[str], str] = standard_name
) -> tuple[dict[str, Any], dict[str, str]]:
    """The same adapter under other names.

    The modules are read off the tensors, so that patterns, ranges of layers and names that stand for two modules
    (`ff_out`, in LLaDA's code the down projection and the LM head) keep their meaning.

    Args:
        config (`dict`): content of `adapter_config.json`.
        tensors (`Iterable[str]`): names in the file of weights.
        rename (`Callable`): new name of a parameter of the model.

    Returns:
        The fields of `config` that change, none if every name stays; and the new name of each tensor.

    Raises:
        ValueError: if names change and the adapter is no LoRA, or `config` names parameters in a way that is not
            translated.
    """
    new_names = {name: PREFIX + rename(name.removeprefix(PREFIX)) for name in tensors if name.startswith(PREFIX)}
    new_names |= {name: name for name in tensors if name not in new_names}
    if all(new == old for old, new in new_names.items()):
        return {}, new_names
    if config.get("peft_type") != "LORA":
        raise ValueError(f"`peft_type` must be 'LORA' where names are translated, got {config.get('peft_type')!r}.")
    for field in _UNTRANSLATED_FIELDS:
        if config.get(field):
            raise ValueError(f"`{field}` must be absent where an adapter's names are translated, got {config[field]}.")

    adapted, saved = {}, set()
    for old, new in new_names.items():
        if ".lora_" in old:
            adapted[_module_of(old)] = _module_of(new)
        elif ".base_layer." not in old:
            saved.add(_module_of(new))
    changes = {
        "target_modules": sorted(adapted.values()),
        "modules_to_save": sorted(saved) if config.get("modules_to_save") else None,
        **dict.fromkeys(("exclude_modules", "layers_pattern", "layers_to_transform")),
    }
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(field) or {}
        matches = {new: _first_match(patterns, old) for old, new in adapted.items()}
        changes[field] = {new: patterns[pattern] for new, pattern in matches.items() if pattern is not None}
    return changes, new_names


def _module_of(tensor: str) -> str:
    name = tensor.removeprefix(PREFIX)
    return name.split(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0]


def _first_match(patterns: Iterable[str], module: str) -> str | None:
    """As PEFT looks up a module's rank."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)), None)


def homeless_tensors(model: torch.nn.Module, tensors: Iterable[str]) -> list[str]:
    """Those tensors of an adapter, in PEFT's naming, for which `model` has no parameter that they could change."""
    with_weight = {name for name, module in model.named_modules() if hasattr(module, "weight")}
    return [name for name in tensors if not _prefixes(name.removeprefix(PREFIX)) & with_weight]


def fit_vocabulary(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Gives `model` as many tokens as the embedding that an adapter brings: PEFT saves a resized one whole."""
    for name, tensor in tensors.items():
        if (
            re.fullmatch(r"(.*\.)?embed_tokens\.((base_layer|modules_to_save\.[^.]*)\.)?weight", name)
            and len(tensor) != model.config.vocab_size
        ):
            model.resize_token_embeddings(len(tensor), mean_resizing=False)


def _prefixes(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:count]) for count in range(1, len(parts))}


class AdapterMixin:
    """What a model of this family adds to the ways in which adapters are loaded."""

    def load_adapter(
        self,
        peft_model_id=None,
        adapter_name=None,
        peft_config=None,
        adapter_state_dict=None,
        *args,
        load_config=None,
        **kwargs,
    ):
        """Transformers' own, which here also takes an adapter that was trained on LLaDA's released code.

        Raises:
            ValueError: names the tensors of the adapter that have no place in the model, that it lacks, or that have
                another shape.
        """
        if peft_model_id is not None and peft_config is None and adapter_state_dict is None:
            peft_config, adapter_state_dict = _read_adapter(peft_model_id, load_config=load_config, **kwargs)
        if peft_config is not None and adapter_state_dict is not None:
            peft_config, adapter_state_dict = _standard_adapter(
                peft_config, adapter_state_dict, adapter_name or "default"
            )
            _refuse(self, homeless_tensors(self, adapter_state_dict))
            fit_vocabulary(self, adapter_state_dict)
        ignores_shapes = kwargs.get("ignore_mismatched_sizes", getattr(load_config, "ignore_mismatched_sizes", False))
        kwargs |= {"load_config": load_config, "ignore_mismatched_sizes": True}
        report = super().load_adapter(peft_model_id, adapter_name, peft_config, adapter_state_dict, *args, **kwargs)
        _refuse(self, sorted(report.unexpected_keys))
        if report.missing_keys:
            raise ValueError(f"The adapter is not whole, it lacks {_first_few(sorted(report.missing_keys))}.")
        if report.mismatched_keys and not ignores_shapes:
            misshapen = [
                f"{name} {list(stored)} instead of {list(own)}" for name, stored, own in report.mismatched_keys
            ]
            raise ValueError(f"The adapter does not fit the model, misshapen: {_first_few(sorted(misshapen))}.")
        return report

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """PyTorch's hook. PEFT loads with `strict=False`, which drops in silence what has no place."""
        if getattr(self, "peft_config", None):
            modules = {_unwrapped(f"{prefix}{name}") for name, _ in self.named_modules()}
            names = [name for name in state_dict if name.startswith(prefix)]
            _refuse(self, [name for name in names if _unwrapped(name).rpartition(".")[0] not in modules])
        super()._load_from_state_dict(state_dict, prefix, *args)


def _standard_adapter(config, tensors: dict[str, torch.Tensor], adapter: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A `PeftConfig` and its tensors under the names that Transformers expects of the adapter called `adapter`."""
    changes, new_names = rename_adapter(config.to_dict(), tensors)
    if changes:
        config = type(config)(**config.to_dict() | changes)
    saved = tuple(getattr(config, "modules_to_save", None) or ())
    return config, {_in_transformers(new_names[name], saved, adapter): tensor for name, tensor in tensors.items()}


def _in_transformers(name: str, saved: tuple[str, ...], adapter: str) -> str:
    """What PEFT adds to names while it loads, and Transformers (some versions) does not."""
    module, _, parameter = name.rpartition(".")
    if parameter == "lora_magnitude_vector":
        return f"{name}.weight"
    if ".lora_" not in name and module.endswith(saved) and saved:
        return f"{module}.modules_to_save.{adapter}.{parameter}"
    return name


def _refuse(model: torch.nn.Module, names: list[str]) -> None:
    if names:
        raise ValueError(
            f"The adapter does not fit {type(model).__name__}, which has no place for {_first_few(names)}. Load an "
            "adapter that was trained on LLaDA's released code with `model.load_adapter`, or with PEFT after `illada "
            "convert`."
        )


def _first_few(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _unwrapped(name: str) -> str:
    """The name without what FSDP and activation checkpointing put around modules."""
    return re.sub(r"_(fsdp|checkpoint)_wrapped_module\.", "", name)


def _read_adapter(source, adapter_kwargs=None, load_config=None, local_files_only=False, **kwargs):
    """The configuration and the tensors of an adapter in a folder or on the Hub."""
    try:
        from peft import PeftConfig, load_peft_weights
    except ImportError as error:
        raise ImportError("Loading an adapter needs peft: `pip install peft`.") from error
    options = {"local_files_only": local_files_only}
    options |= (load_config.download_kwargs or {}) if load_config is not None else {}
    options |= adapter_kwargs or {}
    options = {name: value for name, value in options.items() if name in _DOWNLOAD_OPTIONS and value is not None}
    return PeftConfig.from_pretrained(source, **options), load_peft_weights(source, device="cpu", **options)
