"""Other views of the same picture, made on the device that trains: crops, colours, blur; all of a batch at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from offbook.errors import check_settings

# From red, green and blue to brightness and two axes of colour (YIQ), in which a hue is an angle.
_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How much a view may differ from the picture.

    Attributes:
        crop: least share of the picture's area that stays in view, above 0; 1 never crops.
        colour: largest change of brightness, contrast and saturation as a share; hues turn by a quarter as much.
        grey: share of the views without colour.
        blur: share of the views that are blurred.

    Source: Grill et al., "Bootstrap Your Own Latent" (2020), appendix B, but for flips and solarisation: a robot must
        know left from right. Theirs are crops from 0.08 on, colours of 0.4, 0.2 grey.
    """

    crop: float = 0.6
    colour: float = 0.4
    grey: float = 0.1
    blur: float = 0.3

    def __post_init__(self) -> None:
        checks = {
            "crop": (0 < self.crop <= 1, "a share above 0, at most 1"),
            "colour": (0 <= self.colour < 1, "a share in [0, 1)"),
            "grey": (0 <= self.grey <= 1, "a share"),
            "blur": (0 <= self.blur <= 1, "a share"),
        }
        check_settings(self, checks, "--augmentation.")


def augment(
    images: UInt8[Tensor, "batch height width 3"], side: int, how: Augmentation, rng: torch.Generator
) -> Float[Tensor, "batch 3 side side"]:
    """A random view of each picture, each with its own numbers.

    Args:
        images: frames, on any device.
        side: height and width of the views in pixels.
        how: see `Augmentation`.
        rng: on the CPU; the views are a function of it.

    Returns:
        Values in [0, 1], on the device of the frames.
    """
    x = images.permute(0, 3, 1, 2).float() / 255
    x = _recoloured(_cropped(x, side, how.crop, rng), how, rng)
    return _blurred(x, how.blur, rng)


def _uniform(rng: torch.Generator, like: Tensor, low: float | int, high: float | int) -> Float[Tensor, " batch"]:
    return (low + (high - low) * torch.rand(len(like), generator=rng)).to(like.device)


def _cropped(x: Tensor, side: int, least: float, rng: torch.Generator) -> Tensor:
    """A rectangle of random area, shape and place, scaled to a square."""
    area, shape = _uniform(rng, x, least, 1), _uniform(rng, x, math.log(3 / 4), math.log(4 / 3)).exp()
    shape = torch.where(area < 1, shape, 1)
    # Half the sides of the rectangle, where the picture reaches from -1 to 1.
    height, width = (area / shape).sqrt().clamp(max=1), (area * shape).sqrt().clamp(max=1)
    down, right = _uniform(rng, x, -1, 1) * (1 - height), _uniform(rng, x, -1, 1) * (1 - width)
    nothing = torch.zeros_like(area)
    maps = torch.stack([width, nothing, right, nothing, height, down], 1).reshape(-1, 2, 3)
    grid = functional.affine_grid(maps, [len(x), 3, side, side], align_corners=False)
    return functional.grid_sample(x, grid, padding_mode="border", align_corners=False)


def _recoloured(x: Tensor, how: Augmentation, rng: torch.Generator) -> Tensor:
    """Brightness, contrast, saturation and hue, as one linear map of the colours of each picture."""
    most = how.colour
    brightness, contrast, saturation = (_uniform(rng, x, 1 - most, 1 + most) for _ in range(3))
    angle = _uniform(rng, x, -1, 1) * (math.pi * most / 4)
    saturation = saturation * (_uniform(rng, x, 0, 1) >= how.grey)
    to, mean = torch.tensor(_YIQ, device=x.device), x.mean((2, 3), keepdim=True).mean(1, keepdim=True)
    cos, sin, nothing = saturation * angle.cos(), saturation * angle.sin(), torch.zeros_like(angle)
    one = torch.ones_like(angle)
    turn = torch.stack([one, nothing, nothing, nothing, cos, -sin, nothing, sin, cos], 1).reshape(-1, 3, 3)
    maps = torch.linalg.inv(to) @ turn @ to
    x = (maps @ x.flatten(2)).reshape(x.shape)
    scale = contrast[:, None, None, None]
    return (brightness[:, None, None, None] * (scale * x + (1 - scale) * mean)).clamp(0, 1)


def _blurred(x: Tensor, share: float, rng: torch.Generator) -> Tensor:
    """Gaussian blur of random width, by rows and then by columns, where the dice say so."""
    chosen = _uniform(rng, x, 0, 1) < share
    # Widths of 0.1 to 2 pixels of 224, as is usual; a tenth of the side is looked at.
    width = (_uniform(rng, x, 0.1, 2) * x.shape[2] / 224 + 1e-3)[chosen]
    reach, count = max(1, x.shape[2] // 20), 3 * len(width)
    if not count:
        return x
    place = torch.arange(-reach, reach + 1, device=x.device)
    weight = torch.exp(-0.5 * (place / width[:, None]) ** 2)
    weight = (weight / weight.sum(1, keepdim=True)).repeat_interleave(3, 0)
    y = functional.pad(x[chosen].reshape(1, count, *x.shape[2:]), [reach] * 4, mode="reflect")
    y = functional.conv2d(y, weight[:, None, None, :], groups=count)
    y = functional.conv2d(y, weight[:, None, :, None], groups=count)
    return x.index_put((chosen,), y.reshape(-1, *x.shape[1:]))
