"""The published evaluation settings by name, and those of the embedded model.

Figures, block lengths and scores are those of the paper and its released scripts (arXiv 2606.25331). They do not name
the version of each harness task, nor the number of examples in the context where `num_fewshot` is absent: there the
harness's standard task and its own number stand.
"""

import json
from dataclasses import dataclass, field

from ..tiny import EMBEDDED_MODEL

BASE = "GSAI-ML/iLLaDA-8B-Base"
INSTRUCT = "GSAI-ML/iLLaDA-8B-Instruct"


@dataclass(frozen=True)
class Preset:
    """Arguments of one run of the harness.

    Attributes:
        tasks: lm-eval task, group or tag.
        pretrained: checkpoint; `--model_args pretrained=...` replaces it.
        published: the published result in percent, if there is one.
        model_args: arguments of [`MaskedDiffusionLM`].
        gen_kwargs: fields of [`MaskedDiffusionGenerationConfig`], with `max_gen_toks` for `max_new_tokens`.
        num_fewshot: examples in the context, where it is published.
        chat: whether to apply the checkpoint's chat template.
    """

    tasks: str
    pretrained: str
    published: float | None = None
    model_args: dict = field(default_factory=dict)
    gen_kwargs: dict = field(default_factory=dict)
    num_fewshot: int | None = None
    chat: bool = False

    def arguments(self, with_tasks: bool = True) -> list[str]:
        """The preset as arguments of `lm-eval run`, for arguments of the user to follow and to win."""
        arguments = ["--model_args", json.dumps({"pretrained": self.pretrained, **self.model_args})]
        if with_tasks:
            arguments += ["--tasks", self.tasks]
        if self.gen_kwargs:
            arguments += ["--gen_kwargs", json.dumps(self.gen_kwargs)]
        if self.num_fewshot is not None:
            arguments += ["--num_fewshot", str(self.num_fewshot)]
        if self.chat:
            arguments += ["--apply_chat_template"]
        return arguments


def _generation(max_gen_toks: int, block_length: int, **extra) -> dict:
    """A growing canvas, and as many steps per block as it has positions: one token per forward."""
    return {
        "max_gen_toks": max_gen_toks,
        "canvas": "growing",
        "block_length": block_length,
        "max_denoising_steps": block_length,
        **extra,
    }


def _base(tasks: str, published: float | None, max_gen_toks: int = 1024, block_length: int = 32) -> Preset:
    return Preset(tasks, BASE, published, gen_kwargs=_generation(max_gen_toks, block_length))


def _instruct(
    tasks: str, published: float, max_gen_toks: int, block_length: int = 32, end_think_power: float = 3.0
) -> Preset:
    boost = {"end_think_boost": 100.0, "end_think_power": end_think_power}
    return Preset(tasks, INSTRUCT, published, gen_kwargs=_generation(max_gen_toks, block_length, **boost), chat=True)


# Accuracy does not read `is_greedy`, which would cost forwards of its own.
_RELEASED_FRAME = {"append_eos": True, "add_bos_token": True, "check_greedy": False}
_CONFIDENCE = {"score": "confidence", **_RELEASED_FRAME}
_ONE_SAMPLE = {"score": "likelihood", "num_samples": 1, **_RELEASED_FRAME}

PRESETS: dict[str, Preset] = {
    "base-mmlu": Preset("mmlu", BASE, 74.8, model_args=_ONE_SAMPLE, num_fewshot=5),
    "base-cmmlu": Preset("cmmlu", BASE, model_args=_ONE_SAMPLE, num_fewshot=5),
    "base-arc-challenge": Preset("arc_challenge", BASE, 60.8, model_args=_CONFIDENCE, num_fewshot=0),
    "base-hellaswag": Preset("hellaswag", BASE, 76.6, model_args=_CONFIDENCE, num_fewshot=0),
    "base-bbh": _base("bbh", 71.3),
    "base-gsm8k": _base("gsm8k", 81.9),
    "base-math": _base("minerva_math", 38.4),
    "base-mbpp": _base("mbpp", 57.8),
    "base-humaneval": _base("humaneval", 50.0, max_gen_toks=512, block_length=512),
    "instruct-gsm8k": _instruct("gsm8k", 89.0, max_gen_toks=2048),
    "instruct-math": _instruct("minerva_math", 56.7, max_gen_toks=4096),
    "instruct-mmlu-pro": _instruct("mmlu_pro", 52.3, max_gen_toks=4096),
    "instruct-humaneval": _instruct("humaneval_instruct", 65.9, max_gen_toks=2048, end_think_power=1.0),
    "instruct-mbpp": _instruct("mbpp_instruct", 58.0, max_gen_toks=2048, block_length=16),
    "tiny-chat": Preset("illada_chat", str(EMBEDDED_MODEL), model_args={"score": "confidence"}, chat=True),
    "tiny-documents": Preset("illada_documents", str(EMBEDDED_MODEL)),
}
"""Settings by name: one row of a published table each, and two for the embedded model."""

TABLES: dict[str, list[str]] = {
    table: [name for name in PRESETS if name.startswith(f"{table}-")] for table in ("base", "instruct", "tiny")
}
"""Names of whole tables, and their rows."""


def select_presets(name: str) -> dict[str, Preset]:
    """The presets that a name means: one row, or all rows of a table.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in PRESETS and name not in TABLES:
        raise ValueError(f"`preset` must be one of {', '.join([*TABLES, *PRESETS])}, got {name!r}.")
    return {row: PRESETS[row] for row in TABLES.get(name, [name])}
