"""The recipe: settings in, a trained model out, by the standard Trainer."""

import inspect
import json
import random
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from ..configuration_illada import ILLaDAConfig
from ..modeling_illada import ILLaDAForCausalLM
from ..text.loading import TOKENIZER_FILES, locate
from ..text.whole_models import load_whole_model
from ..tiny.corpus import FAMILIES, held_out_examples
from ..tiny.tokenizer import train_tokenizer
from . import data, records
from .data import CorpusWindows, MaskedDiffusionCollator, build_dataset, encode, encode_records, one_per_row, pack
from .settings import CORPUS, DataArguments, ModelArguments, check_settings, read_settings
from .trainer import EVALUATION_SEED, MaskedDiffusionTrainer

EVALUATION_EXAMPLES = 100
"""Validation examples of each family in the corpus's evaluation."""

MODEL_FILES = ("config.json", "adapter_config.json", "checkpoint-*")
"""What an `output_dir` holds that was used before."""


def load_tokenizer(arguments: ModelArguments) -> PreTrainedTokenizerBase:
    name = arguments.tokenizer or arguments.model
    if name == CORPUS:
        return train_tokenizer()
    return AutoTokenizer.from_pretrained(
        locate(name, "tokenizer" if arguments.tokenizer else "model", files=TOKENIZER_FILES)
    )


def load_config(arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> ILLaDAConfig:
    """The configuration of the model to train, before any of its weights are loaded."""
    if arguments.config is None:
        config = AutoConfig.from_pretrained(locate(arguments.model, files=("config.json",)))
        if not isinstance(config, ILLaDAConfig):
            raise ValueError(
                f"`model` must be a masked diffusion model, got {arguments.model!r}: {config.model_type}."
            )
        return config
    if tokenizer.mask_token_id is None and "mask_token_id" not in arguments.config:
        raise ValueError("`config` must set `mask_token_id`: the tokenizer has no mask token.")
    special = ("bos_token_id", "pad_token_id", "eos_token_id", "mask_token_id")
    of_tokenizer = {name: getattr(tokenizer, name) for name in special if getattr(tokenizer, name) is not None}
    return ILLaDAConfig(**{"vocab_size": len(tokenizer), **of_tokenizer, **arguments.config})


def load_model(arguments: ModelArguments, config: ILLaDAConfig) -> PreTrainedModel:
    """The model to train: from a checkpoint or from scratch, with LoRA adapters if asked for."""
    settings = {"dtype": arguments.dtype, "attn_implementation": arguments.attn_implementation}
    if arguments.config is not None:
        model = ILLaDAForCausalLM._from_config(config, **settings)
    else:
        model = load_whole_model(locate(arguments.model), **settings)
        # What was loaded as `illada-tiny` or by a relative path is named so in what is saved, not by a folder of this
        # machine.
        model.name_or_path = model.config._name_or_path = arguments.model
    model.generation_config.update(**arguments.generation)
    if arguments.lora is None:
        return model
    from peft import get_peft_model

    with warnings.catch_warnings():  # peft asks by a name that Transformers deprecates
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, arguments.lora_config())


def load_data(
    source: str, arguments: DataArguments, tokenizer: PreTrainedTokenizerBase, config: ILLaDAConfig
) -> datasets.Dataset | datasets.IterableDataset:
    """The rows of `source` in the format of `arguments`, checked while they are made.

    Raises:
        ValueError: if `length` is beyond the model's positions, or a record cannot be learnt (see [`encode_records`]).
    """
    code = "".join(map(inspect.getsource, (data, records)))
    return build_dataset(
        _rows,
        streaming=arguments.streaming,
        tokenizer=tokenizer,
        source=source,
        format=arguments.format,
        length=arguments.length,
        vocab_size=config.vocab_size,
        mask_token_id=config.mask_token_id,
        version=records.data_version(source) + code,  # names the cache: what changed is read again
    )


def _rows(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    format: str,
    length: int,
    vocab_size: int,
    mask_token_id: int,
    version: str,
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
    check_settings(model_arguments, data_arguments, training_arguments)
    tokenizer = load_tokenizer(model_arguments)
    config = load_config(model_arguments, tokenizer)
    if data_arguments.length > config.max_position_embeddings:
        raise ValueError(
            f"`length` must be at most the model's {config.max_position_embeddings} positions, "
            f"got {data_arguments.length}."
        )

    def load(source: str | None, held_out: bool):
        if source is None:
            return None
        if source == CORPUS:
            return _corpus(data_arguments, tokenizer, training_arguments.seed, held_out)
        rows = load_data(source, data_arguments, tokenizer, config)
        # An endless stream is one epoch, so that the Trainer finds the place of an interruption again.
        return rows.repeat(None) if data_arguments.streaming and not held_out else rows

    with training_arguments.main_process_first(desc="reading the data"):
        train_data, eval_data = load(data_arguments.train_data, False), load(data_arguments.eval_data, True)
    set_seed(training_arguments.seed)
    model = load_model(model_arguments, config)
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

    Raises:
        ValueError: if the settings are wrong (see [`read_settings`] and [`build_trainer`]), or if there is a model in
            `output_dir` which the run neither goes on from nor may overwrite.
    """
    settings = read_settings(recipe, overrides)
    _check_output(settings[0].overwrite, settings[2])
    trainer = build_trainer(*settings)
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        log = json.dumps(trainer.state.log_history)
        (Path(trainer.args.output_dir) / "training_log.json").write_text(log)
    return trainer


def _check_output(overwrite: bool, arguments: TrainingArguments):
    output = Path(arguments.output_dir)
    used = any(path for pattern in MODEL_FILES for path in output.glob(pattern))
    if used and not overwrite and not arguments.resume_from_checkpoint:
        raise ValueError(
            f"There is a model in `output_dir` {str(output)!r}: `overwrite=true` replaces it, "
            "`resume_from_checkpoint=true` goes on from its last checkpoint."
        )
