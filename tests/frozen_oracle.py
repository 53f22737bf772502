"""Decoding under a block-causal mask, written a second time: one row, plain loops, a dense mask, no cache.

A text is cut into segments: the pieces of the prompt, then the blocks of the response. A position sees its own segment
and those before it. Greedy, low-confidence remasking, a quota and a threshold, classifier-free guidance.
"""

import math

import torch


def block_causal_mask(segments: list[int]) -> torch.Tensor:
    """(1, 1, S, S) for segments of these lengths: True where a position (row) sees another (column)."""
    number = [index for index, length in enumerate(segments) for _ in range(length)]
    return torch.tensor([[[[seen <= own for seen in number] for own in number]]])


@torch.no_grad()
def oracle_generate(
    model,
    prompt: list[int],
    segments: list[int],
    *,
    max_new_tokens: int,
    block_length: int,
    steps: int,
    mask_id: int,
    eos_id: int,
    threshold: float = 2.0,
    guidance_scale: float | None = None,
) -> tuple[list[int], int]:
    """The text up to the first EOS of its response, and its passes; `segments` are the lengths of the prompt's."""
    row, passes, segments = list(prompt), 0, list(segments)

    def logits_of(ids: list[int]) -> torch.Tensor:
        return model(torch.tensor([ids]), attention_mask=block_causal_mask(segments)).logits[0]

    def predict() -> dict[int, tuple[int, float]]:
        logits = logits_of(row)
        if guidance_scale is not None:
            hidden = [mask_id if i < len(prompt) and prompt[i] != mask_id else token for i, token in enumerate(row)]
            without = logits_of(hidden)
            logits = without + guidance_scale * (logits - without)
        logits[:, mask_id] = -math.inf
        predictions = {}
        for i, token in enumerate(row):
            if token == mask_id:
                probabilities = logits[i].softmax(0).tolist()
                best = max(range(len(probabilities)), key=probabilities.__getitem__)
                predictions[i] = best, probabilities[best]
        return predictions

    def end() -> int | None:
        for i in range(len(prompt), len(row)):
            if row[i] == mask_id:
                return None
            if row[i] == eos_id:
                return i + 1
        return None

    blanks = [i for i, token in enumerate(prompt) if token == mask_id]
    blocks = [blanks[i : i + block_length] for i in range(0, len(blanks), block_length)]
    for start in range(0, max_new_tokens, block_length):
        first = len(prompt) + start
        blocks.append(list(range(first, first + min(block_length, max_new_tokens - start))))
    for block in blocks:
        if block[0] >= len(prompt):
            row += [mask_id] * len(block)
            segments.append(len(block))
        for step in range(len(block)):
            masked = [i for i in block if row[i] == mask_id]
            if not masked:
                break
            predictions = predict()
            passes += 1
            quota = len(block) // steps + (step < len(block) % steps)
            order = sorted(masked, key=lambda i: -predictions[i][1])
            for place, i in enumerate(order):
                if place < max(quota, 1) or predictions[i][1] >= threshold:
                    row[i] = predictions[i][0]
            if block[0] >= len(prompt) and end() is not None:
                return row[: end()], passes
    return row, passes
