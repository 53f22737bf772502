"""What is done to logits wherever they are read, in generation, revision and scoring: precision, guidance, [MASK]."""

import torch


def promote(logits: torch.Tensor) -> torch.Tensor:
    """Logits in fp32, or in their own precision if that is higher: a softmax in half precision is too coarse."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def guide(conditional: torch.Tensor, unconditional: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Classifier-free guidance, `unconditional + guidance_scale * (conditional - unconditional)`; 1 is no guidance.

    LLaDA's `cfg_scale` (arXiv 2502.09992, appendix A) is `guidance_scale - 1`.
    """
    return unconditional + guidance_scale * (conditional - unconditional)


def forbid_mask(logits: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """The logits `(M, V)`, changed in place so that [MASK] has probability 0: it is never a prediction."""
    logits[:, mask_token_id] = -torch.inf
    return logits


def log_probability(logits: torch.Tensor, tokens: torch.LongTensor) -> torch.Tensor:
    """`log softmax(logits)[token]`, in nats.

    Args:
        logits (`torch.FloatTensor` of shape `(M, V)`): at least fp32; -inf is a probability of 0.
        tokens (`torch.LongTensor` of shape `(M,)` or `(M, K)`): one token of each row, or K of them.

    Returns:
        `torch.FloatTensor` of the tokens' shape: NaN where the logits give no distribution, since one is NaN or +inf,
        or all are -inf. Nothing else gives NaN, so that callers can look for it when they read the result.
    """
    chosen = logits.gather(-1, tokens.unsqueeze(-1) if tokens.ndim == 1 else tokens)
    normalizer = logits.logsumexp(-1, keepdim=True)
    return (chosen - normalizer).masked_fill(~normalizer.isfinite(), torch.nan).view_as(tokens)


def non_finite_logits(place: str, dtype: torch.dtype) -> ValueError:
    """The error to raise where logits give no distribution; `place` says where, `dtype` is the model's."""
    cause = "float16 overflows above 65,504" if dtype == torch.float16 else "a weight may be damaged"
    remedy = "in bfloat16 or float32" if dtype == torch.float16 else "again and check it for NaN"
    return ValueError(f"The model's logits are NaN or infinite at {place}: {cause}; load the model {remedy}.")
