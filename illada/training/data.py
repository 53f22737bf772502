"""From texts to batches: tokenised examples, windows over their concatenation, and the collator that corrupts them."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from .corpus import Example, training_examples
from .corruption import corrupt, sample_mask_probabilities


def encode(tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> list[tuple[list[int], int]]:
    """Token ids of each example with one EOS at its end, and how many of them are the prompt.

    A plain document begins with BOS, which counts as its prompt; a prompt is written by the chat template.
    """
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": example.prompt}], add_generation_prompt=True, tokenize=False
        )
        if example.prompt
        else tokenizer.bos_token
        for example in examples
    ]
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    text_ids = tokenizer([example.text for example in examples], add_special_tokens=False)["input_ids"]
    return [([*p, *t, tokenizer.eos_token_id], len(p)) for p, t in zip(prompt_ids, text_ids)]


def windows(encoded: Iterable[tuple[list[int], int]], length: int) -> Iterator[dict[str, list]]:
    """Cuts the concatenation of examples into windows of `length` tokens.

    A window begins with an example and ends wherever its length says, so that the end of a canvas tells nothing about
    the end of an answer: a model trained on windows that end with EOS learns to squeeze every answer into the canvas.

    Yields:
        `input_ids` and `is_prompt`, two lists of `length`.
    """
    input_ids, is_prompt = [], []
    for ids, prompt_length in encoded:
        input_ids += ids
        is_prompt += [True] * prompt_length + [False] * (len(ids) - prompt_length)
        if len(input_ids) >= length:
            yield {"input_ids": input_ids[:length], "is_prompt": is_prompt[:length]}
            input_ids, is_prompt = [], []


class CorpusWindows(IterableDataset):
    """Windows over the endless stream of training examples; every iteration from the start gives the same."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int, seed: int):
        self.tokenizer, self.length, self.seed = tokenizer, length, seed

    def __iter__(self) -> Iterator[dict[str, list]]:
        examples = training_examples(self.seed)
        chunks = (list(itertools.islice(examples, 1024)) for _ in itertools.count())
        encoded = itertools.chain.from_iterable(encode(self.tokenizer, chunk) for chunk in chunks)
        return windows(encoded, self.length)


@dataclass
class MaskedDiffusionCollator:
    """Corrupts windows as iLLaDA's training does, and splits some into two segments that do not see each other.

    Args:
        mask_token_id: id of [MASK].
        split_probability: share of the windows that are cut at a random point into two segments.
        keep_prompt_probability: share of the windows whose prompts stay visible (as in LLaDA's SFT); in the others
            everything may be masked (as in iLLaDA's).
        seed: of the collator's own generator.
    """

    mask_token_id: int
    split_probability: float = 0.3
    keep_prompt_probability: float = 0.0
    seed: int = 0
    generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, features: list[dict[str, list]]) -> dict[str, torch.Tensor]:
        """Returns `input_ids`, `labels`, `loss_weights` and `position_ids` (B, S), `attention_mask` (B, 1, S, S)."""
        input_ids = torch.tensor([feature["input_ids"] for feature in features])
        is_prompt = torch.tensor([feature["is_prompt"] for feature in features])
        batch_size, length = input_ids.shape

        keep_prompt = torch.rand(batch_size, 1, generator=self.generator) < self.keep_prompt_probability
        probabilities = sample_mask_probabilities(batch_size, self.generator, stratified=True)
        corruption = corrupt(input_ids, ~(is_prompt & keep_prompt), probabilities, self.mask_token_id, self.generator)

        split_point = torch.randint(1, length, (batch_size, 1), generator=self.generator)
        is_split = torch.rand(batch_size, 1, generator=self.generator) < self.split_probability
        positions = torch.arange(length).expand(batch_size, -1)
        in_second_segment = is_split & (positions >= split_point)
        return {
            **vars(corruption),
            "position_ids": torch.where(in_second_segment, positions - split_point, positions),
            "attention_mask": (in_second_segment.unsqueeze(1) == in_second_segment.unsqueeze(2)).unsqueeze(1),
        }
