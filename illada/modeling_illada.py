"""iLLaDA: a Llama whose attention sees both directions, trained and sampled as a masked diffusion model.

What is inherited from Transformers (attention, RoPE, RMSNorm, MLP, parallel plans, attention backends, gradient
checkpointing) is not written again. Here stand the bidirectional mask, the residual dropout and the initialisation of
the release, the selection of the positions whose logits are made, and the diffusion loss.
"""

import inspect
import math
from os import PathLike

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, MaskedLMOutput
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.olmo.modeling_olmo import OlmoAttention, OlmoRotaryEmbedding
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .adapter_loading import AdapterMixin
from .configuration_illada import ILLaDAConfig
from .generation import MaskedDiffusionGenerationMixin
from .generation_config import MaskedDiffusionGenerationConfig
from .inherited import RefusesOtherParts

logger = logging.get_logger(__name__)

_CACHE_NAME = (
    "cache" if "cache" in inspect.signature(create_bidirectional_mask).parameters else "past_key_values"
)  # what Transformers calls a cache in its masks, layers and outputs: the first since 5.24, the second before

_PASSED_ON = {  # arguments of `forward` that the attention backends and Transformers' decorators read
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "use_cache",
    "kernel_options",
    "debug_io",
    "debug_io_dir",
    "prune_layers",
}
_WITHOUT_MEANING = {"token_type_ids"}  # a tokenizer may return them; no embedding reads them
_OF_FLASH_ATTENTION = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
_KNOWN = {"is_causal", *_PASSED_ON, *_WITHOUT_MEANING, *_OF_FLASH_ATTENTION}


class ILLaDAAttention(OlmoAttention):
    """Llama's grouped-query attention in both directions, with residual dropout on its output.

    OLMo's is Llama's to the last bit, and rotates queries and keys in the precision of the position embeddings, which
    may be higher than their own.
    """

    def __init__(self, config: ILLaDAConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.is_causal = False
        self.o_proj.is_residual_projection = True

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        hidden_states, attention_weights = super().forward(hidden_states, **kwargs)
        hidden_states = F.dropout(hidden_states, self.config.resid_pdrop, self.training)
        return hidden_states, attention_weights


class ILLaDAMLP(LlamaMLP):
    """Llama's gated MLP, with residual dropout on its output."""

    def __init__(self, config: ILLaDAConfig):
        super().__init__(config)
        self.down_proj.is_residual_projection = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().forward(hidden_states), self.config.resid_pdrop, self.training)


class ILLaDADecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: ILLaDAConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = ILLaDAAttention(config, layer_idx)
        self.mlp = ILLaDAMLP(config)


def _file_and_name(of_class: type) -> str:
    return f"{of_class.__module__.rpartition('.')[2]}.{of_class.__name__}"


