"""Where the tokens of a sequence are, and how queries meet all of its keys there: in one process.

A layer goes through blocks of the tokens that are at hand, and asks for the attention of each to all keys there are.
With the whole sequence in one process that is one block after another, each finished before the next begins; `ring.py`
has the same for sequences that are spread over processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from jaxtyping import Int64
from torch import Tensor

from offbook.models.blockwise.attention import Rule, attend, attend_backward
from offbook.models.blockwise.masks import blocks

# The queries of a block of the tokens at hand, of shape (batch, heads, tokens, size).
Queries = Callable[[range], Tensor]


class Keys(Protocol):
    """The keys and values of all tokens in one layer."""

    def attend(self, queries: Queries, every: list[range]) -> Iterator[tuple[range, Tensor, Tensor]]:
        """Attends from each block of the tokens at hand; gives the block, and what `attention.attend` does."""

    def attend_backward(
        self, queries: Queries, parts: Iterable[tuple[range, Tensor, Tensor, Tensor]]
    ) -> Iterator[tuple[range, Tensor]]:
        """Takes what `attend` gives, with the gradient of each output; gives the gradient of each block's queries."""

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Those of keys and values of the tokens at hand, after `attend_backward`."""


class Place(Protocol):
    """Which tokens of a sequence are at hand, numbered from 0 in the order in which they are held."""

    def blocks(self, tokens: int, size: int) -> list[range]:
        """Cuts the tokens at hand into blocks of tokens that follow one another in the sequence."""

    def indices(self, tokens: range, device: torch.device) -> Int64[Tensor, " tokens"]:
        """Indices in the sequence of some of the tokens at hand."""

    def keys(self, k: Tensor, v: Tensor, rule: Rule) -> Keys:
        """The keys and values of all tokens, from those at hand, of shape (batch, heads, tokens, size)."""


class Whole:
    """A `Place`: all tokens are at hand."""

    def blocks(self, tokens: int, size: int) -> list[range]:
        """All of one sequence follow one another."""
        return blocks(range(tokens), size)

    def indices(self, tokens: range, device: torch.device) -> Int64[Tensor, " tokens"]:
        """They are what they are here."""
        return torch.arange(tokens.start, tokens.stop, device=device)

    def keys(self, k: Tensor, v: Tensor, rule: Rule) -> Keys:
        """Those at hand."""
        return _Here(k, v, rule)


class _Here:
    def __init__(self, k: Tensor, v: Tensor, rule: Rule) -> None:
        self._k, self._v, self._rule, self._tokens = k, v, rule, range(k.shape[2])

    def attend(self, queries: Queries, every: list[range]) -> Iterator[tuple[range, Tensor, Tensor]]:
        for rows in every:
            yield rows, *attend(queries(rows), self._k, self._v, self._rule, rows, self._tokens)

    def attend_backward(
        self, queries: Queries, parts: Iterable[tuple[range, Tensor, Tensor, Tensor]]
    ) -> Iterator[tuple[range, Tensor]]:
        wide = torch.promote_types(self._k.dtype, torch.float32)
        self._dk, self._dv = (torch.zeros_like(some, dtype=wide) for some in (self._k, self._v))
        given = self._k, self._v
        for rows, o, lse, do in parts:
            sums = self._dk, self._dv
            yield rows, attend_backward(do, queries(rows), *given, o, lse, self._rule, rows, self._tokens, *sums)

    def gradients(self) -> tuple[Tensor, Tensor]:
        return self._dk, self._dv
