"""Packed segments: the loss and the gradients of each alone, whatever attention computes them."""

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash_utils

from illada import ILLaDAForCausalLM
from illada.training.segments import isolate_segments

LENGTHS = ([3, 6, 4], [13], [8, 1, 4])  # of the segments of each row


def packed_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (len(LENGTHS), 13)
    labels = torch.randint(6, 64, shape, generator=generator)
    masked = torch.rand(shape, generator=generator) < 0.5
    return {
        "input_ids": labels.masked_fill(masked, 5),
        "labels": labels.masked_fill(torch.rand(shape, generator=generator) < 0.1, -100),
        "loss_weights": masked / torch.rand(3, 1, generator=generator),
        "position_ids": torch.tensor([[i for n in row for i in range(n)] for row in LENGTHS]),
    }


def loss_of_segments_alone(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Each segment in a forward of its own; the sum over all, divided by B * S."""
    total = 0
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            part = {name: batch[name][row : row + 1, start : start + length] for name in ("input_ids", "labels")}
            weights = batch["loss_weights"][row : row + 1, start : start + length]
            total = total + model(**part, loss_weights=weights, num_items_in_batch=1).loss
            start += length
    return total / batch["labels"].numel()


def plain_varlen_attention(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale, **_
):
    """What a flash-varlen kernel computes: tensors are (tokens, heads, head size)."""
    assert not causal and max_seqlen_q == cu_seqlens_q.diff().max() and torch.equal(cu_seqlens_q, cu_seqlens_k)
    groups = q.shape[1] // k.shape[1]
    outputs = []
    for start, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist()):
        key, value = (x[start:end].repeat_interleave(groups, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[start:end], key) * softmax_scale
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value))
    return torch.cat(outputs)


@pytest.fixture(params=["sdpa", "eager", "flash_attention_2"])
def attention(request, monkeypatch) -> str:
    """The kernel of flash attention needs a GPU: Transformers' own code around it runs on a plain stand-in."""
    if request.param == "flash_attention_2":
        supported = dict.fromkeys(
            [
                "dropout_p",
                "window_size",
                "deterministic",
                "softcap",
                "max_seqlen_q",
                "max_seqlen_k",
                "cache_seqlens",
                "s_aux",
            ],
            True,
        )

        def process(**keywords):
            return flash_utils._process_flash_attention_kwargs(supports_mapping=supported, **keywords)

        has_two = hasattr(flash_utils, "_process_with_kvcache_kwargs_fn")  # since 5.24
        functions = (None, plain_varlen_attention, None, None, None), (process, None) if has_two else process
        monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", lambda *_, **__: functions)
    return request.param


def test_packed_equals_unpacked_in_loss_and_gradients(tiny_config, attention):
    torch.manual_seed(0)
    model = ILLaDAForCausalLM(tiny_config)
    batch = packed_batch()
    expected = loss_of_segments_alone(model, batch)
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))
    model.config._attn_implementation = attention
    packed = isolate_segments(batch, attention)
    loss = model(**packed).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for gradient, reference in zip(torch.autograd.grad(loss, list(model.parameters())), expected_gradients):
        torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-5)
    # and without the isolation the result is another one
    model.config._attn_implementation = "sdpa"
    assert abs(model(**batch).loss - expected) > 1e-3


def test_no_gradient_reaches_another_segment(tiny_config, attention):
    torch.manual_seed(0)
    model = ILLaDAForCausalLM(tiny_config)
    model.config._attn_implementation = attention
    batch = packed_batch()
    segments = torch.tensor(
        [[10 * row + i for i, n in enumerate(lengths) for _ in range(n)] for row, lengths in enumerate(LENGTHS)]
    )
    for segment in segments.unique():
        embeddings = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        inputs = isolate_segments({"position_ids": batch["position_ids"], "segments": segments}, attention)
        flat_segments = inputs.pop("segments")
        states = model.model(inputs_embeds=embeddings.reshape(*flat_segments.shape, -1), **inputs).last_hidden_state
        states[flat_segments == segment].square().sum().backward()
        reached = embeddings.grad.abs().sum(-1) > 0
        assert torch.equal(reached, segments == segment)


def test_flex_attention_gives_the_same_loss(tiny_config):
    """Forward alone: PyTorch has no backward of flex attention on a CPU."""
    torch.manual_seed(0)
    tiny_config.hidden_size, tiny_config.head_dim = 64, 16  # its least head size
    model = ILLaDAForCausalLM(tiny_config).eval()
    batch = packed_batch()
    with torch.no_grad():
        expected = loss_of_segments_alone(model, batch)
        model.config._attn_implementation = "flex_attention"
        with torch.compiler.set_stance("force_eager"):  # the same operator, without minutes of compilation
            loss = model(**isolate_segments(batch, "flex_attention")).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_rows_of_one_segment_need_no_mask():
    batch = {"input_ids": torch.ones(2, 4), "position_ids": torch.arange(4).repeat(2, 1)}
    assert isolate_segments(batch, "sdpa") == batch
