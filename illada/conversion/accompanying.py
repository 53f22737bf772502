"""The files beside the weights: tokenizer, chat template, generation settings, card and license."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from transformers import AutoTokenizer

from ..configuration_illada import ILLaDAConfig
from ..text.whole_models import read_json
from .reading import CARRIED_FILES
from .writing import write_json


def carry_over(source: Path, folder: Path, patterns: Iterable[str] = CARRIED_FILES) -> None:
    """Copies the files that travel with the weights, byte for byte. Links, as in the Hub's cache, are followed.

    Raises:
        ValueError: if one of them should be JSON, and is not.
    """
    for path in (path for pattern in patterns for path in source.glob(pattern)):
        if path.is_file() and path.suffix != ".py":
            if path.suffix == ".json":
                read_json(path)
            copy = folder / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def declare_mask_token(folder: Path, config: ILLaDAConfig) -> None:
    """Tells the tokenizer in `folder`, if there is one, which of its tokens is [MASK].

    Raises:
        ValueError: if the tokenizer has no token of that id, or declares another.
    """
    if config.mask_token_id is None or not (folder / "tokenizer_config.json").exists():
        return
    tokenizer = AutoTokenizer.from_pretrained(folder, config=config)  # `config.json` may not be there yet
    if tokenizer.mask_token_id == config.mask_token_id:
        return
    if tokenizer.mask_token_id is not None:
        raise ValueError(
            f"`mask_token_id` is {config.mask_token_id} in the configuration and {tokenizer.mask_token_id} in the "
            "tokenizer; they must be the same."
        )
    mask_token = tokenizer.convert_ids_to_tokens(config.mask_token_id)
    if mask_token is None:
        raise ValueError(f"`mask_token_id` is {config.mask_token_id}, and the tokenizer has no token of that id.")
    # The file alone is edited: saving the tokenizer anew would write a form that older versions cannot read.
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            write_json(folder / name, read_json(folder / name) | {"mask_token": mask_token})


_DECISION_TEMPLATE = """\
{%- macro text(value) %}{{ "" if value is none else value if value is string else value|tojson }}{% endmacro -%}
{%- set said = namespace(lines=[text(state), "", text(question.instructions)]) -%}
{%- for option in question.options -%}
    {%- set more = text(question.descriptions[loop.index0]) -%}
    {%- if question.type == "choice" -%}
        {%- set more = option ~ " - " ~ more if more else option -%}
    {%- endif -%}
    {%- if more -%}
        {%- set said.lines = said.lines + [question.labels[loop.index0] ~ ": " ~ more] -%}
    {%- endif -%}
{%- endfor -%}
{%- set said.lines = said.lines + ["Answer with one of " ~ question.labels|join(", ") ~ " only."] -%}
{%- set messages = [{"role": "user", "content": said.lines|join("\n")}] -%}
{%- set add_generation_prompt = true -%}
"""


def write_decision_template(folder: Path, config: ILLaDAConfig) -> None:
    """Tells Transformers (from 5.24) how to ask this model for decisions, if it has a chat template.

    Its decision pipeline, and `/v1/systemone` of `transformers serve`, read the logits of the last token of a prompt.
    In a causal model these are about the next token, in a masked diffusion model about that token itself. So the
    prompt ends with a [MASK] where the answer begins.
    """
    if not (folder / "tokenizer_config.json").exists():
        return
    tokenizer = AutoTokenizer.from_pretrained(folder, config=config)
    if isinstance(tokenizer.chat_template, str) and tokenizer.mask_token is not None:
        ending = f"{{{{- {json.dumps(tokenizer.mask_token + '<|mark|>')} -}}}}"
        chat_template = tokenizer.chat_template.removesuffix("\n")
        (folder / "decision_template.jinja").write_text(_DECISION_TEMPLATE + chat_template + ending, "utf-8")


def write_generation_config(folder: Path, config: ILLaDAConfig, canvas: str) -> None:
    """Completes the generation settings in `folder`, or makes them; what they already say stays as it is.

    Filled in are the special ids, the canvas, and that decoding is greedy, for a text-generation pipeline would else
    sample.
    """
    path = folder / "generation_config.json"
    settings = read_json(path) if path.exists() else {}
    settings.pop("_from_model_config", None)  # whoever reads this would look at the model's configuration instead
    ids = ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id")
    defaults = {name: getattr(config, name) for name in ids} | {"canvas": canvas, "do_sample": False}
    stated = {name: value for name, value in settings.items() if value is not None}
    write_json(path, {name: value for name, value in (defaults | stated).items() if value is not None})
