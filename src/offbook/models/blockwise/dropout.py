"""Dropout whose mask is a function of the seed and the indices alone.

So a block that is computed twice, cut elsewhere or computed by another process drops the same numbers.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


def kept(seed: int, rate: float, *indices: Int64[Tensor, "*#shape"]) -> Bool[Tensor, "*shape"]:
    """Which numbers stay.

    Args:
        seed: of this use of dropout.
        rate: share of numbers to drop, in [0, 1).
        indices: of the numbers along each dimension, of shapes that broadcast.

    Returns:
        Booleans of the broadcast shape.
    """
    bits = torch.tensor(_signed(seed ^ seed >> 32), dtype=torch.int32, device=indices[0].device)
    for index in indices:
        bits = _mixed(bits * -1640531535 + index.to(torch.int32))
    # The lowest 32-bit integers, as many as the share of those to drop.
    return bits >= int(-(2**31) + rate * 2**32)


def dropped(
    x: Float[Tensor, "batch tokens size"], seed: int, rate: float, indices: Int64[Tensor, " tokens"]
) -> Float[Tensor, "batch tokens size"]:
    """Drops numbers of some tokens of a sequence, and makes the others larger so that the mean stays.

    Args:
        x: the tokens.
        seed: of this use of dropout.
        rate: share of numbers to drop, in [0, 1); with 0, `x` itself comes back.
        indices: of the tokens in the whole sequence.
    """
    if not rate:
        return x
    batch, size = (torch.arange(n, device=x.device) for n in (x.shape[0], x.shape[2]))
    keep = kept(seed, rate, batch[:, None, None], indices[:, None], size)
    scale = 1 / (1 - rate)
    # One product forwards and one backwards; in half precision the scale by itself would be rounded.
    return x * keep.to(x.dtype).mul_(scale) if x.dtype.itemsize > 2 else x * keep * scale


def _mixed(x: Tensor) -> Tensor:
    """An integer hash in place: each bit of the input flips each bit of the result about half of the time."""
    # Shifts of negative integers would bring in ones; the masks take them out.
    x = x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    x = x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_signed(0x846CA68B))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def _signed(x: int) -> int:
    """The signed integer with the same 32 bits."""
    return (x + 2**31) % 2**32 - 2**31
