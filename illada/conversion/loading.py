"""Models that are loaded whole, or not at all."""

from pathlib import Path

from transformers import AutoModelForCausalLM, PreTrainedModel

from .adapters import base_of, is_adapter
from .reading import CheckpointError


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
    _refuse_problems(base, report)
    if adapter is not None:
        _refuse_problems(adapter, model.load_adapter(str(adapter), ignore_mismatched_sizes=True).to_dict())
    return model


def _refuse_problems(source: str | Path, report: dict) -> None:
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
