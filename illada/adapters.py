"""Adapters of PEFT that act outside the model's layers, where generation, scores and training cannot honour them."""


def check_adapters(model, work: str):
    """Raises `ValueError` if an adapter acts that needs the forward of a `PeftModel`, or a text without masks.

    LoRA and other adapters that change layers act wherever the model is called. Prompt learning (prompt tuning,
    P-tuning, prefix tuning ...) adds virtual tokens in `PeftModel.forward`, after which the columns of masks,
    positions and logits are no longer those of the text. Activated LoRA looks for a phrase of the prompt, which may be
    masked, and counts from the end of the text, which moves while a text is written.

    Args:
        model: a model, or a `PeftModel` around one. While `PeftModel.generate` runs, the model inside knows of virtual
            tokens by `prepare_inputs_for_generation`, which then belongs to the `PeftModel`; under `disable_adapter`
            the methods of the `PeftModel` are those of the model.
        work: what is refused, for the message.
    """
    adapters = []
    for method in (model.forward, getattr(model, "prepare_inputs_for_generation", None)):
        config = getattr(getattr(method, "__self__", model), "active_peft_config", None)
        if getattr(config, "is_prompt_learning", False):
            adapters.append(config.peft_type.value)
    if any(getattr(config, "alora_invocation_tokens", None) for config in getattr(model, "peft_config", {}).values()):
        adapters.append("Activated LoRA")
    if adapters:
        raise ValueError(
            f"{work} cannot honour the adapter {adapters[0]} of PEFT, which does not act in the layers: use "
            "LoRA or another adapter of layers, or the model without the adapter."
        )
