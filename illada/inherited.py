"""What a model inherits from Transformers and cannot do: each method is refused by name, with what to use instead.

Whatever is inherited is offered to users. The rest of it works as it stands; `tests/test_inherited.py` goes through
all of it.
"""

import sys
from collections.abc import Callable


def _refusing(name: str, instead: str) -> Callable:
    def method(self, *args, **kwargs):
        raise NotImplementedError(f"`{name}` does not work on a masked diffusion model: {instead}.")

    method.__name__ = method.__qualname__ = name
    method.__doc__ = f"Raises `NotImplementedError`: {instead}."
    return method


class RefusesWritingFromLeftToRight:
    """A base, before `GenerationMixin`, of classes that generate."""

    compute_transition_scores = _refusing(
        "compute_transition_scores",
        "`generate(output_trace=True, return_dict_in_generate=True)` returns `commit_confidences`",
    )
    heal_tokens = _refusing("heal_tokens", "put [MASK] in place of the token, and `generate` fills it")
    prepare_inputs_for_generation = _refusing(
        "prepare_inputs_for_generation", "`generate` prepares its own inputs; one forward pass is `model(input_ids)`"
    )


class RefusesOtherParts:
    """A base, before `PreTrainedModel`, of models that have one trunk and rotations for positions."""

    get_position_embeddings = _refusing("get_position_embeddings", "positions are rotations: `config.rope_parameters`")
    resize_position_embeddings = _refusing(
        "resize_position_embeddings", "positions are rotations: set `config.max_position_embeddings`"
    )
    set_decoder = _refusing("set_decoder", "assign `model.model`")
    set_encoder = _refusing("set_encoder", "assign `model.model`")


def check_pipeline():
    """Raises `NotImplementedError` if the caller is Transformers' text pipeline; for prompts with blanks.

    That pipeline shows the prompt as it was typed and cuts as many characters off the answer: what was filled in would
    be lost, without a word. It offers no hook to change that and does not tell `generate` who calls, so the calling
    frames are looked through. A subclass with a `postprocess` of its own is taken to know what it does.
    """
    from transformers import TextGenerationPipeline  # slow to import

    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, TextGenerationPipeline):
            if type(caller).postprocess is not TextGenerationPipeline.postprocess:
                return
            raise NotImplementedError(
                'Transformers\' `pipeline("text-generation")` would lose what is filled into the blanks of a prompt: '
                "pass `pipeline_class=illada.text.pipelines.TextWithBlanksPipeline`, or call `generate`."
            )
        frame = frame.f_back
