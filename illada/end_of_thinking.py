"""The end-of-thinking boost: a chain of thought is brought to its end before the budget is."""

import torch


class EndOfThinkingBoost:
    """Raises the logit of the next token of `</think>` as the response grows (iLLaDA's evaluation, arXiv 2606.25331).

    Until the response holds all of `token_ids`, the first masked position of a row's active block gets
    `boost * progress ** power` added to the logit of one id: the one that continues the longest match of `token_ids`
    ending right before the position. `progress = (position - prompt_length + 1) / max_new_tokens`, clipped to [0, 1].

    Args:
        token_ids (`list[int]`): ids of the text that ends the thinking.
        boost (`float`): in logits.
        power (`float`).
        prompt_length (`int`), max_new_tokens (`int`): in tokens.
    """

    def __init__(self, token_ids: list[int], boost: float, power: float, prompt_length: int, max_new_tokens: int):
        self.token_ids = token_ids
        self.boost, self.power = boost, power
        self.prompt_length, self.max_new_tokens = prompt_length, max_new_tokens

    def __call__(
        self, tokens: torch.LongTensor, rows: torch.LongTensor, columns: torch.LongTensor, logits: torch.Tensor
    ) -> torch.Tensor:
        """Returns the boosted logits (M, V) of the masked positions `(rows, columns)` (M,) of `tokens` (R, S)."""
        is_first = torch.ones_like(rows, dtype=torch.bool)
        is_first[1:] = rows[1:] != rows[:-1]
        position, tokens = columns[is_first], tokens[rows[is_first]]

        token_ids = torch.tensor(self.token_ids, device=tokens.device)
        next_id = token_ids[self._matched(tokens, position, token_ids)]
        progress = ((position - self.prompt_length + 1) / self.max_new_tokens).clamp(0, 1)
        is_thinking = (position >= self.prompt_length) & ~self._has_ended(tokens, token_ids)
        amount = self.boost * progress**self.power * is_thinking
        logits = logits.clone()
        logits[is_first.nonzero().squeeze(-1), next_id] += amount.to(logits.dtype)
        return logits

    def _has_ended(self, tokens: torch.LongTensor, token_ids: torch.LongTensor) -> torch.BoolTensor:
        response = tokens[:, self.prompt_length :]
        if response.shape[1] < len(token_ids):
            return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        return (response.unfold(1, len(token_ids), 1) == token_ids).all(-1).any(-1)

    def _matched(self, tokens, position, token_ids) -> torch.LongTensor:
        """(R,): how many of `token_ids` stand right before each position, all of them in the response."""
        matched = torch.zeros_like(position)
        for length in range(1, len(token_ids)):
            start = position - length
            window = start.unsqueeze(-1) + torch.arange(length, device=tokens.device)
            matches = (tokens.gather(1, window.clamp(min=0)) == token_ids[:length]).all(-1)
            matched = torch.where(matches & (start >= self.prompt_length), length, matched)
        return matched
