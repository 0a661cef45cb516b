"""Pictures to features: encoders as plain modules that take frames as they were recorded and give one vector for each.

`pca` is the first principal components of the pixels; `conv` a small convolutional network, untrained or trained on
one's own frames; `resnet` and `clip` are networks of others, read from local files, see `offbook.models.pretrained`.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from offbook.errors import CheckpointError, ConfigError, OffbookError, check_settings
from offbook.runs.checkpoint import load_checkpoint, save_checkpoint
from offbook.runs.config import from_json, to_json

KIND = "encoder"

Images = UInt8[Tensor, "batch height width 3"]
Planes = Float[Tensor, "batch 3 height width"]


class Encoder(nn.Module, ABC):
    """What every encoder has.

    Attributes:
        kind: the word in its record by which `build_encoder` knows it.
        size: numbers D of a picture's features.
    """

    kind: str
    size: int

    @abstractmethod
    def forward(self, images: Images) -> Float[Tensor, "batch size"]:
        """The features of frames of any height and width; float32."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """What `build_encoder` builds the like from, as JSON types: `kind` and the sizes."""


def planes(images: Images, side: int, mode: str = "bilinear") -> Planes:
    """Frames as channels in [0, 1], scaled to a square. The whole picture stays in view, however long its sides were.

    Args:
        images: frames.
        side: height and width of the result in pixels.
        mode: how values in between are found, bilinear or bicubic.
    """
    x = images.permute(0, 3, 1, 2).float() / 255
    if x.shape[2:] == (side, side):
        return x
    return functional.interpolate(x, (side, side), mode=mode, antialias=True, align_corners=False).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class PcaSizes:
    """Of `PixelPca`.

    Attributes:
        side: to which frames are scaled, in pixels.
        size: number of components.
    """

    side: int = 32
    size: int = 128

    def __post_init__(self) -> None:
        numbers = 3 * self.side**2
        checks = {
            "side": (4 <= self.side <= 256, "4 to 256 pixels"),
            "size": (1 <= self.size <= min(numbers, 4_096), f"1 to {min(numbers, 4_096)}"),
        }
        check_settings(self, checks)


class PixelPca(Encoder):
    """How far a frame is from the mean one along the directions in which frames differ most.

    Args:
        sizes: see `PcaSizes`.

    Attributes:
        explained: share of the variance that the components have; after `fit`.

    Example:
        >>> frames = torch.randint(256, (40, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        >>> encoder = PixelPca(PcaSizes(side=8, size=5)).fit(frames, torch.Generator().manual_seed(0))
        >>> encoder(frames).shape
        torch.Size([40, 5])
    """

    kind = "pca"
    mean: Tensor
    components: Tensor

    def __init__(self, sizes: PcaSizes) -> None:
        super().__init__()
        self.sizes, self.size, self.explained = sizes, sizes.size, math.nan
        self.register_buffer("mean", torch.zeros(3 * sizes.side**2))
        self.register_buffer("components", torch.zeros(3 * sizes.side**2, sizes.size))

    @torch.no_grad()
    def fit(self, images: Images, rng: torch.Generator) -> PixelPca:
        """Finds the components of some frames, more of them than there are components.

        Source: Halko et al., "Finding Structure with Randomness" (2011), algorithms 4.4 and 5.1; two powers.
        """
        x = planes(images, self.sizes.side).flatten(1)
        fix = "give more frames, or ask for fewer components"
        if len(x) <= self.size:
            raise ConfigError("pca", expected=f"more than {self.size} frames", got=str(len(x)), fix=fix)
        self.mean.copy_(x.mean(0))
        x = x - self.mean
        width = min(self.size + 16, *x.shape)
        basis = torch.linalg.qr(x @ torch.randn(x.shape[1], width, generator=rng).to(x.device)).Q
        for _ in range(2):
            basis = torch.linalg.qr(x @ torch.linalg.qr(x.T @ basis).Q).Q
        directions = torch.linalg.svd(basis.T @ x, full_matrices=False).Vh
        self.components.copy_(directions[: self.size].T)
        self.explained = float((x @ self.components).square().sum() / x.square().sum())
        return self

    def forward(self, images: Images) -> Float[Tensor, "batch size"]:
        """The features."""
        return (planes(images, self.sizes.side).flatten(1) - self.mean) @ self.components

    def record(self) -> dict[str, Any]:
        """What `build_encoder` builds the like from."""
        return {"kind": self.kind, **to_json(self.sizes)}


@dataclass(frozen=True, kw_only=True)
class ConvSizes:
    """Of `SmallConv`.

    Attributes:
        side: to which frames are scaled, in pixels, a multiple of 16.
        width: channels of the first layer; the others have twice as many.
        size: numbers of the features.
    """

    side: int = 64
    width: int = 32
    size: int = 128

    def __post_init__(self) -> None:
        checks = {
            "side": (32 <= self.side <= 512 and self.side % 16 == 0, "a multiple of 16 from 32 to 512"),
            "width": (4 <= self.width <= 1_024 and self.width % 4 == 0, "a multiple of 4 from 4 to 1024"),
            "size": (1 <= self.size <= 4_096, "1 to 4096"),
        }
        check_settings(self, checks)


class SmallConv(Encoder):
    """Three convolutions, the last one at a sixteenth of the resolution, and a linear map of all that is left.

    Nothing is averaged over the picture, for a robot wants to know where things are. Channels are normalised within a
    picture, so that features do not depend on what else is in a batch.

    Args:
        sizes: see `ConvSizes`.

    Example:
        >>> encoder = SmallConv(ConvSizes(width=4, size=10))
        >>> encoder(torch.zeros(2, 48, 64, 3, dtype=torch.uint8)).shape
        torch.Size([2, 10])
    """

    kind = "conv"

    def __init__(self, sizes: ConvSizes) -> None:
        super().__init__()
        self.sizes, self.size, w = sizes, sizes.size, sizes.width
        layers: list[nn.Module] = [nn.Conv2d(3, w, 6, stride=4, padding=1)]
        for channels in (w, 2 * w):
            layers += [nn.GroupNorm(4, channels), nn.ReLU(), nn.Conv2d(channels, 2 * w, 3, stride=2, padding=1)]
        self.layers = nn.Sequential(*layers, nn.GroupNorm(4, 2 * w), nn.ReLU(), nn.Flatten())
        self.output = nn.Linear(2 * w * (sizes.side // 16) ** 2, sizes.size)

    def features(self, x: Planes) -> Float[Tensor, "batch size"]:
        """Of channels in [0, 1] that are as large as the network wants them."""
        out: Tensor = self.output(self.layers(2 * x - 1))
        return out.float()

    def forward(self, images: Images) -> Float[Tensor, "batch size"]:
        """The features."""
        return self.features(planes(images, self.sizes.side))

    def record(self) -> dict[str, Any]:
        """What `build_encoder` builds the like from."""
        return {"kind": self.kind, **to_json(self.sizes)}


def build_encoder(record: Mapping[str, Any]) -> Encoder:
    """An encoder of the recorded sizes, on whatever device is the default, whose weights mean nothing yet.

    Args:
        record: what `Encoder.record` gave, or the like from a stranger.

    Raises:
        ConfigError: it is no encoder, or its sizes are out of their range.
        MissingExtraError: it wants a library that is not installed.
    """
    sizes = {name: value for name, value in record.items() if name != "kind"}
    kind = record.get("kind")
    if kind == PixelPca.kind:
        return PixelPca(from_json(PcaSizes, sizes, "encoder"))
    if kind == SmallConv.kind:
        return SmallConv(from_json(ConvSizes, sizes, "encoder"))
    if kind in ("resnet", "clip"):
        from offbook.models.pretrained import ClipSizes, ClipVision, ResNet, ResNetSizes

        if kind == "resnet":
            return ResNet(from_json(ResNetSizes, sizes, "encoder"))
        return ClipVision(from_json(ClipSizes, sizes, "encoder"))
    fix = "save the encoder again"
    raise ConfigError("encoder record", expected="pca, conv, resnet or clip", got=repr(kind)[:60], fix=fix)


def save_encoder(path: Path, encoder: Encoder, facts: Mapping[str, Any]) -> None:
    """Writes an encoder as one file.

    Args:
        path: the file.
        encoder: what to keep.
        facts: JSON types: where it is from.
    """
    save_checkpoint(path, KIND, encoder.state_dict(), {**facts, "encoder": encoder.record()})


def load_encoder(path: Path | str) -> Encoder:
    """Reads an encoder: one of ours, or another's network; see `offbook.models.pretrained.load_pretrained`.

    Args:
        path: a run folder of `offbook train encoder` or its checkpoint; a folder of the library transformers; or a file
            with a network's weights.

    Returns:
        The encoder in evaluation mode, on the CPU; its weights want no gradients.

    Raises:
        CheckpointError: there is none, or it is not what it claims to be.
    """
    path = Path(path)
    ours = path / "checkpoints" / "last.safetensors" if path.is_dir() else path
    if path.is_dir() and (path / "checkpoints").is_dir() and not ours.is_file():
        fix, got = "finish the training with --resume", "a run that has not saved one yet"
        raise CheckpointError(str(path), expected="a trained encoder", got=got, fix=fix)
    if not (ours.is_file() and _is_ours(ours)):
        from offbook.models.pretrained import load_pretrained

        return frozen(load_pretrained(path))
    checkpoint = load_checkpoint(ours, KIND)
    try:
        with torch.device("meta"):
            encoder = build_encoder(checkpoint.record["encoder"])
        encoder.load_state_dict(dict(checkpoint.values), assign=True)
    except (OffbookError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        got = f"another one ({str(error).strip().splitlines()[0][:200]})"
        raise CheckpointError(str(ours), expected="an encoder", got=got, fix="train the encoder again") from error
    return frozen(encoder)


def _is_ours(file: Path) -> bool:
    """Whether it says of itself that offbook wrote it, in the first bytes of its head."""
    with file.open("rb") as stream:
        head = stream.read(8 + (1 << 16))[8:]
    return b'"__metadata__":{"offbook":' in head.replace(b" ", b"")


def frozen(encoder: Encoder) -> Encoder:
    """The same in evaluation mode, without gradients."""
    return encoder.eval().requires_grad_(False)


def encoder_digest(encoder: Encoder) -> str:
    """SHA-256 of an encoder's record and weights: two with the same digest give the same features."""
    whole = hashlib.sha256(json.dumps(encoder.record(), sort_keys=True).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        whole.update(name.encode() + tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()
