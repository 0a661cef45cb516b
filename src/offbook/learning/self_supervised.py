"""Networks that learn to see from one's own recordings, without labels: two views of a frame shall look alike.

BYOL foretells what a slow copy of the network makes of the other view. MoCo picks that out among what the slow copy
made of earlier frames. What is kept is the encoder; what stands behind it in training is thrown away.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from offbook.data.store import EpisodeStore
from offbook.errors import ConfigError, DataError, check_settings, nearest
from offbook.learning.augmentation import Augmentation, augment
from offbook.learning.fit import FitConfig, fit
from offbook.learning.recordings import choose_episodes
from offbook.models.encoders import (
    ConvSizes,
    Encoder,
    PcaSizes,
    PixelPca,
    SmallConv,
    frozen,
    load_encoder,
    save_encoder,
)
from offbook.runs.directory import RunDirectory
from offbook.runs.seeding import generator, torch_generator

Method = Literal["byol", "moco", "pca", "random"]

# Frames that principal components are found from.
_LOOKED = 4_096


def _fit() -> FitConfig:
    return FitConfig(steps=1_000, batch_size=96, learning_rate=1e-3, weight_decay=1e-4, warmup=50, clip_norm=1.0)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """How to get an encoder from recordings.

    Attributes:
        method: byol or moco, which learn; pca, principal components of the pixels; random, a network as it begins.
        cameras: whose frames are looked at; None for all.
        side: to which frames are scaled, in pixels.
        width: channels of the network's first layer.
        size: numbers of the features.
        hidden: width of the layers behind the encoder while it learns.
        momentum: share of itself that the slow copy keeps in a step; for BYOL it grows to 1.
        temperature: MoCo: of the softmax over frames.
        queue: MoCo: how many earlier frames to pick among.
        augmentation: how two views of a frame differ.
        save_every: steps between two savings of the encoder.
        fit: the training loop.

    Source: Grill et al., "Bootstrap Your Own Latent" (2020), section 3; He et al., "Momentum Contrast" (2020), with the
        two layers and the temperature of Chen et al., "Improved Baselines with Momentum Contrastive Learning" (2020).
        Their momenta, 0.996 and 0.999, are for a hundred times as many steps.
    """

    method: Method = "byol"
    cameras: tuple[str, ...] | None = None
    side: int = 64
    width: int = 32
    size: int = 128
    hidden: int = 256
    momentum: float = 0.99
    temperature: float = 0.2
    queue: int = 2_048
    augmentation: Augmentation = field(default_factory=Augmentation)
    save_every: int = 500
    fit: FitConfig = field(default_factory=_fit)

    def __post_init__(self) -> None:
        known = self.method in get_args(Method)
        checks = {
            "method": (known, f"one of {', '.join(get_args(Method))}"),
            "hidden": (1 <= self.hidden <= 65_536, "1 to 65536"),
            "momentum": (0 <= self.momentum < 1, "a share in [0, 1)"),
            "temperature": (0 < self.temperature < math.inf, "a finite number above 0"),
            "queue": (1 <= self.queue <= 1_000_000, "1 to 1000000"),
            "save_every": (self.save_every >= 1, "1 or more"),
            # The slow copy moves by calls of the loss.
            "fit.accumulate": (self.fit.accumulate == 1, "1"),
            "fit.batch_size": (self.fit.batch_size >= 2, "2 or more"),
        }
        check_settings(self, checks)
        if self.method == "pca":
            PcaSizes(side=self.side, size=self.size)
        else:
            ConvSizes(side=self.side, width=self.width, size=self.size)


class TwoViews(nn.Module):
    """An encoder with what stands behind it while it learns, and the slow copy of both.

    Args:
        encoder: what shall learn, in place.
        config: which way.
    """

    calls: Tensor
    queue: Tensor
    place: Tensor

    def __init__(self, encoder: SmallConv, config: EncoderConfig) -> None:
        super().__init__()
        self.config, size, hidden = config, encoder.size, config.hidden
        batch_norm = config.method == "byol"
        self.fast = nn.ModuleDict({"encoder": encoder, "projector": _head(size, hidden, size, batch_norm)})
        self.slow = copy.deepcopy(self.fast).requires_grad_(False)
        self.predictor = _head(size, hidden, size, True) if config.method == "byol" else None
        self.register_buffer("calls", torch.zeros(()))
        if config.method == "moco":
            self.register_buffer("queue", functional.normalize(torch.randn(config.queue, size), dim=1))
            self.register_buffer("place", torch.zeros((), dtype=torch.int64))

    @property
    def encoder(self) -> SmallConv:
        """What has learnt."""
        return _encoder_of(self.fast)

    def forward(
        self, images: UInt8[Tensor, "batch height width 3"], rng: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and how far the features spread: 1 where all directions are used alike, 0 where all are the same.

        While training, each call moves the slow copy.
        """
        if self.training:
            self._follow()
        side, how = self.config.side, self.config.augmentation
        first, second = (augment(images, side, how, rng) for _ in range(2))
        return self._byol(first, second) if self.predictor is not None else self._moco(first, second)

    @torch.no_grad()
    def _follow(self) -> None:
        momentum = self.config.momentum
        if self.predictor is not None:
            progress = min(1.0, float(self.calls) / self.config.fit.steps)
            momentum = 1 - (1 - momentum) * (math.cos(math.pi * progress) + 1) / 2
        for slow, fast in zip(self.slow.parameters(), self.fast.parameters(), strict=True):
            slow.lerp_(fast, 1 - momentum)
        self.calls += 1

    def _projected(self, part: nn.ModuleDict, x: Tensor) -> Float[Tensor, "batch size"]:
        out: Tensor = part["projector"](_encoder_of(part).features(x))
        return out

    def _byol(self, first: Tensor, second: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Both views foretell the other: 2 - 2 cos of what is foretold and what the slow copy made."""
        if self.predictor is None:
            raise TypeError("BYOL foretells")
        views = torch.cat([first, second])
        told = functional.normalize(self.predictor(self._projected(self.fast, views)), dim=1)
        with torch.no_grad():
            wanted = functional.normalize(self._projected(self.slow, views), dim=1)
        loss = 2 - 2 * (told * wanted.roll(len(first), 0)).sum(1)
        return 2 * loss.mean(), {"spread": _spread(wanted)}

    def _moco(self, first: Tensor, second: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The other view is to be picked out among those in the queue, which then takes it in."""
        asked = functional.normalize(self._projected(self.fast, first), dim=1)
        with torch.no_grad():
            key = functional.normalize(self._projected(self.slow, second), dim=1)
        right = (asked * key).sum(1, keepdim=True)
        logits = torch.cat([right, asked @ self.queue.T.clone()], 1) / self.config.temperature
        loss = functional.cross_entropy(logits, torch.zeros(len(first), dtype=torch.int64, device=logits.device))
        if self.training:
            size = len(self.queue)
            key_rows = key[-size:]
            rows = (self.place + torch.arange(len(key_rows), device=key.device)) % size
            self.queue[rows] = key_rows
            self.place.copy_((self.place + len(key_rows)) % size)
        return loss, {"spread": _spread(key)}


def _encoder_of(part: nn.ModuleDict) -> SmallConv:
    found = part["encoder"]
    if not isinstance(found, SmallConv):
        raise TypeError("the encoder is the one that was given")
    return found


def _head(size: int, hidden: int, out: int, batch_norm: bool) -> nn.Sequential:
    norm: list[nn.Module] = [nn.BatchNorm1d(hidden)] if batch_norm else []
    return nn.Sequential(nn.Linear(size, hidden), *norm, nn.ReLU(), nn.Linear(hidden, out))


@torch.no_grad()
def _spread(unit: Float[Tensor, "batch size"]) -> Tensor:
    return unit.std(0).mean() * math.sqrt(unit.shape[1])


class Frames:
    """The frames of a store that an encoder is made from.

    Args:
        store: the recordings.
        config: see `EncoderConfig`.

    Attributes:
        cameras: whose frames.
        episodes: numbers of the episodes, without those that the store holds out.

    Raises:
        ConfigError: the recordings have no such camera.
        DataError: they have no camera at all, or no episode with one.
    """

    def __init__(self, store: EpisodeStore, config: EncoderConfig) -> None:
        self.store, self.config = store, config
        self.cameras = chosen_cameras(store, config.cameras)
        self.episodes = choose_episodes(store, self.cameras, held_out=0.0)[0]
        starts, lengths = (store.episodes[name][self.episodes] for name in ("start", "length"))
        self._rows = np.concatenate([np.arange(a, a + n) for a, n in zip(starts, lengths, strict=True)])

    def draw(self, count: int, *names: str | int) -> UInt8[Tensor, "count height width 3"]:
        """Frames drawn evenly from all steps, of one camera; a function of the seed and the names."""
        rng = generator(self.config.fit.seed, "frames", *names)
        camera = self.cameras[int(rng.integers(len(self.cameras)))]
        rows = self._rows[rng.integers(len(self._rows), size=count)]
        return torch.from_numpy(np.ascontiguousarray(self.store.field(camera)[rows]))

    def batch(self, index: int) -> Mapping[str, Tensor]:
        """A batch for training."""
        return {"images": self.draw(self.config.fit.batch_size, index)}


def chosen_cameras(store: EpisodeStore, names: tuple[str, ...] | None) -> tuple[str, ...]:
    """The cameras that are meant: all of them, where none is named.

    Raises:
        ConfigError: the recordings have no such camera.
        DataError: they have none at all.
    """
    known = tuple(store.schema.observation_spec().cameras)
    if not known:
        fix = "record or import with pictures"
        raise DataError(str(store.path), expected="recordings with a camera", got="none", fix=fix)
    for name in names or ():
        if name not in known:
            expected = f"a camera of the recordings in {store.path}"
            got = f"none of {', '.join(known)}"
            raise ConfigError(f"--cameras {name}", expected=expected, got=got, fix=nearest(name, known))
    return tuple(names or known)


def train_encoder(store: EpisodeStore, config: EncoderConfig, run: RunDirectory, *, resume: bool = False) -> Encoder:
    """Makes an encoder of a store's frames and saves it as the run's checkpoint `last`.

    Args:
        store: the recordings.
        config: see `EncoderConfig`.
        run: where metrics and checkpoints go.
        resume: continue an interrupted training; on the CPU the result is equal to the last bit.

    Raises:
        ConfigError: the recordings have no such camera, or several processes were started.
        DataError: they have no camera at all.

    Source: see `EncoderConfig`.
    """
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        fix = "start offbook without torchrun"
        raise ConfigError("torchrun", expected="one process", got=str(processes), fix=fix)
    frames = Frames(store, config)
    if resume and config.method in ("pca", "random") and run.metrics():  # logged once it was saved
        return load_encoder(run.path)
    facts = {
        "method": config.method,
        "cameras": list(frames.cameras),
        "environment": store.schema.environment,
        "recordings": {"sha256": store.digest, "episodes": len(frames.episodes)},
    }
    if config.method == "pca":
        found = PixelPca(PcaSizes(side=config.side, size=config.size))
        found.fit(frames.draw(_LOOKED, "pca"), torch_generator(config.fit.seed, "pca"))
        return _kept(found, facts, run, explained=found.explained)
    with torch.random.fork_rng():
        torch.manual_seed(int(generator(config.fit.seed, "weights").integers(2**62)))
        encoder = SmallConv(ConvSizes(side=config.side, width=config.width, size=config.size))
        if config.method == "random":
            return _kept(encoder, facts, run)
        module = TwoViews(encoder, config)

    def keep(step: int, trained: nn.Module) -> Mapping[str, float]:
        save_encoder(run.checkpoint(), _encoder(trained), facts)
        return {}

    result = fit(
        module, frames.batch, lambda m, batch, rng: m(batch["images"], rng), config.fit, run, resume=resume,
        hooks=[(config.save_every, keep)],
    )  # fmt: skip
    return frozen(_encoder(result.module.cpu()))


def _encoder(module: nn.Module) -> SmallConv:
    if not isinstance(module, TwoViews):
        raise TypeError("fit hands on the module that it was given")
    return module.encoder


def _kept(encoder: Encoder, facts: Mapping[str, object], run: RunDirectory, **metrics: float) -> Encoder:
    """Saves what needs no training."""
    save_encoder(run.checkpoint(), frozen(encoder), facts)
    if not run.metrics():
        run.log(0, **metrics)
    run.close()
    return encoder
