"""The published samplers, written a second time: one row, plain loops, nothing shared with the package.

Fixed canvas: LLaDA's `generate` (arXiv 2502.09992). Growing canvas: iLLaDA's variable-length generation
(arXiv 2606.25331). Greedy, with low-confidence remasking and classifier-free guidance.
"""

import math

import torch


def oracle_generate(
    model,
    prompt: list[int],
    *,
    canvas: str,
    max_new_tokens: int,
    block_length: int,
    steps: int,
    mask_id: int,
    eos_ids: list[int],
    guidance_scale: float | None = None,
) -> tuple[list[int], int]:
    """Returns the row up to its first EOS (which counts from the response on), and the forward passes it took."""
    row = list(prompt)
    forwards = 0

    def logits_of(ids: list[int]) -> list[list[float]]:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].tolist()

    def predict() -> dict[int, tuple[int, float]]:
        """{masked position: (token, confidence)}"""
        logits = logits_of(row)
        if guidance_scale is not None:
            # The unconditional pass does not see what the caller gave.
            unseen = [mask_id if i < len(prompt) else token for i, token in enumerate(row)]
            for i in range(len(prompt)):
                if prompt[i] == mask_id:
                    unseen[i] = row[i]
            unconditional = logits_of(unseen)
            w = guidance_scale - 1
            for i in range(len(row)):
                for v in range(len(logits[i])):
                    logits[i][v] = unconditional[i][v] + (w + 1) * (logits[i][v] - unconditional[i][v])
        predictions = {}
        for i in range(len(row)):
            if row[i] != mask_id:
                continue
            best = None
            for v in range(len(logits[i])):
                if v != mask_id and (best is None or logits[i][v] > logits[i][best]):
                    best = v
            total = 0.0
            for v in range(len(logits[i])):
                if v != mask_id:
                    total += math.exp(logits[i][v] - logits[i][best])
            predictions[i] = (best, 1 / total)
        return predictions

    def end_of_row() -> int | None:
        """The position after the first EOS of the response, if everything before that EOS is decided."""
        for i in range(len(prompt), len(row)):
            if row[i] in eos_ids:
                return None if mask_id in row[:i] else i + 1
        return None

    def decode(positions: list[int]) -> bool:
        """Decodes these masks; True if the row is finished."""
        nonlocal forwards
        n = len(positions)
        for step in range(steps):
            k = n // steps
            if step < n % steps:
                k += 1
            remaining = [i for i in positions if row[i] == mask_id]
            if not remaining:
                break
            predictions = predict()
            forwards += 1
            for _ in range(k):
                surest = None
                for i in remaining:
                    if surest is None or predictions[i][1] > predictions[surest][1]:
                        surest = i
                row[surest] = predictions[surest][0]
                remaining.remove(surest)
            if end_of_row() is not None:
                return True
        return False

    blanks = [i for i in range(len(prompt)) if prompt[i] == mask_id]
    if canvas == "fixed":
        row += [mask_id] * max_new_tokens
    for first in range(0, len(blanks), block_length):
        decode(blanks[first : first + block_length])
    for start in range(0, max_new_tokens, block_length):
        length = min(block_length, max_new_tokens - start)
        if canvas == "growing":
            row += [mask_id] * length
        if decode(list(range(len(prompt) + start, len(prompt) + start + length))):
            return row[: end_of_row()], forwards
    return row, forwards
