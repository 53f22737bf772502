"""The end-of-thinking boost: a chain of thought is brought to its end before the budget is."""

import torch


class EndOfThinkingBoost:
    """Raises the logit of the next token of `</think>` as the response grows (iLLaDA's evaluation, arXiv 2606.25331).

    Until the response contains all of `token_ids`, the first masked position of a row's active block gets
    `boost * progress ** power` added to the logit of one id: the one that continues the longest match of `token_ids`
    ending right before the position. `progress = (position - prompt_length + 1) / max_new_tokens`, clipped to [0, 1].

    Args:
        token_ids (`list[int]`): ids of the text that ends the thinking.
        boost (`float`): in logits.
        power (`float`).
    """

    def __init__(self, token_ids: list[int], boost: float, power: float):
        self.token_ids, self.boost, self.power = token_ids, boost, power

    def __call__(
        self, text: torch.LongTensor, position: int, prompt_length: int, max_new_tokens: int
    ) -> tuple[int, float] | None:
        """The id to boost at `position`, the first mask of the block in `text` (S,), and by how many logits.

        None if there is nothing to boost: in the prompt's blanks, and once the response contains the ids.
        """
        if position < prompt_length or max_new_tokens == 0 or self._has_ended(text[prompt_length:]):
            return None
        progress = min((position - prompt_length + 1) / max_new_tokens, 1.0)
        return self.token_ids[self._matched(text[prompt_length:position].tolist())], self.boost * progress**self.power

    def _has_ended(self, response: torch.LongTensor) -> bool:
        if len(response) < len(self.token_ids):
            return False
        return bool((response.unfold(0, len(self.token_ids), 1) == torch.tensor(self.token_ids)).all(-1).any())

    def _matched(self, written: list[int]) -> int:
        """How many of `token_ids` stand right before the position."""
        lengths = range(min(len(self.token_ids) - 1, len(written)), 0, -1)
        return next((length for length in lengths if written[-length:] == self.token_ids[:length]), 0)
