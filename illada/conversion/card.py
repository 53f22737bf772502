"""The model card of an exported repository."""

import math
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from .reading import CheckpointTensors, read_json

TAGS = ["illada", "diffusion-language-model", "masked-diffusion"]

_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

A masked diffusion language model: attention sees both directions, and text is written by filling masks, the surest
first, instead of from left to right.
{% if base_model %}
It derives from [{{ base_model }}](https://huggingface.co/{{ base_model }})\
{{ " by a LoRA adapter, which is merged into the weights" if merged }}.
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
inputs = tokenizer("Once upon a time", return_tensors="pt")
output = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=64)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```

With the `illada` package, `import illada` takes the place of `trust_remote_code=True`. Defaults are in
`generation_config.json`; `canvas`, `block_length`, `max_denoising_steps` and `remasking` belong to masked diffusion.

## Training data, evaluation, limitations

Not stated by whoever exported this repository.
"""


def write_card(folder: Path, *, license: str, base_model: str | None, merged: bool) -> None:
    """Writes `README.md` for a standard checkpoint, or completes the metadata of the one there and keeps its text.

    Args:
        license (`str`): identifier of the Hub.
        base_model (`str`, *optional*): id on the Hub of the model that this one derives from.
        merged (`bool`): whether an adapter was merged into the weights.
    """
    path = folder / "README.md"
    card = ModelCard.load(path) if path.exists() else None
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
            title=base_model.split("/")[-1] if base_model else "A checkpoint of the iLLaDA family",
            base_model=base_model,
            merged=merged,
            config=read_json(folder / "config.json"),
            num_parameters=sum(math.prod(info.shape) for info in tensors.infos.values()),
            canvas=read_json(folder / "generation_config.json")["canvas"],
        )
    card.save(path)
