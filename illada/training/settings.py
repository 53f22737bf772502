"""The settings of a recipe: three dataclasses, read from YAML and checked before anything is loaded."""

import difflib
import re
import types
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from transformers import AttentionInterface, HfArgumentParser, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..configuration_illada import ILLaDAConfig
from ..generation_config import MaskedDiffusionGenerationConfig
from ..tiny.corpus import DIFFICULTIES, FAMILIES
from .arguments import check_arguments
from .records import locate_data
from .trainer import Objective

RECIPES = Path(__file__).parent / "recipes"
CORPUS = "corpus"
"""The word that names the package's own synthetic corpus, as data and as tokenizer."""

OBJECTIVES = {
    "pretraining": Objective(),
    "sft": Objective(),
    "llada_sft": Objective(split_probability=0.0, keep_prompt_probability=1.0, per_response=True),
}
"""The published objective of each data format."""


@dataclass
class ModelArguments:
    """Which model is trained.

    Args:
        model: checkpoint folder or Hub id to start from; `illada-tiny` is the embedded model.
        config: fields of `ILLaDAConfig` for a model from scratch, instead of `model`.
        tokenizer: folder or Hub id, the checkpoint's own if absent; `corpus` trains the embedded model's.
        dtype: of the weights. With fp32 weights and `bf16: true`, the forward pass runs in bf16.
        attn_implementation: `sdpa`, `flex_attention`, `flash_attention_2` ...; Transformers' choice if absent.
        lora: fields of `peft.LoraConfig`; the whole model is trained if absent.
        generation: fields of the generation config, for samples and for the saved model.
        overwrite: whether the model that `output_dir` may hold is replaced, if the run does not go on from it.
    """

    model: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    dtype: str = "float32"
    attn_implementation: str | None = None
    lora: dict[str, Any] | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    overwrite: bool = False

    def __post_init__(self):
        if (self.model is None) == (self.config is None):
            raise ValueError("Exactly one of `model` (a checkpoint) and `config` (from scratch) must be set.")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("`tokenizer` must be set for a model from scratch.")
        if not is_dtype(self.dtype):
            raise ValueError(f"`dtype` must be a torch dtype of floating point such as bfloat16, got {self.dtype!r}.")
        attention = self.attn_implementation
        known = ("eager", *AttentionInterface().valid_keys())
        if attention is not None and attention not in known and "/" not in attention:  # a kernel on the Hub has one
            raise ValueError(f"`attn_implementation` must be one of {', '.join(known)}, got {attention!r}.")
        for name, config_class in (("config", ILLaDAConfig), ("generation", MaskedDiffusionGenerationConfig)):
            _check_config(name, getattr(self, name) or {}, config_class)
        if self.lora is not None:
            self.lora_config()

    def lora_config(self):
        """The `peft.LoraConfig` of `lora`.

        Raises:
            ValueError: if `lora` has an unknown field, or peft refuses a value or is not installed.
        """
        try:
            from peft import LoraConfig

            return LoraConfig(**self.lora)
        except (ImportError, TypeError, ValueError) as error:
            raise ValueError(f"`lora` must hold fields of peft.LoraConfig, got {self.lora}: {error}.") from error


