"""Where a token stands: rotary embedding of queries and keys in both layouts that are in use."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

RopeLayout = Literal["half", "pairs"]


@dataclass(frozen=True, kw_only=True)
class RopeStretch:
    """Longer wavelengths, for contexts longer than those of the first training, as Llama 3.1 and later have them.

    Attributes:
        factor: of wavelengths longer than `tokens / low`; those between that and `tokens / high` grow by less.
        low: wavelengths in `tokens`.
        high: wavelengths in `tokens`, more than `low`; shorter ones stay.
        tokens: of the first training.
    """

    factor: float
    low: float
    high: float
    tokens: int


def rope_tables(
    positions: Int64[Tensor, "#batch tokens"], size: int, base: float = 10_000.0, stretch: RopeStretch | None = None
) -> tuple[Float[Tensor, "#batch tokens pairs"], Float[Tensor, "#batch tokens pairs"]]:
    """Cosine and sine of position * base^(-2i / size) for i = 0 to size / 2 - 1, float32.

    Args:
        positions: of the tokens; they need not be in a row, nor begin at 0.
        size: numbers of a head that are rotated, even.
        base: of the wavelengths, which go from 2 pi tokens to 2 pi * base.
        stretch: which of them are made longer; None for none.

    Source: Su et al., "RoFormer" (2021), section 3.2.2.
    """
    # In float64, because an angle of a far position has few digits left in float32.
    rates = torch.logspace(0, 2 / size - 1, size // 2, base, dtype=torch.float64, device=positions.device)
    if stretch is not None:
        kept = (stretch.tokens * rates / (2 * math.pi) - stretch.low) / (stretch.high - stretch.low)
        kept = kept.clamp(0, 1)
        rates = rates * (kept + (1 - kept) / stretch.factor)
    angles = positions[..., None] * rates
    return angles.cos().float(), angles.sin().float()


def turns(
    cos: Float[Tensor, "#batch tokens pairs"],
    sin: Float[Tensor, "#batch tokens pairs"],
    layout: RopeLayout,
) -> tuple[Float[Tensor, "#batch 1 tokens rotated"], Float[Tensor, "#batch 1 tokens rotated"]]:
    """What `rotate` multiplies each number of a head by, and what its partner.

    Args:
        cos: of `rope_tables`.
        sin: of `rope_tables`.
        layout: which two numbers make a pair: `"half"`, number i and number i + pairs, as in GPT-NeoX and Llama;
            `"pairs"`, numbers 2i and 2i + 1, as in GPT-J.
    """
    cos, sin = cos[:, None], sin[:, None]
    if layout == "half":
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    return torch.stack([cos, cos], -1).flatten(-2), torch.stack([-sin, sin], -1).flatten(-2)


def rotate(
    x: Float[Tensor, "batch heads tokens size"],
    own: Float[Tensor, "#batch 1 tokens rotated"],
    other: Float[Tensor, "#batch 1 tokens rotated"],
    layout: RopeLayout,
) -> Float[Tensor, "batch heads tokens size"]:
    """Rotates the first numbers of each head; the others stay.

    Args:
        x: queries or keys.
        own: of `turns`.
        other: of `turns`.
        layout: as given to `turns`.
    """
    rotated = own.shape[-1]
    if x.shape[-1] > rotated:
        return torch.cat([rotate(x[..., :rotated], own, other, layout), x[..., rotated:]], -1)
    own, other = own.to(x.dtype), other.to(x.dtype)
    # Whole heads at once: halves by themselves would take twice as many operations, and more than that backwards.
    if layout == "half":
        partners = x.roll(rotated // 2, -1)
    else:
        partners = x.view(*x.shape[:-1], rotated // 2, 2).flip(-1).flatten(-2)
    return torch.addcmul(x * own, partners, other)
