"""Models that are loaded whole, or not at all."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

ADAPTER_CONFIG = "adapter_config.json"
BASE_FIELD = "base_model_name_or_path"
NAMES_LISTED = 10  # of each kind of problem, in a message


class CheckpointError(ValueError):
    """A checkpoint whose tensors are not what its index and configuration say.

    The message lists the first ten tensors of each kind, `problems` all of them.

    Attributes:
        problems (`dict[str, list[str]]`): kind of problem (`"missing"`, `"extra"`, `"misshapen"`, `"duplicate"`,
            `"wrong dtype"`, `"not finite"` ...) to the tensors that have it, by name.
    """

    def __init__(self, where: str, problems: dict[str, list[str]]):
        self.problems = {kind: names for kind, names in problems.items() if names}
        listed = "; ".join(f"{kind}: {_enumerate(names)}" for kind, names in self.problems.items())
        super().__init__(f"The tensors of {where} do not fit: {listed}.")


def _enumerate(names: list[str]) -> str:
    left_off = len(names) - NAMES_LISTED
    return ", ".join(names[:NAMES_LISTED]) + (f" and {left_off} more" if left_off > 0 else "")


def load_whole_model(source: str | Path, **kwargs) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained`, with an error where Transformers only logs a report.

    Transformers initialises at random what a checkpoint lacks, and drops what the model has no place for.

    Args:
        source (`str` or `Path`): a folder, or an id on the Hub; the folder may contain an adapter that names its base.
        kwargs: of `from_pretrained`.

    Raises:
        CheckpointError: lists the tensors that are missing, extra or misshapen.
    """
    adapter = Path(source) if is_adapter(Path(source)) else None
    base = source if adapter is None else base_of(adapter)
    model, report = AutoModelForCausalLM.from_pretrained(
        base, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
    )
    refuse_problems(base, report)
    if adapter is not None:
        refuse_problems(adapter, model.load_adapter(str(adapter), ignore_mismatched_sizes=True).to_dict())
    return model


def refuse_problems(source: str | Path, report: dict) -> None:
    """Raises a [`CheckpointError`] for what Transformers reports of loading a model or an adapter."""
    problems = {
        "missing": sorted(report["missing_keys"]),
        "extra": sorted(report["unexpected_keys"]),
        "misshapen": [
            f"{name} {list(stored)} instead of {list(expected)}"
            for name, stored, expected in sorted(report["mismatched_keys"])
        ],
    }
    if any(problems.values()):
        raise CheckpointError(str(source), problems)


def is_adapter(folder: Path) -> bool:
    """Whether `folder` contains an adapter, and no checkpoint of a model."""
    return (folder / ADAPTER_CONFIG).exists() and not (folder / "config.json").exists()


def base_of(adapter: Path) -> str:
    """The model on which an adapter was trained: a folder or a Hub id. Raises `ValueError` if it does not say."""
    base = read_json(adapter / ADAPTER_CONFIG).get(BASE_FIELD)
    if not base:
        raise ValueError(f"`{BASE_FIELD}` in {adapter / ADAPTER_CONFIG} must name the base model.")
    beside = adapter / base  # a folder may be named from the adapter's own
    return str(beside if beside.is_dir() else base)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `FileNotFoundError`, or `ValueError` if it holds anything else."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is no checkpoint: it has no {path.name}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}.")
    return content