@dataclass
class DataArguments:
    """What it is trained on, and in which format.

    Args:
        train_data: a .jsonl, .json, .parquet or .csv file, a data set's folder or Hub id, or `corpus`.
        eval_data: likewise, for the evaluation loss; none if absent.
        format: `pretraining` (documents packed, each its own segment), `sft` (iLLaDA's: examples concatenated) or
            `llada_sft` (one example per row, prompt visible, EOS padding).
        length: tokens in a window; in `llada_sft`, the most that an example may have.
        corpus_difficulty: level of the corpus's examples: `easy`, `medium` or `hard`.
        corpus_opening: number of examples of single families that come before the corpus's mixture.
        streaming: whether data are tokenised during training rather than before, in the order of the file and again
            from its beginning; `max_steps` must be set then.
        sample_prompts: texts that the model continues at every evaluation.
        split_probability, keep_prompt_probability: see [`Objective`]; the format's own if absent.
        eps, stratified: see [`Objective`].
    """

    train_data: str = field(default="")
    eval_data: str | None = None
    format: str = "sft"
    length: int = 1024
    corpus_difficulty: str = "easy"
    corpus_opening: dict[str, int] = field(default_factory=dict)
    streaming: bool = False
    sample_prompts: list[str] = field(default_factory=list)
    split_probability: float | None = None
    keep_prompt_probability: float | None = None
    eps: float = 1e-3
    stratified: bool = True

    def __post_init__(self):
        if not self.train_data:
            raise ValueError("`train_data` must be set.")
        if self.format not in OBJECTIVES:
            raise ValueError(f"`format` must be one of {', '.join(OBJECTIVES)}, got {self.format!r}.")
        if self.length < 2:
            raise ValueError(f"`length` must be at least 2, got {self.length}.")
        if self.corpus_difficulty not in DIFFICULTIES:
            raise ValueError(
                f"`corpus_difficulty` must be one of {', '.join(DIFFICULTIES)}, got {self.corpus_difficulty!r}."
            )
        for family, count in self.corpus_opening.items():
            if family not in FAMILIES or not isinstance(count, int) or count < 0:
                raise ValueError(
                    f"`corpus_opening` must give a number of examples to some of {', '.join(FAMILIES)}, "
                    f"got {family!r}: {count!r}."
                )
        if self.corpus_opening and self.train_data != CORPUS:
            raise ValueError(f"`corpus_opening` is for `train_data: {CORPUS}`, got {self.train_data!r}.")
        if not all(isinstance(prompt, str) and prompt for prompt in self.sample_prompts):
            raise ValueError(f"`sample_prompts` must be texts that are not empty, got {self.sample_prompts!r}.")
        if self.sample_prompts and self.eval_data is None:
            raise ValueError("`sample_prompts` are continued at evaluations: `eval_data` must be set, too.")
        self.objective  # noqa: B018  its values are checked

    @property
    def objective(self) -> Objective:
        given = {name: getattr(self, name) for name in ("split_probability", "keep_prompt_probability")}
        given = {name: value for name, value in given.items() if value is not None}
        return replace(OBJECTIVES[self.format], eps=self.eps, stratified=self.stratified, **given)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: 2e-3 is a number and `no` is a word, which YAML 1.1 reads the other way round."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|false)$"), list("tf"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$"), list("-+.0123456789")
)


