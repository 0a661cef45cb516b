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
    rates = base ** (-torch.arange(0, size, 2, dtype=torch.float64, device=positions.device) / size)
    if stretch is not None:
        kept = (stretch.tokens * rates / (2 * math.pi) - stretch.low) / (stretch.high - stretch.low)
        kept = kept.clamp(0, 1)
        rates = rates * (kept + (1 - kept) / stretch.factor)
    angles = positions[..., None] * rates
    return angles.cos().float(), angles.sin().float()


def rotate(
    x: Float[Tensor, "batch heads tokens size"],
    cos: Float[Tensor, "#batch tokens pairs"],
    sin: Float[Tensor, "#batch tokens pairs"],
    layout: RopeLayout = "half",
) -> Float[Tensor, "batch heads tokens size"]:
    """Rotates the first 2 * pairs numbers of each head; the others stay.

    Args:
        x: queries or keys.
        cos: of `rope_tables`.
        sin: of `rope_tables`.
        layout: which two numbers make a pair: `"half"`, number i and number i + pairs, as in GPT-NeoX and Llama;
            `"pairs"`, numbers 2i and 2i + 1, as in GPT-J.
    """
    pairs = cos.shape[-1]
    if x.shape[-1] > 2 * pairs:
        return torch.cat([rotate(x[..., : 2 * pairs], cos, sin, layout), x[..., 2 * pairs :]], -1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    a, b = x.chunk(2, -1) if layout == "half" else (x[..., 0::2], x[..., 1::2])
    turned = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)
    return torch.cat(turned, -1) if layout == "half" else torch.stack(turned, -1).flatten(-2)
