"""Keys and values of the tokens that went through a backbone, so that the next token costs the work of one.

Slot i of a sample holds its token i, in samples of unequal length too: each goes on from its own end, and what is
beyond it is neither read nor written. So a sample gives what it would give alone, and masks and positions mean the same
as in a forward pass over everything.

Room for all tokens is taken at the beginning and never moves. On Linux, memory for tokens that have not come yet costs
nothing until they come.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from offbook.errors import ConfigError, OffbookError
from offbook.models.blockwise.attention import Rule, attend
from offbook.models.blockwise.masks import Causal, KeyPadding, Kind, Mask, blocks
from offbook.models.blockwise.positions import RopeLayout, RopeStretch, rope_tables, turns

Lengths = Sequence[int] | Int64[Tensor, " batch"]
"""A whole number for each sample."""

# Tokens at a time where samples have unequal lengths: each pair of query and key then takes a number of memory.
_RAGGED_CHUNK = 256


class CacheFullError(OffbookError):
    """More tokens than a cache has room for; the cache is as it was before.

    Attributes:
        have: tokens of a sample that it has room for.
        need: tokens that the longest sample would have come to.
    """

    def __init__(self, have: int, need: int) -> None:
        expected, fix = f"at most {have} tokens of a sample", "make a cache with a larger max_len, or crop this one"
        super().__init__("cache", expected=expected, got=f"{need}", fix=fix)
        self.have, self.need = have, need

    def __reduce__(self) -> tuple[object, ...]:
        return CacheFullError, (self.have, self.need)


class KVCache:
    """Keys, already rotated, and values of all layers. After any error it is as it was before.

    Args:
        layers: of the backbone, like the next.
        batch: samples.
        max_len: tokens of a sample that there is room for.
        kv_heads: heads of keys and values.
        head_dim: size of a head.
        dtype: of what is kept; attention is computed in it.
        device: where it is kept.

    Raises:
        ConfigError: a number is below 1.

    Attributes:
        keys: of each layer, shape (batch, kv_heads, max_len, head_dim); 0 beyond each sample's length.
        values: likewise.
        max_len: as given.
        mask: who sees whom, decided by the first tokens.

    Example:
        >>> cache = KVCache(layers=2, batch=3, max_len=100, kv_heads=4, head_dim=8)
        >>> cache.length, cache.nbytes
        (0, 153600)
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        max_len: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        sizes = {"layers": layers, "batch": batch, "max_len": max_len, "kv_heads": kv_heads, "head_dim": head_dim}
        for name, size in sizes.items():
            if size < 1:
                raise ConfigError(name, expected="1 or more", got=str(size), fix="choose a positive number")
        self.max_len, self._lengths = max_len, [0] * batch
        self.mask: Mask = Causal()
        self._tables: dict[tuple[int, float, RopeStretch | None, RopeLayout], tuple[Tensor, Tensor]] = {}
        shape = (batch, kv_heads, max_len, head_dim)
        # Tensors made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self.keys, self.values = (
                [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)] for _ in range(2)
            )

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sample."""
        return tuple(self._lengths)

    @property
    def length(self) -> int:
        """Tokens of the longest sample."""
        return max(self._lengths)

    @property
    def nbytes(self) -> int:
        """Memory of keys and values, used or not."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def append(self, tokens: int, lengths: Lengths | None = None, mask: Mask | None = None) -> Extension:
        """Prepares for new tokens; nothing changes until their `Extension.commit`.

        Args:
            tokens: of each sample.
            lengths: how many of them are real, the first ones; all by default.
            mask: who sees whom; what it was by default, which is `Causal()` in the beginning.

        Raises:
            CacheFullError: they are too many.
            ConfigError: another number of samples; a mask that does not fit, or under which an earlier token would see
                a new one, though what it became is in the cache already.
        """
        counts = [tokens] * len(self._lengths) if lengths is None else _integers(lengths)
        if len(counts) != len(self._lengths) or not all(0 <= count <= tokens for count in counts):
            expected, fix = f"{len(self._lengths)} numbers from 0 to {tokens}", "count the real tokens of each sample"
            raise ConfigError("lengths", expected=expected, got=f"{counts}", fix=fix)
        need = max(map(int.__add__, self._lengths, counts))
        if need > self.max_len:
            raise CacheFullError(self.max_len, need)
        if mask is not None and mask != self.mask:
            self._check_mask(mask)
        return Extension(self, self.mask if mask is None else mask, counts)

    def crop(self, lengths: int | Lengths) -> None:
        """Forgets the last tokens.

        Args:
            lengths: tokens that stay, of each sample or of every one.

        Raises:
            ConfigError: another number of samples, or more tokens than there are.
        """
        keep = [lengths] * len(self._lengths) if isinstance(lengths, int) else [int(length) for length in lengths]
        if len(keep) != len(self._lengths) or not all(
            0 <= n <= have for n, have in zip(keep, self._lengths, strict=True)
        ):
            expected, fix = f"at most {list(self._lengths)} tokens of the samples", "crop to tokens that are there"
            raise ConfigError("crop", expected=expected, got=f"{lengths}", fix=fix)
        for sample, (n, have) in enumerate(zip(keep, self._lengths, strict=True)):
            if n < have:
                # A weight of 0 times an infinity that was kept would be no number.
                for tensor in (*self.keys, *self.values):
                    tensor[sample, :, n:have] = 0
        self._lengths = keep

    def reorder(self, samples: Lengths) -> None:
        """Puts samples in another order, again and again or not at all, as beam search and resampling do.

        Args:
            samples: for each sample from now on, which it was; there may be more or fewer than before.

        Raises:
            ConfigError: a sample that is not there, or none; a mask that is made for the samples as they are.
        """
        batch, before = _integers(samples), len(self._lengths)
        if not batch or not all(0 <= sample < before for sample in batch):
            expected, fix = f"numbers from 0 to {before - 1}, one or more", "number the samples from 0"
            raise ConfigError("samples", expected=expected, got=f"{batch}", fix=fix)
        if self.mask.shape[0] not in (None, 1):
            fix = "make a cache for the samples in their new order"
            raise ConfigError("reorder", expected="a mask for any sample", got="one for these", fix=fix)
        index, used = torch.tensor(batch, device=self.keys[0].device), self.length
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                chosen = old[:, :, :used].index_select(0, index)
                if len(batch) != before:
                    with torch.inference_mode(False):
                        tensors[layer] = old.new_zeros(len(batch), *old.shape[1:])
                tensors[layer][:, :, :used] = chosen
        self._lengths = [self._lengths[sample] for sample in batch]

    def check(self, batch: int, layers: int, kv_heads: int, head_dim: int, device: torch.device) -> None:
        """Raises a `ConfigError` unless it was made for such a backbone and so many samples."""
        first = self.keys[0]
        have, need = (len(self.keys), *first.shape[:2], first.shape[3]), (layers, batch, kv_heads, head_dim)
        if have != need or first.device != device:
            expected = "one for {} layers, {} samples, {} heads of {} numbers on {}".format(*need, device)
            got = "{}, {}, {} of {} on {}".format(*have, first.device)
            raise ConfigError("cache", expected=expected, got=got, fix="make it with new_cache(batch, max_len)")

    def turns(
        self, size: int, base: float, stretch: RopeStretch | None, layout: RopeLayout
    ) -> tuple[Float[Tensor, "1 slots size"], Float[Tensor, "1 slots size"]]:
        """What `rotate` needs for all slots; made once."""
        key = size, base, stretch, layout
        if key not in self._tables:
            with torch.inference_mode(False):
                slots = torch.arange(self.max_len, device=self.keys[0].device)[None]
                own, other = turns(*rope_tables(slots, size, base, stretch), layout)
                self._tables[key] = own[:, 0], other[:, 0]
        return self._tables[key]

    def _check_mask(self, mask: Mask) -> None:
        if any(self._lengths):
            fix = "leave the mask out, or crop the cache to 0 tokens first"
            raise ConfigError("mask", expected="the cache's own", got="another", fix=fix)
        if mask.real(range(1)) is not None:
            fix = "give the lengths by themselves: prefill(x, lengths=...)"
            raise ConfigError("mask", expected="one without padding", got=type(mask).__name__, fix=fix)


