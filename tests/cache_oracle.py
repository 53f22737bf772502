"""Decoding with a block cache, written a second time: one row, plain loops, its own forward pass.

The keys and values of each layer are lists with one entry per column. A step computes some columns and replaces their
entries; what it does not compute stays as it was. Greedy, low-confidence remasking, one token per step or a threshold.
"""

import math

import torch


def _normalize(x: torch.Tensor, norm) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight


def _rotate(x: torch.Tensor, position: int, theta: float) -> torch.Tensor:
    """RoPE of one vector per head (heads, size), as a rotation of complex numbers."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float32) / half)
    angle = (position * frequencies).double()
    rotated = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([rotated.real, rotated.imag], dim=-1)


def forward(
    model, row: list[int], columns: list[int], cache: list[dict], shadows: list[int] = (), mask_id: int = 5
) -> dict[int, torch.Tensor]:
    """Logits of these columns of `row`; `cache` holds {column: (key, value)} for each layer, and is updated.

    Logits of the `shadows` are those of a [MASK] that sees itself and every column but its own, and that none sees;
    their keys in the result are ("shadow", column).
    """
    tokens = {column: row[column] for column in columns} | {("shadow", column): mask_id for column in shadows}
    config = model.config
    heads, size = config.num_attention_heads, config.head_dim
    groups = heads // config.num_key_value_heads
    theta = config.rope_parameters["rope_theta"]
    hidden = {name: model.model.embed_tokens.weight[token] for name, token in tokens.items()}
    for layer, entries in zip(model.model.layers, cache):
        attention = layer.self_attn
        queries, own = {}, {}
        for name in tokens:
            column = name[1] if isinstance(name, tuple) else name
            x = _normalize(hidden[name], layer.input_layernorm)
            queries[name] = _rotate((attention.q_proj.weight @ x).view(heads, size), column, theta)
            key = _rotate((attention.k_proj.weight @ x).view(-1, size), column, theta)
            (own if isinstance(name, tuple) else entries)[name] = key, (attention.v_proj.weight @ x).view(-1, size)
        for name in tokens:
            seen = list(entries.values())
            if isinstance(name, tuple):
                seen = [entry for column, entry in entries.items() if column != name[1]] + [own[name]]
            mixed = []
            for head in range(heads):
                scores = torch.stack([queries[name][head] @ key[head // groups] for key, _ in seen])
                weights = (scores / math.sqrt(size)).softmax(0)
                mixed.append(sum(w * value[head // groups] for w, (_, value) in zip(weights, seen)))
            hidden[name] = hidden[name] + attention.o_proj.weight @ torch.cat(mixed)
            x = _normalize(hidden[name], layer.post_attention_layernorm)
            gate = layer.mlp.gate_proj.weight @ x
            gated = gate * gate.sigmoid() * (layer.mlp.up_proj.weight @ x)
            hidden[name] = hidden[name] + layer.mlp.down_proj.weight @ gated
    return {name: model.lm_head.weight @ _normalize(hidden[name], model.model.norm) for name in tokens}


@torch.no_grad()
def oracle_generate(
    model,
    prompt: list[int],
    *,
    block_cache: str,
    canvas: str,
    max_new_tokens: int,
    block_length: int,
    mask_id: int,
    cache_refresh_interval: int | None = None,
    cache_refresh_entropy: float = math.inf,
    confidence_threshold: float = 2.0,
) -> list[int]:
    """The row after all blocks; nothing ends early."""
    row, prompt_length = list(prompt), len(prompt)
    blanks = [i for i in range(prompt_length) if prompt[i] == mask_id]
    blocks = [blanks[i : i + block_length] for i in range(0, len(blanks), block_length)]
    end = prompt_length + max_new_tokens
    blocks += [list(range(i, min(i + block_length, end))) for i in range(prompt_length, end, block_length)]
    if canvas == "fixed":
        row += [mask_id] * max_new_tokens
    for block in blocks:
        row += [mask_id] * max(0, block[-1] + 1 - len(row))
        step, is_stale = 0, False
        while any(row[i] == mask_id for i in block):
            if is_stale or step % (cache_refresh_interval or len(block) + 1) == 0:
                cache, columns = [{} for _ in model.model.layers], list(range(len(row)))
            elif block_cache == "dual":
                columns = block
            else:
                columns = list(range(block[0], len(row)))
            logits = forward(model, row, columns, cache)
            sure, is_stale = {}, False
            for i in block:
                if row[i] == mask_id:
                    logits[i][mask_id] = -math.inf
                    probability, token = logits[i].softmax(0).max(0)
                    sure[i] = probability.item(), token.item()
            best = max(sure, key=lambda i: sure[i][0])
            for i, (probability, token) in sure.items():
                if i == best or probability >= confidence_threshold:
                    row[i] = token
                    p = logits[i].softmax(0).tolist()
                    is_stale |= -sum(x * math.log(x) for x in p if x > 0) > cache_refresh_entropy
            step += 1
    return row