class ILLaDAPreTrainedModel(AdapterMixin, RefusesOtherParts, LlamaPreTrainedModel):
    """What the trunk and the model with a head share: their configuration and the initialisation of the release."""

    config: ILLaDAConfig
    config_class = ILLaDAConfig
    _no_split_modules = ["ILLaDADecoderLayer"]
    _can_record_outputs = {"hidden_states": ILLaDADecoderLayer, "attentions": ILLaDAAttention}
    _supports_context_parallel = False  # it drops the mask, and can express causal attention only

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Initialises as the release does: projections into the residual stream are divided by sqrt(2 * layers)."""
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=math.sqrt(1 / (2 * self.config.hidden_size)))
        elif getattr(module, "is_residual_projection", False):
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.weight, mean=0.0, std=std)


class ILLaDAModel(ILLaDAPreTrainedModel, LlamaModel):
    """The trunk: token ids in, hidden states out. Every position attends to every position that is not padding."""

    def __init__(self, config: ILLaDAConfig):
        # LlamaModel's own constructor would build, and initialise, causal layers first.
        super(LlamaModel, self).__init__(config)
        # No padding index: pad may be the id of EOS, whose embedding must be trained.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ILLaDADecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # The two differ in the precision of what they return: OLMo's keeps fp32.
        rotary_embedding_class = OlmoRotaryEmbedding if config.rope_full_precision else LlamaRotaryEmbedding
        self.rotary_emb = rotary_embedding_class(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Returns the last hidden state, (B, S, hidden_size). Arguments as in [`ILLaDAForCausalLM.forward`]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of `input_ids` and `inputs_embeds`.")
        if cache is not None and past_key_values is not None:
            raise ValueError("`cache` and `past_key_values` are two names of one argument: pass one of them.")
        cache = past_key_values if cache is None else cache
        self._check_passed_on(kwargs)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if position_ids is None:
            offset = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + offset).unsqueeze(0)

        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4:
            attention_mask = self._dense_mask(attention_mask, inputs_embeds.dtype)
        bidirectional_mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            **{_CACHE_NAME: cache},
        )
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids=position_ids)
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=bidirectional_mask,
                position_ids=position_ids,
                position_embeddings=position_embeddings,
                **{_CACHE_NAME: cache},
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{_CACHE_NAME: cache})

    def _check_passed_on(self, arguments: dict):
        """Refuses what nothing would read, a misspelt name above all, and what would make attention causal."""
        if arguments.get("is_causal"):
            raise ValueError("`is_causal` must be False or absent, got True: this model attends in both directions.")
        # Lists, since the compiler of older versions of torch does not know the difference of sets.
        unknown = [name for name in arguments if name not in _KNOWN]
        if unknown:
            raise ValueError(f"`forward` got unknown arguments {sorted(unknown)}.")
        attention = self.config._attn_implementation
        packed = [name for name in arguments if name in _OF_FLASH_ATTENTION]
        if attention in ("eager", "sdpa", "flex_attention") and packed:
            raise ValueError(
                f"{sorted(packed)} are read by flash attention, got them with {attention!r}: keep packed segments "
                "apart by a four-dimensional `attention_mask`."
            )

    def _dense_mask(self, attention_mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A four-dimensional mask as the attention in use reads it.

        Transformers hands such a mask on as it is, and all but SDPA would add the ones and zeros of a boolean one to
        the scores.
        """
        if self.config._attn_implementation == "flex_attention":
            raise ValueError("`attention_mask` must be (B, S) or a `BlockMask` with flex attention, got a dense one.")
        if attention_mask.is_floating_point():
            return attention_mask
        attention_mask = attention_mask.bool()
        if self.config._attn_implementation == "sdpa":
            return attention_mask
        additive = torch.zeros_like(attention_mask, dtype=dtype)
        return additive.masked_fill(~attention_mask, torch.finfo(dtype).min)


def masked_diffusion_loss(
    logits: torch.Tensor,
    targets: torch.LongTensor,
    weights: torch.Tensor | None,
    num_items: int | torch.Tensor,
) -> torch.Tensor:
    """The masked diffusion objective, in nats per position.

    `L = 1/N * sum_i w_i * -log p(x0_i | x_t)`, with `w_i = 1/t` at the masked positions, is a Monte-Carlo estimate of
    the bound on `-log p(x0)` (LLaDA, arXiv 2502.09992, equation 3; iLLaDA, arXiv 2606.25331). There is no shift: the
    logits of a position predict the token of that position.

    Args:
        logits (`torch.FloatTensor` of shape `(M, V)`): one row per position that counts.
        targets (`torch.LongTensor` of shape `(M,)`): the clean tokens.
        weights (`torch.FloatTensor` of shape `(M,)`, *optional*): `w_i`; 1 everywhere if absent.
        num_items (`int` or 0-d tensor): `N`.

    Returns:
        A 0-d tensor, in fp32 or the logits' own precision, whichever is higher.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits, targets, reduction="none")
    if weights is not None:
        losses = losses * weights
    return losses.sum() / num_items


def _states_to_keep(
    hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor | tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """The hidden states whose logits are made; `transformers` has this as a function only in later versions."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:]  # -0 is all of them
    device = hidden_states.device  # that of the last layer, which may not be that of the inputs
    if isinstance(logits_to_keep, tuple):
        return hidden_states[tuple(index.to(device) for index in logits_to_keep)]
    logits_to_keep = logits_to_keep.to(device)
    return hidden_states[logits_to_keep] if logits_to_keep.dtype == torch.bool else hidden_states[:, logits_to_keep]


