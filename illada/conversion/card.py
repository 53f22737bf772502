"""The model card of an exported repository."""

import difflib
import math
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

from ..text.whole_models import read_json
from .reading import CheckpointTensors

LICENSES_PAGE = "https://huggingface.co/docs/hub/repositories-licenses"
LICENSES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma unknown other
""".split()
TAGS = ["illada", "diffusion-language-model", "masked-diffusion"]

_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

A masked diffusion language model: attention sees both directions, and text is written by filling masks, the most
confident predictions first, instead of from left to right.
{% if base_model %}
It derives from [{{ base_model }}](https://huggingface.co/{{ base_model }})\
{{ " with a LoRA adapter, merged into the weights" if merged }}.
{% endif %}
| | |
| --- | --- |
| parameters | {{ "{:,}".format(num_parameters) }}, {{ config.dtype }} |
| layers / width / heads / KV heads | {{ config.num_hidden_layers }} / {{ config.hidden_size }} / \
{{ config.num_attention_heads }} / {{ config.num_key_value_heads }} |
| vocabulary / context | {{ config.vocab_size }} / {{ config.max_position_embeddings }} tokens |
| canvas | {{ canvas }} |

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

repo = "path or id of this repository"
model = AutoModelForCausalLM.from_pretrained(repo, dtype="auto", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(repo, trust_remote_code=True)
{% if is_chat %}
chat = [{"role": "user", "content": "What is 7 + 5?"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
{% else %}
inputs = tokenizer("The capital of France is", return_tensors="pt")
{% endif %}
output = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=64)
print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))
```

With the `illada` package installed, `import illada` replaces `trust_remote_code=True`. Defaults are in
`generation_config.json`; `canvas`, `block_length`, `max_denoising_steps` and `remasking` are settings of masked
diffusion.

## Training data, evaluation, limitations

Not stated by the author of this repository.
"""


def check_license(license: str | None) -> str | None:
    """`license`. Raises `ValueError` if it is no identifier of the Hub."""
    if license is None or license in LICENSES:
        return license
    close = difflib.get_close_matches(license.lower(), LICENSES, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(
        f"`license` must be an identifier of the Hub such as 'apache-2.0', 'mit' or 'other', got {license!r}.{hint} "
        f"All are listed at {LICENSES_PAGE}."
    )


def license_of(checkpoint: Path | None) -> str | None:
    """That of the checkpoint's model card, if it has one. Raises `ValueError` if the card's metadata is malformed."""
    card = None if checkpoint is None else checkpoint / "README.md"
    return _load_card(card).data.license if card and card.exists() else None


def _load_card(path: Path) -> ModelCard:
    try:
        return ModelCard.load(path, ignore_metadata_errors=False)
    except (ValueError, TypeError, YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is no model card: {reason}") from error


def write_card(folder: Path, *, title: str, license: str, base_model: str | None, merged: bool) -> None:
    """Writes `README.md` for a standard checkpoint, or completes the metadata of the one there and keeps its text.

    Args:
        title (`str`): heading of a new card.
        license (`str`): identifier of the Hub.
        base_model (`str`, *optional*): id on the Hub of the model that this one derives from.
        merged (`bool`): whether an adapter was merged into the weights.
    """
    path = folder / "README.md"
    card = _load_card(path) if path.exists() else None
    data = card.data if card else ModelCardData()
    data.license = license
    data.base_model = base_model or data.base_model
    data.library_name = "transformers"
    data.pipeline_tag = "text-generation"
    data.tags = list(dict.fromkeys([*(data.tags or []), *TAGS]))
    if card is None:
        tensors = CheckpointTensors(folder)
        card = ModelCard.from_template(
            data,
            template_str=_TEMPLATE,
            title=title,
            is_chat=_has_chat_template(folder),
            base_model=base_model,
            merged=merged,
            config=read_json(folder / "config.json"),
            num_parameters=sum(math.prod(info.shape) for info in tensors.infos.values()),
            canvas=read_json(folder / "generation_config.json")["canvas"],
        )
    card.save(path)


def _has_chat_template(folder: Path) -> bool:
    settings = folder / "tokenizer_config.json"
    in_settings = settings.exists() and read_json(settings).get("chat_template")
    return bool(in_settings) or (folder / "chat_template.jinja").exists()
