"""Models for tests of decoding: small random ones, and one whose logits are a table that the test writes down."""

import string

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.modeling_outputs import MaskedLMOutput

from illada import ILLaDAConfig, ILLaDAForCausalLM, ILLaDAPreTrainedModel, MaskedDiffusionGenerationMixin

BOS, PAD, EOS, MASK = 0, 1, 2, 5


def random_model(
    seed: int, vocab_size: int = 37, dtype: torch.dtype = torch.float64, num_layers: int = 1, **settings
) -> ILLaDAForCausalLM:
    """A small model with weights so large that every token depends on every other, and EOS comes now and then."""
    config = ILLaDAConfig(
        **{
            "vocab_size": vocab_size,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
            **settings,
        }
    )
    model = ILLaDAForCausalLM(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                gain = 4.0 if "embed" in name else 1.5 / weight.shape[1] ** 0.5
                weight.copy_(torch.randn(weight.shape, generator=generator, dtype=dtype) * gain)
        model.lm_head.weight[EOS] *= 2
    return model


class TableModel(ILLaDAPreTrainedModel, MaskedDiffusionGenerationMixin):
    """A model whose logits are `table[position]`, whatever the tokens are; `calls` holds what it was called with."""

    def __init__(self, table: torch.Tensor):
        super().__init__(
            ILLaDAConfig(
                vocab_size=table.shape[1],
                hidden_size=2,
                num_attention_heads=1,
                num_key_value_heads=1,
                num_hidden_layers=1,
                max_position_embeddings=len(table),
            )
        )
        self.table = torch.nn.Parameter(table.clone(), requires_grad=False)
        self.calls: list[torch.Tensor] = []

    def forward(self, input_ids, attention_mask=None, position_ids=None, logits_to_keep=None):
        self.calls.append(input_ids.clone())
        return MaskedLMOutput(logits=self.table[position_ids[logits_to_keep]])


def table_of(probabilities: dict[int, dict[int, float]], positions: int, vocab_size: int = 16) -> torch.Tensor:
    """Logits (positions, vocab_size) that give these probabilities: {position: {token: probability}}.

    What is left of a row's probability goes to token 3, which is thus the answer of every position not mentioned.
    """
    table = torch.zeros(positions, vocab_size, dtype=torch.float64)
    for position, row in probabilities.items():
        for token, probability in row.items():
            table[position, token] = probability
    table[:, 3] += 1 - table.sum(-1)
    return table.log()


def prompt_of(length: int, blanks=()) -> torch.Tensor:
    """A prompt (1, length) of the token 7, with [MASK] at the positions `blanks`."""
    input_ids = torch.full((1, length), 7)
    input_ids[0, list(blanks)] = MASK
    return input_ids


def pad_left(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` of a ragged batch."""
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
    }


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 37 tokens: six special ones, `a` to `z` from 6 on, a space, `ab`, `cd`, a newline."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<x>", "<[MASK]>"]
    vocab = [*special, *string.ascii_lowercase, "\u0120", "ab", "cd", "\u010a", "."]
    model = models.BPE({token: index for index, token in enumerate(vocab)}, [("a", "b"), ("c", "d")])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", mask_token="<[MASK]>"
    )
