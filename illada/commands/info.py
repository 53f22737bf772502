"""`illada info`."""

import json

from rich.console import Console
from rich.table import Table

from .options import JsonFlag, ModelOption, ModelOptions


def info(model: ModelOption = None, as_json: JsonFlag = False):
    """Describe a checkpoint: architecture, parameters, special ids, generation defaults.

    Example: `illada info --model ./my-checkpoint --json`
    """
    loaded, tokenizer = ModelOptions(model, device="cpu").load()
    config = loaded.config
    parameters = sum(parameter.numel() for parameter in loaded.parameters())
    facts = {
        "architecture": type(loaded).__name__,
        "parameters": parameters,
        "parameters without embedding": parameters - loaded.get_input_embeddings().weight.numel(),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "layers": config.num_hidden_layers,
        "hidden size": config.hidden_size,
        "attention heads": f"{config.num_attention_heads} ({config.num_key_value_heads} key-value)",
        "feed-forward size": config.intermediate_size,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "tied embeddings": config.tie_word_embeddings,
        "special ids": {name: getattr(config, f"{name}_token_id") for name in ("bos", "pad", "eos", "mask")},
        "chat template": tokenizer.chat_template is not None,
        "generation": loaded.generation_config.to_diff_dict(),
    }
    if as_json:
        print(json.dumps(facts))
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {item}" for key, item in value.items())
        table.add_row(name, f"{value:,}" if type(value) is int else str(value))
    Console().print(table)
