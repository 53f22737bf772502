"""Lossless drafts: steps that were guessed need no pass of their own (FreeDave, arXiv 2510.00294).

A step is a function of a row's text (and of its quota): next(x). A pass over the text x and over guesses d_2 ... d_K
of what it becomes decides next() for all of them. The row becomes next(x); where that is one of the guesses, its next
step is known too, and so on:

    x              Tom has 3 ░░░░ and 4 ░░░░          the row, and its drafts: what the last prediction would
    d_2            Tom has 3 ░░░░ and 4 cups          commit next, one step after the other
    d_3            Tom has 3 pears and 4 cups

    next(x)   = Tom has 3 ░░░░ and 4 cups  = d_2      known from this pass: go on
    next(d_2) = Tom has 3 apples and 4 cups           no draft: the next pass begins here

Steps are accepted in the order in which passes would have made them, and all that follows from one (EOS, stop strings,
listeners, a refresh of the cache) is done before the next, so that the tokens are those of decoding without drafts. A
draft is a row of the canvas like any other: processors, rankings and rules see no difference. Over a cache, drafts
share the row's cached columns (`tree.py`).
"""

from collections.abc import Callable
from itertools import takewhile

import torch

from .canvas import Canvas, Row


def known_draft(canvas: Canvas, row: Row) -> Row | None:
    """The draft that the row has become, if there is one: what was decided for it holds for the row."""
    text = canvas.tokens[row.index, row.block]
    for draft in row.drafts:
        if draft.quota() == row.quota() and torch.equal(canvas.tokens[draft.index, row.block], text):
            return draft
    return None


def propose(
    canvas: Canvas,
    row: Row,
    proposals: torch.LongTensor,
    ranks: torch.LongTensor,
    may_be_drafted: Callable[[Row], bool],
) -> list[Row]:
    """Guesses of what the next steps make of a row: its quota of further proposals each, the highest-ranked first.

    Args:
        proposals (`torch.LongTensor` of shape `(N,)`), ranks (`torch.LongTensor` of shape `(N,)`):
            Of the row's block in its last step, on the host.
        may_be_drafted (`Callable`): of a predictor.
    """
    if not may_be_drafted(row):
        return []
    text = canvas.tokens[row.index, row.block]
    masked = text == canvas.mask_token_id
    order = ranks.masked_fill(~masked, len(ranks)).argsort()
    counts, num_masked = [], int(masked.sum())
    for steps in range(row.settings.num_candidates - 1):
        counts.append(sum(counts[-1:]) + max(row.quota(steps), 1))
    counts = torch.tensor([count for count in counts if count < num_masked], dtype=torch.long)
    is_guessed = (order.argsort() < counts.unsqueeze(-1)) & masked
    return list(takewhile(may_be_drafted, canvas.draft(row, torch.where(is_guessed, proposals, text))))