def read_settings(
    recipe: str, overrides: Sequence[str] = ()
) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Reads a recipe: flat YAML of the fields of three dataclasses, the Trainer's arguments among them.

    Args:
        recipe: path of a YAML file, or the name of a recipe in the package.
        overrides: `name=value` each, with a YAML value; they win over the file.

    Raises:
        ValueError: if the file is absent or no YAML, or a setting unknown or out of range; the message names it.
    """
    path = RECIPES / f"{recipe}.yaml" if (RECIPES / f"{recipe}.yaml").is_file() else Path(recipe)
    if not path.is_file():
        raise ValueError(f"`recipe` must be a YAML file or one of {', '.join(recipe_names())}, got {recipe!r}.")
    settings = _load_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: must be a mapping of settings, got {type(settings).__name__}.")
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"A setting is written name=value, got {override!r}.")
        settings[name] = _load_yaml(value, override)
    settings = _with_known_names(settings)
    kinds = (ModelArguments, DataArguments, TrainingArguments)
    names = [item.name for kind in kinds for item in fields(kind) if item.init]
    for name in settings:
        if name not in names:
            nearest = difflib.get_close_matches(str(name), names, n=1)
            hint = f": did you mean `{nearest[0]}`?" if nearest else "."
            raise ValueError(f"{path}: `{name}` is not a setting{hint}")
    try:
        for kind in kinds:
            _check_types(kind, settings)
        return HfArgumentParser(kinds).parse_dict(settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _with_known_names(settings: dict[str, Any]) -> dict[str, Any]:
    """With `activation_checkpointing` under the name that the installed Transformers knows: `gradient_...` to 5.23."""
    known = {item.name for item in fields(TrainingArguments)}
    old, new = "gradient_checkpointing", "activation_checkpointing"
    if new not in known:
        old, new = new, old
    renamed = {old: new, f"{old}_kwargs": f"{new}_kwargs"}
    for name, other in renamed.items():
        if name in settings and other in settings:
            raise ValueError(f"`{name}` and `{other}` are two names of one setting: give one of them.")
    return {renamed.get(name, name): value for name, value in settings.items()}


IN_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    list: "a list",
    dict: "a mapping",
    types.NoneType: "null",
}


def _check_types(kind: type, settings: dict[str, Any]):
    """Refuses values of other types than a dataclass says, where it says so plainly.

    `TrainingArguments` takes more than it says where it says `str`: paths, enumerations, `true`.
    """
    hints = get_type_hints(kind)
    for item in fields(kind):
        if item.name not in settings:
            continue
        value, hint = settings[item.name], hints[item.name]
        parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        allowed = {get_origin(part) or part for part in parts}
        if not allowed <= IN_WORDS.keys() or (kind is TrainingArguments and str in allowed):
            continue
        accepted = allowed | ({int} if float in allowed else set())
        is_right = isinstance(value, tuple(accepted)) and (not isinstance(value, bool) or bool in allowed)
        if not is_right:
            words = " or ".join(text for each, text in IN_WORDS.items() if each in allowed)
            raise ValueError(f"`{item.name}` must be {words}, got {value!r}.")


LEAST = {
    "adam_beta1": 0,
    "adam_beta2": 0,
    "adam_epsilon": 0,
    "data_seed": 0,
    "dataloader_num_workers": 0,
    "eval_steps": 0,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "logging_steps": 0,
    "max_grad_norm": 0,
    "num_train_epochs": 0,
    "per_device_eval_batch_size": 1,
    "per_device_train_batch_size": 1,
    "save_steps": 0,
    "seed": 0,
    "warmup_steps": 0,
    "weight_decay": 0,
}
"""Least values of fields of `TrainingArguments` that it does not check itself."""


def check_settings(model: ModelArguments, data: DataArguments, training: TrainingArguments):
    """Refuses what would fail only after the model and the data were loaded.

    Raises:
        ValueError: names the setting, its value and what is allowed.
    """
    check_arguments(training)
    for name, least in LEAST.items():
        value = getattr(training, name)
        if value is not None and value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")
    for name in ("train_data", "eval_data"):
        source = getattr(data, name)
        if source is not None and source != CORPUS:
            locate_data(source, name)
    if training.max_steps <= 0 and (data.streaming or data.train_data == CORPUS):
        raise ValueError(f"`max_steps` must be set, since the training data have no end, got {training.max_steps}.")
    if training.eval_strategy != "no" and data.eval_data is None:
        raise ValueError(f"`eval_strategy: {training.eval_strategy.value}` needs `eval_data`.")
    checkpoint = training.resume_from_checkpoint
    if checkpoint is True:
        folder = Path(training.output_dir)
        if not folder.is_dir() or get_last_checkpoint(folder) is None:
            raise ValueError(f"`resume_from_checkpoint` needs a checkpoint-N in `output_dir`, got {str(folder)!r}.")
    elif checkpoint and not Path(checkpoint).is_dir():
        raise ValueError(f"`resume_from_checkpoint` must be true or a checkpoint's folder, got {checkpoint!r}.")


def is_dtype(name: str) -> bool:
    """Whether torch has a floating-point dtype of that name."""
    dtype = getattr(torch, name, None)
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def _check_config(name: str, values: dict[str, Any], config_class: type):
    """Refuses unknown fields, which a configuration of Transformers would store unread, and values out of range."""
    try:
        config = config_class(**values)
    except Exception as error:  # huggingface_hub's errors of strict dataclasses have no common base
        raise ValueError(f"`{name}`: {error}") from error
    known = vars(config_class()).keys() | {"rope_theta", "rope_scaling"}
    if unknown := [field for field in values if field not in known]:
        raise ValueError(f"`{name}` must hold fields of {type(config).__name__}, got {', '.join(unknown)}.")


def _load_yaml(text: str, place: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{place}{line}: not YAML, {error.problem}.") from error


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))
