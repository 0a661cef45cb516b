"""One process's share of a sequence that is spread over a ring, and the travels of its keys and values.

The sequence lies folded in the middle: cut into 2R chunks, process r of R holds chunk r and its mirror image, chunk
2R - 1 - r, so that under a causal mask all have the same work. What travels at a time is cut the same way, a short
stretch and its mirror image: while one pair is attended to, the one before it is on its way.

Source: Liu, Zaharia and Abbeel, "Ring Attention with Blockwise Transformers for Near-Infinite Context" (2023), section
3; there each process holds one stretch, and those that hold late ones have more work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int64
from torch import Tensor

from offbook.models.blockwise.attention import Rule, attend, attend_backward, merge
from offbook.models.blockwise.masks import Kind, blocks
from offbook.models.blockwise.sequence import Keys, Queries

if TYPE_CHECKING:
    from offbook.models.blockwise.ring import Ring


class Share:
    """A `Place`: this process's tokens of one sequence, for a forward pass and its backward pass.

    Attributes:
        ring: the processes.
        tokens: of the whole sequence.
        remat: the policy that all processes follow.
        seed: of the dropout of all of them.
        pairs: that the tokens of a process travel in.
    """

    def __init__(self, ring: Ring, tokens: int, remat: str, seed: int | None, block: int, device: torch.device) -> None:
        self.ring, self.tokens, self.remat, self.seed = ring, tokens, remat, seed
        # At least two, so that one can be on its way while the other is attended to.
        self.pairs = max(2, -(-tokens // (ring.size * block)))
        self._chunks, self._indices = fold(tokens, ring.size, ring.rank), ring.indices(tokens).to(device)

    def blocks(self, tokens: int, size: int) -> list[range]:
        """Blocks of the chunk, and those of its mirror image."""
        seam = len(self._chunks[0])
        return [*blocks(range(seam), size), *blocks(range(seam, tokens), size)]

    def indices(self, tokens: range, device: torch.device) -> Int64[Tensor, " tokens"]:
        """Indices in the sequence of some of the tokens at hand."""
        return self._indices[tokens.start : tokens.stop]

    def keys(self, k: Tensor, v: Tensor, rule: Rule) -> Keys:
        """Those of all processes."""
        return _Travelling(self, k, v, rule)

    def span(self, rows: range) -> range:
        """The indices in the sequence of a block of the tokens at hand."""
        chunk, mirror = self._chunks
        start = rows.start + (chunk.start if rows.start < len(chunk) else mirror.start - len(chunk))
        return range(start, start + len(rows))

    def pair(self, rank: int, number: int) -> tuple[range, range]:
        """What one of the pairs that a process sends out is of the sequence."""
        return fold(self.tokens, self.ring.size * self.pairs, rank % self.ring.size * self.pairs + number)


class _Travelling:
    """The keys and values of a layer. Those of a pair are one tensor: (2, batch, heads, tokens of both, size)."""

    def __init__(self, share: Share, k: Tensor, v: Tensor, rule: Rule) -> None:
        self._share, self._rule, self._q = share, rule, list[Tensor]()
        own = [share.pair(share.ring.rank, number) for number in range(share.pairs)]
        # The stretches stand in the order of the pairs, their mirror images in the reverse one.
        self._sizes = [len(one) for one, _ in own] + [len(mirror) for _, mirror in reversed(own)]
        cut = [some.split_with_sizes(self._sizes, 2) for some in (k, v)]
        self._kv = [
            torch.stack([torch.cat([some[n], some[-1 - n]], 2) for some in cut]) for n in range(share.pairs)
        ]  # fmt: skip

    def attend(self, queries: Queries, every: list[range]) -> Iterator[tuple[range, Tensor, Tensor]]:
        self._q = [queries(rows) for rows in every]
        k, v = self._kv[0][:, :, :, :0]
        found = [attend(q, k, v, self._rule, rows, range(0)) for q, rows in zip(self._q, every, strict=True)]
        for keys, (k, v) in self._turn(list(self._kv)):
            for number, queried in self._seeing(every, keys):
                piece = attend(self._q[number], k, v, self._rule, queried, keys)
                found[number] = merge(*found[number], *piece)
        found = [(o.to(q.dtype), lse) for q, (o, lse) in zip(self._q, found, strict=True)]
        yield from ((rows, *both) for rows, both in zip(every, found, strict=True))

    def attend_backward(
        self, queries: Queries, parts: Iterable[tuple[range, Tensor, Tensor, Tensor]]
    ) -> Iterator[tuple[range, Tensor]]:
        parts = list(parts)
        every = [rows for rows, *_ in parts]
        self._q = self._q or [queries(rows) for rows in every]
        dqs = [torch.zeros_like(q, dtype=lse.dtype) for q, (_, _, lse, _) in zip(self._q, parts, strict=True)]
        wide = torch.promote_types(self._kv[0].dtype, torch.float32)
        self._sums = [torch.zeros_like(kv, dtype=wide) for kv in self._kv]
        for keys, (k, v), (dk, dv) in self._turn(self._kv, self._sums):
            for number, queried in self._seeing(every, keys):
                _rows, o, lse, do = parts[number]
                q, rule = self._q[number], self._rule
                dqs[number] += attend_backward(do, q, k, v, o, lse, rule, queried, keys, dk, dv)
        # Only gradients are left to be pulled through the rest of the layer.
        for done in (parts, self._q, self._kv):
            done.clear()
        yield from zip(every, dqs, strict=True)

    def gradients(self) -> tuple[Tensor, Tensor]:
        halves = [sums.split_with_sizes([self._sizes[n], self._sizes[-1 - n]], 3) for n, sums in enumerate(self._sums)]
        dk, dv = torch.cat([*(one for one, _ in halves), *(mirror for _, mirror in reversed(halves))], 3)
        return dk, dv

    def _seeing(self, every: list[range], keys: range) -> list[tuple[int, range]]:
        """Which blocks of queries see any of some keys: their numbers, and indices in the sequence."""
        spans = [self._share.span(rows) for rows in every] if keys else []
        return [(n, span) for n, span in enumerate(spans) if self._rule.mask.kind(span, keys) is not Kind.EMPTY]

    def _turn(self, *stacks: list[Tensor]) -> Iterator[tuple[Any, ...]]:
        """Sends pairs once around the ring.

        Yields every stretch of the sequence with what there is of it in each of the stacks. As soon as a pair is done
        with, it goes on to the next process; the one that takes its place is waited for one pair later.

        Args:
            stacks: pairs of keys and values, which stay where they are in the end; and of sums, which come home.
        """
        share, ring = self._share, self._share.ring
        wait: Callable[[], None] | None = None
        for hop, number in product(range(ring.size), range(share.pairs)):
            pair = share.pair(ring.rank - hop, number)
            sizes = list(map(len, pair))
            yield from zip(pair, *(stack[number].split_with_sizes(sizes, 3) for stack in stacks), strict=True)
            if wait is not None:
                wait()
            if ring.size > 1:
                coming = sum(map(len, share.pair(ring.rank - hop - 1, number)))
                wait = ring.exchange(stacks if hop < ring.size - 1 else stacks[1:], number, coming)
        if wait is not None:
            wait()


def fold(tokens: int, pairs: int, number: int) -> tuple[range, range]:
    """A stretch of a sequence that is cut into `2 * pairs`, and its mirror image; lengths differ by one at most."""
    edges = [
        place * tokens // (2 * pairs) for place in (number, number + 1, 2 * pairs - number - 1, 2 * pairs - number)
    ]
    return range(edges[0], edges[1]), range(edges[2], edges[3])
