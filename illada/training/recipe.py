"""The recipe: a YAML file of settings in, a trained model out, by the standard Trainer."""

import difflib
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import datasets
import yaml
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from ..configuration_illada import ILLaDAConfig
from ..generation import MaskedDiffusionGenerationMixin
from ..modeling_illada import ILLaDAForCausalLM
from ..text.loading import TOKENIZER_FILES, locate
from ..tiny.corpus import DIFFICULTIES, FAMILIES, held_out_examples
from ..tiny.tokenizer import train_tokenizer
from .data import CorpusWindows, MaskedDiffusionCollator, build_dataset, encode, encode_records, one_per_row, pack
from .trainer import EVALUATION_SEED, MaskedDiffusionTrainer, Objective

RECIPES = Path(__file__).parent / "recipes"
CORPUS = "corpus"
"""The word that names the package's own synthetic corpus, as data and as tokenizer."""

EVALUATION_EXAMPLES = 100
"""Validation examples of each family in the corpus's evaluation."""

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
    """

    model: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    dtype: str = "float32"
    attn_implementation: str | None = None
    lora: dict[str, Any] | None = None
    generation: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if (self.model is None) == (self.config is None):
            raise ValueError("Exactly one of `model` (a checkpoint) and `config` (from scratch) must be set.")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("`tokenizer` must be set for a model from scratch.")


@dataclass
class DataArguments:
    """What it is trained on, and in which format.

    Args:
        train_data: JSONL file of `messages` or `text`, a data set's folder or Hub id, or `corpus`.
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
        if not isinstance(self.length, int) or self.length < 2:
            raise ValueError(f"`length` must be an integer of at least 2, got {self.length!r}.")
        if self.corpus_difficulty not in DIFFICULTIES:
            raise ValueError(
                f"`corpus_difficulty` must be one of {', '.join(DIFFICULTIES)}, got {self.corpus_difficulty!r}."
            )
        if not isinstance(self.corpus_opening, dict):
            raise ValueError(f"`corpus_opening` must map families to numbers, got {self.corpus_opening!r}.")
        for family, count in self.corpus_opening.items():
            if family not in FAMILIES or not isinstance(count, int) or count < 0:
                raise ValueError(
                    f"`corpus_opening` must give a number of examples to some of {', '.join(FAMILIES)}, "
                    f"got {family!r}: {count!r}."
                )

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
    kinds = (ModelArguments, DataArguments, TrainingArguments)
    names = [item.name for kind in kinds for item in fields(kind) if item.init]
    for name in settings:
        if name not in names:
            nearest = difflib.get_close_matches(str(name), names, n=1)
            hint = f": did you mean `{nearest[0]}`?" if nearest else "."
            raise ValueError(f"{path}: `{name}` is not a setting{hint}")
    try:
        return HfArgumentParser(kinds).parse_dict(settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _load_yaml(text: str, place: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{place}{line}: not YAML, {error.problem}.") from error


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_tokenizer(arguments: ModelArguments) -> PreTrainedTokenizerBase:
    name = arguments.tokenizer or arguments.model
    if name == CORPUS:
        return train_tokenizer()
    return AutoTokenizer.from_pretrained(
        locate(name, "tokenizer" if arguments.tokenizer else "model", files=TOKENIZER_FILES)
    )


def load_model(arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model to train: from a checkpoint or from scratch, with LoRA adapters if asked for."""
    if arguments.config is not None:
        if tokenizer.mask_token_id is None and "mask_token_id" not in arguments.config:
            raise ValueError("`config` must set `mask_token_id`: the tokenizer has no mask token.")
        special = ("bos_token_id", "pad_token_id", "eos_token_id", "mask_token_id")
        of_tokenizer = {name: getattr(tokenizer, name) for name in special if getattr(tokenizer, name) is not None}
        config = ILLaDAConfig(**{"vocab_size": len(tokenizer), **of_tokenizer, **arguments.config})
        model = ILLaDAForCausalLM._from_config(
            config, dtype=arguments.dtype, attn_implementation=arguments.attn_implementation
        )
    else:
        model = AutoModelForCausalLM.from_pretrained(
            locate(arguments.model), dtype=arguments.dtype, attn_implementation=arguments.attn_implementation
        )
        if not isinstance(model, MaskedDiffusionGenerationMixin):
            raise ValueError(f"`model` must be a masked diffusion model, got {arguments.model!r}.")
    if unknown := model.generation_config.update(**arguments.generation):
        raise ValueError(f"`generation` must hold fields of the generation config, got {', '.join(unknown)}.")
    if arguments.lora is None:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(**arguments.lora))


def load_data(
    source: str, arguments: DataArguments, tokenizer: PreTrainedTokenizerBase, config: ILLaDAConfig
) -> datasets.Dataset | datasets.IterableDataset:
    """The rows of `source` in the format of `arguments`, checked while they are made.

    Raises:
        ValueError: if `length` is beyond the model's positions, or a record cannot be learnt (see [`encode_records`]).
    """
    path = Path(source)
    return build_dataset(
        _rows,
        streaming=arguments.streaming,
        tokenizer=tokenizer,
        source=source,
        format=arguments.format,
        length=arguments.length,
        vocab_size=config.vocab_size,
        mask_token_id=config.mask_token_id,
        modified=path.stat().st_mtime_ns if path.is_file() else 0,  # names the cache: a changed file is read anew
    )


def _rows(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    format: str,
    length: int,
    vocab_size: int,
    mask_token_id: int,
    modified: int,
) -> Iterator[dict[str, list]]:
    max_length = None if format == "pretraining" else length  # a document may be cut, an answer may not
    encoded = encode_records(tokenizer, source, vocab_size, mask_token_id, max_length)
    if format == "llada_sft":
        return one_per_row(encoded)
    return pack(encoded, length, isolated=format == "pretraining")


def _corpus(arguments: DataArguments, tokenizer: PreTrainedTokenizerBase, seed: int, held_out: bool) -> Dataset:
    if not held_out:
        difficulty, opening = arguments.corpus_difficulty, arguments.corpus_opening
        return CorpusWindows(tokenizer, arguments.length, seed, difficulty, opening)
    examples = [
        example
        for family in FAMILIES
        for example in held_out_examples(
            family, EVALUATION_EXAMPLES, split="validation", difficulty=arguments.corpus_difficulty
        )
    ]
    random.Random(EVALUATION_SEED).shuffle(examples)
    return datasets.Dataset.from_list(list(pack(encode(tokenizer, examples), arguments.length, isolated=False)))


def build_trainer(
    model_arguments: ModelArguments, data_arguments: DataArguments, training_arguments: TrainingArguments
) -> MaskedDiffusionTrainer:
    """Loads everything that the settings name, and makes the Trainer of it.

    Raises:
        ValueError: if the settings, the data and the model do not fit together, before any training.
    """
    set_seed(training_arguments.seed)
    tokenizer = load_tokenizer(model_arguments)
    model = load_model(model_arguments, tokenizer)
    if data_arguments.length > model.config.max_position_embeddings:
        raise ValueError(
            f"`length` must be at most the model's {model.config.max_position_embeddings} positions, "
            f"got {data_arguments.length}."
        )

    def load(source: str | None, held_out: bool):
        if source is None:
            return None
        if source == CORPUS:
            return _corpus(data_arguments, tokenizer, training_arguments.seed, held_out)
        data = load_data(source, data_arguments, tokenizer, model.config)
        # An endless stream is one epoch, so that the Trainer finds the place of an interruption again.
        return data.repeat(None) if data_arguments.streaming and not held_out else data

    with training_arguments.main_process_first(desc="reading the data"):
        train_data, eval_data = load(data_arguments.train_data, False), load(data_arguments.eval_data, True)
    is_llada_sft = data_arguments.format == "llada_sft"
    collator = MaskedDiffusionCollator(
        pad_token_id=tokenizer.eos_token_id if is_llada_sft else model.config.pad_token_id or 0,
        learn_padding=is_llada_sft,
    )
    return MaskedDiffusionTrainer(
        model=model,
        args=training_arguments,
        train_dataset=train_data,
        eval_dataset=eval_data,
        data_collator=collator,
        processing_class=tokenizer,
        objective=data_arguments.objective,
        sample_prompts=data_arguments.sample_prompts,
    )


def train_recipe(recipe: str, overrides: Sequence[str] = ()) -> MaskedDiffusionTrainer:
    """Trains by a recipe, and saves the model, its tokenizer and the log of its losses to `output_dir`.

    Checkpoints on the way are `output_dir/checkpoint-*`; `resume_from_checkpoint: true` goes on from the last one.

    Args:
        recipe: path of a YAML file, or the name of a recipe in the package.
        overrides: `name=value` each, which win over the file.

    Returns:
        The Trainer, after training.
    """
    trainer = build_trainer(*read_settings(recipe, overrides))
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        log = json.dumps(trainer.state.log_history)
        (Path(trainer.args.output_dir) / "training_log.json").write_text(log)
    return trainer
