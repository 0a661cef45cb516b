"""Who sees whom in attention: functions of token indices, evaluated block by block and never as a whole.

A mask is made of small pieces, combined with `&` and `|`: `Causal() & KeyPadding(lengths)`. For a block of queries and
a block of keys it first says, without looking at single tokens, whether all pairs, none, or those below the diagonal
are visible; only in the blocks that are left are pairs computed. So a mask costs no memory that grows with the square
of the sequence, and blocks without a visible pair cost nothing.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from offbook.errors import ConfigError


class Kind(Enum):
    """What is visible in a block of queries and keys."""

    EMPTY = "none"
    FULL = "all"
    DIAGONAL = "keys up to the query, in a block that begins with the same token on both sides"
    PARTIAL = "some"


class Mask(ABC):
    """Which keys a query sees; queries and keys are named by their indices in the whole sequence.

    Attributes:
        shape: numbers of samples and tokens for which it was made; None where it fits any number.
    """

    shape: tuple[int | None, int | None] = (None, None)

    def kind(self, queries: range, keys: range) -> Kind:
        """What is visible in a block that is not empty, as far as it can be told without looking at pairs."""
        return self._kind(queries, keys)

    def visible(self, queries: range, keys: range, device: torch.device | str = "cpu") -> Bool[Tensor, "#batch q k"]:
        """Which pairs of a block are visible.

        Raises:
            ConfigError: a mask of one's own gives something else.
        """
        i = torch.arange(queries.start, queries.stop, device=device)[None, :, None]
        j = torch.arange(keys.start, keys.stop, device=device)[None, None]
        return self._checked(i, j).expand(-1, len(queries), len(keys))

    def real(self, tokens: range, device: torch.device | str = "cpu") -> Bool[Tensor, "#batch tokens"] | None:
        """Which tokens are no padding; None where the mask knows of none."""
        return None

    def _kind(self, queries: range, keys: range) -> Kind:
        return Kind.PARTIAL

    @abstractmethod
    def _visible(self, i: Int64[Tensor, "1 q 1"], j: Int64[Tensor, "1 1 k"]) -> Bool[Tensor, "#batch #q #k"]: ...

    def _checked(self, i: Int64[Tensor, "1 q 1"], j: Int64[Tensor, "1 1 k"]) -> Bool[Tensor, "#batch #q #k"]:
        """What is visible, from functions of one's own too."""
        seen, size = self._visible(i, j), (i.shape[1], j.shape[2])
        tensor = isinstance(seen, Tensor) and seen.dtype == torch.bool and seen.device == i.device and seen.ndim == 3
        if not tensor or any(own not in (1, want) for own, want in zip(seen.shape[1:], size, strict=True)):
            got = f"{seen.dtype} {tuple(seen.shape)} on {seen.device}" if isinstance(seen, Tensor) else repr(seen)
            where, expected = f"mask {type(self).__name__}", f"booleans (batch, {size[0]}, {size[1]}) on {i.device}"
            raise ConfigError(where, expected=expected, got=got, fix="compare i and j, and nothing else")
        return seen

    def __and__(self, other: Mask) -> Mask:
        return _Combined(self, other, every=True)

    def __or__(self, other: Mask) -> Mask:
        return _Combined(self, other, every=False)

    def check(self, batch: int, tokens: int) -> None:
        """Raises a `ConfigError` unless it fits so many samples and tokens."""
        for name, own, given in zip(("samples", "tokens"), self.shape, (batch, tokens), strict=True):
            if own is not None and (own < given if name == "tokens" else own not in (1, given)):
                where, fix = f"mask {type(self).__name__}", "make the mask for this input"
                raise ConfigError(where, expected=f"one for {given} {name}", got=f"one for {own}", fix=fix)


@dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key."""

    def _kind(self, queries: range, keys: range) -> Kind:
        return Kind.FULL

    def _visible(self, i: Int64[Tensor, "1 q 1"], j: Int64[Tensor, "1 1 k"]) -> Bool[Tensor, "#batch #q #k"]:
        return torch.ones_like(i, dtype=torch.bool)


@dataclass(frozen=True)
class Where(Mask):
    """A mask of one's own.

    Attributes:
        function: gives booleans for indices of queries, shape (1, q, 1), and of keys, shape (1, 1, k), that broadcast
            to (batch, q, k). It may look at tensors of its own, on the device of the indices.

    Example:
        >>> Where(lambda i, j: (i - j) % 2 == 0).visible(range(2), range(4))[0].int().tolist()
        [[1, 0, 1, 0], [0, 1, 0, 1]]
    """

    function: Callable[[Tensor, Tensor], Tensor]

    def _visible(self, i: Int64[Tensor, "1 q 1"], j: Int64[Tensor, "1 1 k"]) -> Bool[Tensor, "#batch #q #k"]:
        return self.function(i, j)


@dataclass(frozen=True)
class Causal(Mask):
    """A query sees itself and what is before it.

    Example:
        >>> Causal().visible(range(3), range(3))[0].int().tolist()
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """

    def _kind(self, queries: range, keys: range) -> Kind:
        if keys.start == queries.start and len(queries) > 1:
            return Kind.DIAGONAL
        return _compared(keys[-1] <= queries[0], keys[0] > queries[-1])

    def _visible(self, i: Int64[Tensor, "1 q 1"], j: Int64[Tensor, "1 1 k"]) -> Bool[Tensor, "#batch #q #k"]:
        return j <= i


@dataclass(frozen=True)
class Window(Mask):
    """A query sees the keys less than `size` tokens away, on both sides; `Causal() & Window(w)` is the sliding window.

    Attributes:
        size: tokens, 1 or more.
    """

    size: int

    def __post_init__(self) -> None:
        _at_least_one("window", self.size)

    def _kind(self, queries: range, keys: range) -> Kind:
        apart = max(queries[0] - keys[-1], keys[0] - queries[-1], 0)
        furthest = max(queries[-1] - keys[0], keys[-1] - queries[0])
        return _compared(furthest < self.size, apart >= self.size)

    def _visible(self, i: Int64[Tensor, "1 q 1"], j: Int64[Tensor, "1 1 k"]) -> Bool[Tensor, "#batch #q #k"]:
        return (i - j).abs() < self.size


@dataclass(frozen=True)
class FrameCausal(Mask):
    """A query sees its own frame whole, and all frames before it.

    Attributes:
        tokens: of a frame, 1 or more.
    """

    tokens: int

    def __post_init__(self) -> None:
        _at_least_one("tokens of a frame", self.tokens)

    def _kind(self, queries: range, keys: range) -> Kind:
        t = self.tokens
        return _compared(keys[-1] // t <= queries[0] // t, keys[0] // t > queries[-1] // t)

    def _visible(self, i: Int64[Tensor, "1 q 1"], j: Int64[Tensor, "1 1 k"]) -> Bool[Tensor, "#batch #q #k"]:
        return j // self.tokens <= i // self.tokens


@dataclass(frozen=True)
class Prefix(Mask):
    """Every query sees the first `tokens` keys; `Causal() | Prefix(n)` is the mask of a prefix language model."""

    tokens: int

    def _kind(self, queries: range, keys: range) -> Kind:
        return _compared(keys[-1] < self.tokens, keys[0] >= self.tokens)

    def _visible(self, i: Int64[Tensor, "1 q 1"], j: Int64[Tensor, "1 1 k"]) -> Bool[Tensor, "#batch #q #k"]:
        return j < self.tokens


class KeyPadding(Mask):
    """All queries see the real keys of their sample and none of the padding.

    Args:
        lengths: real tokens of each sample, the first ones, shape (batch,); or which tokens are real,
            shape (batch, tokens).

    Raises:
        ConfigError: neither integers of shape (batch,) nor booleans of shape (batch, tokens).
    """

    def __init__(self, lengths: Int64[Tensor, " batch"] | Bool[Tensor, "batch tokens"]) -> None:
        integers = lengths.ndim == 1 and not lengths.is_floating_point() and lengths.dtype != torch.bool
        if not integers and not (lengths.ndim == 2 and lengths.dtype == torch.bool):
            expected, got = "integers (batch,) or booleans (batch, tokens)", f"{lengths.dtype} {tuple(lengths.shape)}"
            raise ConfigError("KeyPadding", expected=expected, got=got, fix="pass lengths, or which tokens are real")
        self._real = lengths
        self.shape = (len(lengths), None if integers else lengths.shape[1])
        # On the processor, where a block is looked at without waiting for a device.
        self._here = lengths.detach().cpu()

    def real(self, tokens: range, device: torch.device | str = "cpu") -> Bool[Tensor, "#batch tokens"] | None:
        """Which tokens are no padding."""
        return self.visible(range(1), tokens, device)[:, 0]

    def _kind(self, queries: range, keys: range) -> Kind:
        if self._here.ndim == 1:
            return _compared(int(self._here.min()) >= keys.stop, int(self._here.max()) <= keys.start)
        here = self._here[:, keys.start : keys.stop]
        return _compared(bool(here.all()), not bool(here.any()))

    def _visible(self, i: Int64[Tensor, "1 q 1"], j: Int64[Tensor, "1 1 k"]) -> Bool[Tensor, "#batch #q #k"]:
        real = self._real.to(j.device)
        return j < real[:, None, None] if real.ndim == 1 else real[:, j[0, 0]][:, None]


class TokenTypes(Mask):
    """What a query sees depends on its type and the key's: `allow[t, u]` says whether type t sees type u.

    Args:
        types: 0 to T - 1, shape (tokens,) for all samples alike or (batch, tokens).
        allow: booleans, shape (T, T); None lets each type see its own only, whatever the numbers are.

    Raises:
        ConfigError: shapes, kinds of number or values are others.
    """

    def __init__(
        self, types: Int64[Tensor, " tokens"] | Int64[Tensor, "batch tokens"], allow: Bool[Tensor, "T T"] | None = None
    ) -> None:
        where, fix = type(self).__name__, "pass types 0 to T - 1, and booleans of shape (T, T)"
        if types.ndim not in (1, 2) or types.is_floating_point() or types.dtype == torch.bool:
            got = f"{types.dtype} {tuple(types.shape)}"
            raise ConfigError(where, expected="integers (tokens,) or (batch, tokens)", got=got, fix=fix)
        self._types, self._allow = types.reshape(-1, types.shape[-1]), allow
        self.shape = (len(self._types), types.shape[-1])
        self._here, self._allow_here = self._types.detach().cpu(), None if allow is None else allow.detach().cpu()
        if allow is not None:
            if allow.dtype != torch.bool or allow.ndim != 2 or allow.shape[0] != allow.shape[1]:
                got = f"{allow.dtype} {tuple(allow.shape)}"
                raise ConfigError(where, expected="booleans of shape (T, T)", got=got, fix=fix)
            if types.numel() and not 0 <= int(self._here.min()) <= int(self._here.max()) < len(allow):
                got = f"{int(self._here.min())} to {int(self._here.max())}"
                raise ConfigError(where, expected=f"types 0 to {len(allow) - 1}", got=got, fix=fix)

    def _kind(self, queries: range, keys: range) -> Kind:
        ours, theirs = (self._here[:, span.start : span.stop] for span in (queries, keys))
        if self._allow_here is not None:
            pairs = self._allow_here[sorted(set(ours.flatten().tolist()))][:, sorted(set(theirs.flatten().tolist()))]
            return _compared(bool(pairs.all()), not bool(pairs.any()))
        # Enough for tokens in order of their segments, without looking at pairs.
        lows, highs = torch.maximum(ours.amin(1), theirs.amin(1)), torch.minimum(ours.amax(1), theirs.amax(1))
        alike = (ours.amin(1) == ours.amax(1)) & (theirs.amin(1) == theirs.amax(1)) & (lows == highs)
        return _compared(bool(alike.all()), bool((lows > highs).all()))

    def _visible(self, i: Int64[Tensor, "1 q 1"], j: Int64[Tensor, "1 1 k"]) -> Bool[Tensor, "#batch #q #k"]:
        types = self._types.to(i.device)
        ours, theirs = types[:, i[0, :, 0], None], types[:, None, j[0, 0]]
        return ours == theirs if self._allow is None else self._allow.to(i.device)[ours, theirs]


class Segments(TokenTypes):
    """Tokens see their own segment only: sequences packed end to end.

    Args:
        ids: integers, shape (tokens,) or (batch, tokens).
    """

    def __init__(self, ids: Int64[Tensor, " tokens"] | Int64[Tensor, "batch tokens"]) -> None:
        super().__init__(ids)


class _Combined(Mask):
    """Both masks, or either."""

    def __init__(self, one: Mask, other: Mask, *, every: bool) -> None:
        self.parts, self._every = (one, other), every
        samples = {size for size in (one.shape[0], other.shape[0]) if size not in (None, 1)}
        if len(samples) > 1:
            fix = "make both for the same samples"
            raise ConfigError("masks", expected="the same number of samples", got=f"{sorted(samples)}", fix=fix)
        tokens = [part.shape[1] for part in self.parts if part.shape[1] is not None]
        self.shape = (next(iter(samples), None), min(tokens, default=None))

    def real(self, tokens: range, device: torch.device | str = "cpu") -> Bool[Tensor, "#batch tokens"] | None:
        """Which tokens neither mask takes for padding."""
        known = [real for part in self.parts if (real := part.real(tokens, device)) is not None]
        return functools.reduce(torch.logical_and, known) if known and self._every else None

    def _kind(self, queries: range, keys: range) -> Kind:
        absorbing, neutral = (Kind.EMPTY, Kind.FULL) if self._every else (Kind.FULL, Kind.EMPTY)
        kinds = [part.kind(queries, keys) for part in self.parts]
        if absorbing in kinds:
            return absorbing
        left = {kind for kind in kinds if kind != neutral}
        return neutral if not left else left.pop() if len(left) == 1 else Kind.PARTIAL

    def _visible(self, i: Int64[Tensor, "1 q 1"], j: Int64[Tensor, "1 1 k"]) -> Bool[Tensor, "#batch #q #k"]:
        one, other = (part._checked(i, j) for part in self.parts)
        return one & other if self._every else one | other


def pieces(mask: Mask, queries: range, keys: range, block: int) -> list[tuple[range, Kind]]:
    """Cuts keys into blocks for a block of queries, leaving out those that nobody sees.

    Blocks end at multiples of `block` and at the ends of the queries, so that the diagonal is a block of its own.
    """
    cuts = {keys.start, keys.stop, *range(-(-keys.start // block) * block, keys.stop, block)}
    cuts |= {edge for edge in (queries.start, queries.stop) if keys.start < edge < keys.stop}
    edges = sorted(cuts)
    parts = [range(start, stop) for start, stop in pairwise(edges)]
    kinds = [(part, mask.kind(queries, part)) for part in parts]
    return [(part, kind) for part, kind in kinds if kind is not Kind.EMPTY]


def blocks(tokens: range, size: int) -> list[range]:
    """Cuts tokens into blocks of `size`; the last may be shorter."""
    return [range(start, min(start + size, tokens.stop)) for start in range(tokens.start, tokens.stop, size)]


def _compared(every: bool, none: bool) -> Kind:
    return Kind.FULL if every else Kind.EMPTY if none else Kind.PARTIAL


def _at_least_one(name: str, size: int) -> None:
    if size < 1:
        raise ConfigError(name, expected="1 or more", got=str(size), fix="choose a positive number")
