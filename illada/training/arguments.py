"""The Trainer's arguments that would replace or change the loss of masked diffusion, which are refused by name."""

from collections.abc import Callable

from transformers import TrainingArguments


def check_arguments(arguments: TrainingArguments, compute_loss_func: Callable | None = None):
    """Refuses what would train another loss than the one that was asked for, without a word from the Trainer.

    A test goes through every field of the installed `TrainingArguments`: each is refused here, or known to leave the
    loss as it is.

    Raises:
        ValueError: names the argument, its value and the reason.
    """
    parallelism = arguments.parallelism_config
    values_and_reasons = {
        "label_smoothing_factor": (
            arguments.label_smoothing_factor,
            (0.0,),
            "the Trainer's smoothing replaces the diffusion loss by a cross-entropy over all tokens",
        ),
        "compute_loss_func": (compute_loss_func, (None,), "it would replace the diffusion loss"),
        "use_liger_kernel": (
            arguments.use_liger_kernel,
            (False,),
            "there are no such kernels for these models, and an evaluation without logits has no loss here",
        ),
        "label_names": (
            arguments.label_names,
            (None, ["labels"]),
            "under other names an evaluation would have no loss",
        ),
        "train_sampling_strategy": (
            arguments.train_sampling_strategy,
            ("random", "sequential", "group_by_length"),
            "the noise is numbered by batches of equal size",
        ),
        "average_tokens_across_devices": (
            arguments.average_tokens_across_devices or arguments.world_size * max(1, arguments.n_gpu) == 1,
            (True,),
            "otherwise each process would divide by the number of its own tokens",
        ),
        "parallelism_config": (
            parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled) and "cp or sp",
            (False,),
            "context and sequence parallelism are for causal attention and shifted labels",
        ),
    }
    for name, (value, allowed, reason) in values_and_reasons.items():
        if value not in allowed:
            shown = " or ".join(map(repr, allowed)) if len(allowed) > 1 else repr(allowed[0])
            raise ValueError(f"`{name}` must be {shown}, got {value!r}: {reason}.")