class Extension:
    """New tokens, on their way through all layers into a cache.

    Attributes:
        cache: where they go.
        mask: who sees whom.
        layer: the one where they are.
        tokens: of the sample that gets most of them.
        start: index of the first one, where it is the same in all samples, or None.
        stop: one more than the largest index of any.
    """

    def __init__(self, cache: KVCache, mask: Mask, counts: list[int]) -> None:
        before = cache._lengths
        self.tokens, least, first = max(counts), min(before), max(before)
        self.cache, self.mask, self.layer, self._counts = cache, mask, 0, counts
        self._after = list(map(int.__add__, before, counts))
        self.stop = max(self._after)
        self._even = min(counts) == self.tokens
        self.start = first if least == first else None
        self._device = cache.keys[0].device
        self._bias: tuple[range, Tensor] | None = None
        # One new token that sees everything is all there is to most steps, which should not wait for what follows.
        self._all = self.start is not None and self.tokens == 1 and self._even and type(mask) is Causal
        if self._all:
            return
        mask.check(len(before), first + self.tokens)
        for start in {*before}:
            self._check_past(start)
        if self.start is not None:
            one = range(self.start, self.stop)
            self._all = self._even and len(one) == 1 and mask.kind(one, range(self.stop)) is Kind.FULL
            self._rule = Rule(mask if self._even else mask & KeyPadding(self._tensor(self._after)))
        else:
            self._starts = self._tensor(before)

    def rows(self, table: Float[Tensor, "1 slots size"]) -> Float[Tensor, "#batch tokens size"]:
        """The rows of a table that belong to the new tokens' indices."""
        if self.start is not None:
            return table.narrow(1, self.start, self.tokens)
        index = self._starts[:, None] + torch.arange(self.tokens, device=self._device)
        # Padding may lie beyond the end.
        return table[0, index.clamp_(max=table.shape[1] - 1)]

    def chunk(self, tokens: int) -> int:
        """How many tokens to compute at a time, at most `tokens`."""
        return min(tokens, _RAGGED_CHUNK) if self.start is None else tokens

    def real(self) -> Tensor | None:
        """Which new tokens are real, shape (batch, tokens, 1); None for all."""
        if self._even:
            return None
        return (torch.arange(self.tokens, device=self._device) < self._tensor(self._counts)[:, None])[..., None]

    def write(self, rows: range, k: Float[Tensor, "B G Q E"], v: Float[Tensor, "B G Q E"]) -> None:
        """Takes keys and values of the layer, for a stretch of the new tokens."""
        for kept, new in ((self.cache.keys[self.layer], k), (self.cache.values[self.layer], v)):
            if self._even and self.start is not None:
                kept.narrow(2, self.start + rows.start, len(rows)).copy_(new)
            elif self._even and self.tokens == 1:
                kept[torch.arange(len(new), device=self._device), :, self._starts] = new[:, :, 0].to(kept.dtype)
            else:
                for sample, (start, count) in enumerate(zip(self.cache._lengths, self._counts, strict=True)):
                    n = min(max(count - rows.start, 0), len(rows))
                    first = start + rows.start
                    kept[sample, :, first : first + n] = new[sample, :, :n]

    def attend(self, rows: range, q: Float[Tensor, "B H Q E"]) -> Float[Tensor, "B H Q E"]:
        """What a stretch of the new tokens gets from all tokens that it sees, when all are written."""
        keys, values = self.cache.keys[self.layer], self.cache.values[self.layer]
        k, v = keys.narrow(2, 0, self.stop), values.narrow(2, 0, self.stop)
        given = q.dtype
        if given != k.dtype:
            q = q.to(k.dtype)
        if self._all or self.start is None:
            bias, grouped = None if self._all else self._ragged(rows, q), q.shape[1] != k.shape[1]
            o = functional.scaled_dot_product_attention(q, k, v, bias, enable_gqa=grouped)
        else:
            queries = range(self.start + rows.start, self.start + rows.stop)
            o = attend(q, k, v, self._rule, queries, range(self.stop))[0]
        return o if o.dtype == given else o.to(given)

    def commit(self) -> None:
        """The new tokens are in the cache from now on."""
        self.cache._lengths, self.cache.mask = self._after, self.mask

    def _ragged(self, rows: range, q: Tensor) -> Tensor:
        """What is added to the scores, shape (batch, 1, rows, keys); made once for all layers."""
        if self._bias is None or self._bias[0] != rows:
            keys, starts = range(self.stop), self.cache._lengths
            by_start = {}
            for start in set(starts):
                seen = self.mask.visible(range(start + rows.start, start + rows.stop), keys, self._device)
                by_start[start] = seen.expand(len(starts), -1, -1)
            seen = torch.stack([by_start[start][sample] for sample, start in enumerate(starts)])
            seen = seen & (torch.arange(self.stop, device=self._device) < self._tensor(self._after)[:, None, None])
            bias = torch.zeros(seen.shape, dtype=q.dtype, device=self._device).masked_fill_(~seen, float("-inf"))
            self._bias = rows, bias[:, None]
        return self._bias[1]

    def _check_past(self, start: int) -> None:
        new = range(start, start + self.tokens)
        if not start or not new or self.mask.kind(range(start), new) is Kind.EMPTY:
            return
        for past in blocks(range(start), 1024):
            if self.mask.kind(past, new) is not Kind.EMPTY and bool(self.mask.visible(past, new).any()):
                got, fix = f"one that sees token {new.start} or a later one", "give such tokens together, a whole frame"
                raise ConfigError("cache", expected="no earlier token that sees new ones", got=got, fix=fix)

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, device=self._device)


def _integers(numbers: Lengths) -> list[int]:
    return [int(number) for number in (numbers.tolist() if isinstance(numbers, Tensor) else numbers)]
