"""What was written is read back and compared with where it came from."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel
from transformers.utils import logging

from ..configuration_illada import ILLaDAConfig
from ..text.whole_models import CheckpointError
from .planning import Plan, expected_shapes
from .reading import CheckpointTensors, ModelTensors


def verify_tensors(folder: Path, plan: Plan, source: CheckpointTensors | ModelTensors) -> None:
    """Reads every tensor back, one at a time, and compares it byte for byte with the source's, cast if it was cast.

    Raises:
        CheckpointError: lists the tensors that are missing, extra, misshapen or different.
    """
    written = CheckpointTensors(folder)
    problems = {
        "missing": [name for name in plan.sources if name not in written.infos],
        "extra": [name for name in written.infos if name not in plan.sources],
        "written differently": [
            name for name in plan.sources if name in written.infos and not _same(written, name, plan, source)
        ],
    }
    if any(problems.values()):
        raise CheckpointError(str(folder), problems)


def _same(written: CheckpointTensors, name: str, plan: Plan, source: CheckpointTensors | ModelTensors) -> bool:
    (copy,) = written.read([name]).values()
    (original,) = source.read([plan.sources[name]]).values()
    original = original.to(plan.dtype)
    # As bytes, so that zeros of different sign differ.
    return copy.shape == original.shape and torch.equal(copy.view(torch.uint8), original.view(torch.uint8))


@torch.no_grad()
def verify_logits(source: Path, written: Path, config: ILLaDAConfig, plan: Plan, max_bytes: int, seed: int = 0) -> int:
    """Compares the logits of both checkpoints, each loaded by its own configuration and names, on random tokens.

    A model that takes more than `max_bytes` is compared with as many of its first layers as fit.

    Returns:
        The number of layers that were compared; 0 if not even one fits.

    Raises:
        ValueError: if the logits differ by more than rounding.
    """
    sizes = {name: math.prod(shape) * plan.dtype.itemsize for name, shape in expected_shapes(config).items()}
    bytes_per_layer = sum(size for name, size in sizes.items() if ".layers.0." in name)
    bytes_outside = sum(size for name, size in sizes.items() if ".layers." not in name)
    num_layers = min(config.num_hidden_layers, (max_bytes - bytes_outside) // bytes_per_layer)
    if num_layers < 1:
        return 0
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(config.vocab_size, (2, min(16, config.max_position_embeddings)), generator=generator)
    expected, actual = (_logits(folder, num_layers, plan, input_ids) for folder in (source, written))
    # Rounding that depends on where a tensor lies in memory is below half a unit in the last place; a precision, an
    # epsilon or a rotation that got lost is above.
    tolerance = max(torch.finfo(plan.dtype).eps / 2, 1e-5)
    difference = ((actual - expected).norm() / expected.norm()).item()
    if not difference <= tolerance:
        raise ValueError(
            f"The logits of {written} differ from those of {source} by {difference:.1e} of their norm, more than "
            f"{tolerance:.1e}."
        )
    return num_layers


def _logits(folder: Path, num_layers: int, plan: Plan, input_ids: torch.LongTensor) -> torch.Tensor:
    with _quiet_transformers():
        config = AutoConfig.from_pretrained(folder)
        config.num_hidden_layers = num_layers
        config.tie_word_embeddings = plan.tied  # a source may say so against its own tensors
        model = AutoModel.from_pretrained(folder, config=config, dtype=plan.dtype)
    return model.eval()(input_ids).logits.double()


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """The layers that are left out on purpose are no news."""
    verbosity, progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if progress:
            logging.enable_progress_bar()