class ILLaDAForCausalLM(ILLaDAPreTrainedModel, MaskedDiffusionGenerationMixin):
    """iLLaDA with its language-modelling head.

    "CausalLM" is the name that the release gave: attention is bidirectional, and `generate` is iterative denoising
    (see [`MaskedDiffusionGenerationMixin.generate`]).
    """

    generation_config_class = MaskedDiffusionGenerationConfig
    _has_seen_targets = False  # whether a batch of a training was checked, see `_warn_of_visible_targets`
    _auto_class = "AutoModelForCausalLM"  # `save_pretrained` copies the code beside the weights
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: ILLaDAConfig):
        super().__init__(config)
        self.model = ILLaDAModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForMaskedLM"  # labels are not shifted: the Trainer counts the first of a row as well
        self.post_init()

    def save_pretrained(self, save_directory: str | PathLike, *args, **kwargs):
        """Also writes the code, which `trust_remote_code=True` loads where this package is not installed."""
        # The last is what `transformers serve` tries first, from Transformers 5.24 on.
        auto_classes = ("AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForDecision")
        self.config.auto_map = {
            "AutoConfig": _file_and_name(type(self.config)),
            **dict.fromkeys(auto_classes, _file_and_name(type(self))),
        }
        super().save_pretrained(save_directory, *args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        loss_weights: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor | tuple[torch.Tensor, torch.Tensor] = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        """Predicts the token of every position from all the others.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, S)`): tokens, masked where they equal `config.mask_token_id`.
            attention_mask (`torch.Tensor` of shape `(B, S)` or `(B, 1, S, S)`, *optional*):
                1 for tokens and 0 for padding; or four-dimensional, boolean (or 0 and 1) with True where attention is
                allowed or additive in the model's dtype, for instance to keep packed segments apart.
            position_ids (`torch.LongTensor` of shape `(B, S)`, *optional*): `arange(S)` if absent.
            past_key_values (`Cache`, *optional*):
                Keys and values that the attention reads in addition to its own; `cache` is another name for it.
            inputs_embeds (`torch.FloatTensor` of shape `(B, S, hidden_size)`, *optional*): in place of `input_ids`.
            labels (`torch.LongTensor` of shape `(B, S)`, *optional*):
                Clean tokens, unshifted; -100 is ignored.
            loss_weights (`torch.FloatTensor` of shape `(B, S)`, *optional*):
                Weight of each position's cross-entropy: 1/t where the input is masked and 0 elsewhere for the
                published objective. 1 everywhere if absent. A position of weight 0 costs nothing.
            logits_to_keep (`int`, `torch.Tensor` or pair of tensors, defaults to 0):
                Positions whose logits are made: 0 for all, `n` for the last `n`, a 1-D tensor of indices, a boolean
                `(B, S)` mask, or rows and columns `(M,)` each. Not used when `labels` are given.
            num_items_in_batch (`int` or 0-d `torch.Tensor`, *optional*):
                Divisor `N` of the loss. If absent `B * S`, the published normalisation; the Trainer passes the number
                of labelled positions in all micro-batches of all processes, so that accumulation is exact.

        Returns:
            `MaskedLMOutput`: `logits` of shape `(B, S, V)`; `(B, n, V)` for an integer or index `logits_to_keep`;
            `(M, V)` for a boolean one, a row per selected position in row-major order, and for a pair. With `labels`,
            `loss` is that of [`masked_diffusion_loss`]; with `loss_weights`, too, `logits` are `(M, V)`: the positions
            with a label and a weight, and no others are made.
        """
        if kwargs.get("use_cache"):
            raise ValueError(
                "`use_cache` must be False or absent, got True: pass a cache as `past_key_values`, or `block_cache` "
                "to `generate`."
            )
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        if labels is not None:
            counts, logits_to_keep = labels != -100, 0
            if loss_weights is not None:
                loss_weights = loss_weights.expand_as(labels)
                logits_to_keep = counts = counts & (loss_weights != 0)
            elif self.training:
                self._warn_of_visible_targets(input_ids, counts)
        logits = self.lm_head(_states_to_keep(outputs.last_hidden_state, logits_to_keep))

        loss = None
        if labels is not None:
            loss = masked_diffusion_loss(
                logits if loss_weights is not None else logits[counts.to(logits.device)],
                labels[counts],
                None if loss_weights is None else loss_weights[counts],
                labels.numel() if num_items_in_batch is None else num_items_in_batch,
            )
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _warn_of_visible_targets(self, input_ids: torch.LongTensor | None, counts: torch.BoolTensor):
        """Warns if the first batch of a training asks for tokens that are all visible, as a plain Trainer does.

        Later batches are not looked at, since a look waits for the device; nor is a compiled forward's.
        """
        if self._has_seen_targets or input_ids is None or torch.compiler.is_compiling():
            return
        self._has_seen_targets = True
        if counts.any() and not (input_ids[counts] == self.config.mask_token_id).any():
            logger.warning(
                "Training without `loss_weights` on `labels` none of which is masked in `input_ids`: the model only "
                "learns to copy what it sees. Use `illada.training.trainer.MaskedDiffusionTrainer` with "
                "`MaskedDiffusionCollator`, or mask the inputs with `Objective.add_noise` in a loop of your own."
            )


__all__ = ["ILLaDAForCausalLM", "ILLaDAModel", "ILLaDAPreTrainedModel", "masked_diffusion_loss"]
