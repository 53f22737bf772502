"""Transformers' text pipeline for prompts with blanks.

Transformers' own shows the prompt as it was typed, and adds the tokens after it: what was filled into the prompt would
be lost.
"""

from transformers import TextGenerationPipeline

from .blanks import spell_blanks


class TextWithBlanksPipeline(TextGenerationPipeline):
    """`text-generation` whose text is that of `generate`, with the blanks of the prompt filled.

    Example: `pipeline("text-generation", model=..., pipeline_class=TextWithBlanksPipeline)`. A blank is written
    `<[MASK]>` or `<[MASK]*4>`; `max_new_tokens=0` fills blanks and appends nothing. `return_full_text=False` returns
    what follows the prompt only.

    Raises:
        ValueError: if a message of a chat has a blank.
    """

    def preprocess(self, prompt_text, *args, **kwargs):
        is_text = isinstance(prompt_text, str)
        if is_text:
            prompt_text = spell_blanks(prompt_text, self.tokenizer.convert_ids_to_tokens(self._mask_token_id))
        inputs = super().preprocess(prompt_text, *args, **kwargs)
        if not is_text and (inputs["input_ids"] == self._mask_token_id).any():
            raise ValueError("A chat must not have a blank, [MASK], in its messages: pass the prompt as text.")
        return inputs

    def postprocess(self, model_outputs, *args, **kwargs):
        if not (model_outputs["input_ids"] == self._mask_token_id).any():
            return super().postprocess(model_outputs, *args, **kwargs)
        prompt_length = model_outputs["input_ids"].shape[-1]
        records = []
        for index in range(model_outputs["generated_sequence"].shape[1]):  # each may have filled its own text in
            tensors = {
                name: value[:, index : index + 1]
                for name, value in model_outputs.items()
                if name not in ("input_ids", "prompt_text")
            }
            filled = tensors["generated_sequence"][0, 0, :prompt_length].tolist()
            own = {"prompt_text": self.tokenizer.decode(filled, skip_special_tokens=True)}
            records += super().postprocess({**model_outputs, **tensors, **own}, *args, **kwargs)
        return records

    @property
    def _mask_token_id(self) -> int:
        return self.model.generation_config.mask_token_id
