"""One process of a tensor-parallel run: `torchrun --nproc-per-node 2 tests/tensor_parallel.py CHECKPOINT OUTPUT`."""

import json
import sys

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import illada  # noqa: F401

SETTINGS = [{}, {"block_cache": "prefix"}, {"block_cache": "dual", "canvas": "fixed", "guidance_scale": 1.5}]
PROMPTS = {
    "input_ids": torch.tensor([[1, 1, 7, 8, 9], [10, 11, 12, 13, 14]]),
    "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
}


def generate(model) -> list[list[list[int]]]:
    arguments = {**PROMPTS, "max_new_tokens": 12, "block_length": 4, "eos_token_id": None, "pad_token_id": 1}
    return [model.generate(**arguments, **settings).tolist() for settings in SETTINGS]


if __name__ == "__main__":
    checkpoint, output = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float64, distributed_config=DistributedConfig(tp_plan="auto")
    )
    heads = model.model.layers[0].self_attn.q_proj.weight
    local = heads.to_local() if hasattr(heads, "to_local") else heads
    texts = generate(model)
    if torch.distributed.get_rank() == 0:
        with open(output, "w") as file:
            json.dump({"texts": texts, "local_rows": local.shape[0]}, file)
    torch.distributed.destroy_process_group()
