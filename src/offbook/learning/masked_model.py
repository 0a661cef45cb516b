"""The masked trajectory model: fills in what is hidden of a window of states, returns and actions."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from offbook.errors import ConfigError, check_settings
from offbook.learning.masked_patterns import Visible
from offbook.learning.networks import INPUT_LIMIT, standard
from offbook.learning.trajectories import STATE
from offbook.models.blockwise import Backbone, BackboneConfig, Full, Segments

Kind = Literal["continuous", "bins", "index"]
Residual = Literal["forward_fill", "none"]

# The bins of a token reach so many deviations to both sides of the mean.
_BINS_REACH = 4.0


@dataclass(frozen=True, kw_only=True)
class Modality:
    """What a kind of value is to the model.

    Attributes:
        name: of the modality.
        size: numbers in a step's value; 1 for an index.
        kind: `"continuous"`, one token of a step's numbers; `"bins"`, a token for each number, which falls into one of
            `classes` bins of equal width; or `"index"`, one token for a number from 0 to `classes` - 1.
        classes: how many; 0 for continuous values.
        residual: whether a visible value comes with the changes in a step from the visible value before and to the one
            after, and the model tells the change from the last visible value where there is one; continuous only.
    """

    name: str
    size: int
    kind: Kind = "continuous"
    classes: int = 0
    residual: bool = False

    def __post_init__(self) -> None:
        right = {
            "kind": self.kind in get_args(Kind),
            "size": 1 <= self.size <= 65_536 and (self.kind != "index" or self.size == 1),
            "classes": self.classes == 0 if self.kind == "continuous" else 2 <= self.classes <= 65_536,
            "residual": not self.residual or self.kind == "continuous",
        }
        for name, sound in right.items():
            if not sound:
                got = f"{getattr(self, name)} for kind {self.kind!r}"
                where, fix = f"modality {self.name!r}, {name}", "change one of the two"
                raise ConfigError(where, expected="what its kind allows", got=got, fix=fix)

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.size if self.kind == "bins" else 1

    @property
    def features(self) -> int:
        """Numbers that tell a token."""
        return self.size if self.kind == "continuous" else self.classes

    @property
    def shown(self) -> int:
        """Numbers that a token shows: with the changes before and after it."""
        return 3 * self.size if self.residual else self.features

    @property
    def told(self) -> int:
        """Numbers that a head tells: a value, and a change."""
        return 2 * self.size if self.residual else self.features


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The size of a model.

    Attributes:
        length: steps T of a window.
        dim: size of a token, a multiple of `heads`.
        heads: of attention.
        encoder: layers over the visible tokens.
        decoder: layers over all tokens.
        dropout: share of the numbers dropped while training.
    """

    length: int = 4
    dim: int = 128
    heads: int = 4
    encoder: int = 2
    decoder: int = 1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        checks = {
            "length": (type(self.length) is int and 2 <= self.length <= 4_096, "2 to 4096 steps"),
            "heads": (1 <= self.heads <= 64, "1 to 64"),
            "dim": (
                2 <= self.dim <= 16_384 and self.dim % (2 * max(1, self.heads)) == 0,
                "up to 16384, a multiple of twice the heads",
            ),
            "encoder": (1 <= self.encoder <= 64, "1 to 64 layers"),
            "decoder": (1 <= self.decoder <= 64, "1 to 64 layers"),
            "dropout": (0 <= self.dropout < 1, "a share in [0, 1)"),
        }
        check_settings(self, checks, "--model.")


class MaskedTrajectoryModel(nn.Module):
    """An encoder over the visible tokens of a window and a decoder over all of them, both without a causal mask.

    Values go in as recorded; those of each continuous or binned modality are standardised inside, by statistics that
    are part of the module.

    Args:
        modalities: the kinds of value.
        sizes: of the network.

    Example:
        >>> state, action = Modality(name="state", size=3), Modality(name="action", size=2)
        >>> model = MaskedTrajectoryModel([state, action], Sizes(length=2, dim=16, heads=2))
        >>> data = {"state": torch.zeros(5, 2, 3), "action": torch.zeros(5, 2, 2)}
        >>> visible = {"state": torch.ones(5, 2, 1).bool(), "action": torch.zeros(5, 2, 1).bool()}
        >>> model(data, visible)["action"].shape
        torch.Size([5, 2, 1, 2])

    Source: Wu et al., "Masked Trajectory Models for Prediction, Representation, and Control" (2023), and the
    authors' code. Visible tokens are chosen for each sample; where `residual` is on, states and returns are shown and
    told with changes, in units of what they change by from step to step.
    """

    undecayed = ("encoder_mark.", "decoder_mark.")

    def __init__(self, modalities: Sequence[Modality], sizes: Sizes) -> None:
        super().__init__()
        self.modalities, self.sizes = {modality.name: modality for modality in modalities}, sizes
        dim = sizes.dim
        self.embed = nn.ModuleDict({m.name: nn.Linear(m.shown, dim) for m in modalities})
        self.encoder_mark = nn.ParameterDict({m.name: _small(m.tokens, dim) for m in modalities})
        self.decoder_mark = nn.ParameterDict({m.name: _small(m.tokens, dim) for m in modalities})
        self.hidden = nn.ParameterDict({m.name: _small(dim) for m in modalities})
        self.heads = nn.ModuleDict({
            m.name: nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, m.told))
            for m in modalities
        })  # fmt: skip
        self.encoder, self.decoder = (Backbone(_backbone(sizes, layers)) for layers in (sizes.encoder, sizes.decoder))
        for modality in modalities:
            for name, value in (("mean", 0.0), ("std", 1.0), *([("change", 1.0)] if modality.residual else [])):
                self.register_buffer(f"{modality.name}_{name}", torch.full((modality.size,), value))

    def record(self) -> dict[str, Any]:
        """What `from_record` builds the like from, as JSON types."""
        return {"modalities": [asdict(m) for m in self.modalities.values()], "sizes": asdict(self.sizes)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> MaskedTrajectoryModel:
        """A model of the recorded sizes, whose weights mean nothing yet.

        Raises:
            ConfigError: sizes are out of range.
            TypeError: a key is missing or unknown.
        """
        return cls([Modality(**modality) for modality in record["modalities"]], Sizes(**record["sizes"]))

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens of a step, by modality."""
        return {name: modality.tokens for name, modality in self.modalities.items()}

    def standardise(self, name: str, mean: Tensor, std: Tensor) -> None:
        """Takes over the statistics of a modality; a deviation of 0 marks a constant, which is read as 0."""
        self.get_buffer(f"{name}_mean").copy_(mean)
        self.get_buffer(f"{name}_std").copy_(std)

    def scale_changes(self, name: str, change: Tensor) -> None:
        """Takes over by how much a residual modality's standardised values change in a step, above 0."""
        self.get_buffer(f"{name}_change").copy_(change)

    def forward(self, data: Mapping[str, Tensor], visible: Visible) -> dict[str, Float[Tensor, "batch time tokens f"]]:
        """What the model tells of every token, visible or hidden.

        Args:
            data: values by modality, shape (batch, time, size); those of hidden tokens have no influence.
            visible: by modality, shape (batch, time, tokens).

        Returns:
            Standardised values of continuous modalities, logits of the others, by modality.

        Raises:
            ConfigError: windows are longer than the model's.
        """
        targets = self.targets(data)
        told = self._decode(*self._encode(targets, visible), visible)
        return {
            name: self._changed(name, out, targets[name], visible[name]) if self.modalities[name].residual else out
            for name, out in told.items()
        }

    def targets(self, data: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `forward` is to tell: standardised values, or classes of shape (batch, time, tokens)."""
        found = {}
        for name, modality in self.modalities.items():
            if modality.kind == "index":
                found[name] = data[name].long()
                continue
            mean, std = self._statistics(name)
            x = standard(data[name], mean, std).float()
            found[name] = x[:, :, None] if modality.kind == "continuous" else _bin(x, modality.classes)
        return found

    def values(self, name: str, told: Float[Tensor, "batch time tokens f"]) -> Float[Tensor, "batch time size"]:
        """What `forward` tells of a modality, in the recordings' units: likeliest index, or middle of its bin."""
        modality = self.modalities[name]
        if modality.kind == "index":
            return told.argmax(3).float()
        mean, std = self._statistics(name)
        x = told[:, :, 0] if modality.kind == "continuous" else _unbin(told.argmax(3), modality.classes)
        return x * std + mean

    def encode(self, data: Mapping[str, Tensor], visible: Visible) -> dict[str, Float[Tensor, "batch time tokens dim"]]:
        """The encoder's output for visible tokens, zero for hidden ones."""
        tokens, found = self._encode(self.targets(data), visible)
        batch, length = next(iter(visible.values())).shape[:2]
        nothing = found.new_zeros(batch * length * sum(self.tokens.values()), self.sizes.dim)
        return self._apart(nothing.index_copy(0, tokens, found).reshape(batch, -1, self.sizes.dim))

    def encode_state(self, state: Float[Tensor, "batch size"]) -> Float[Tensor, "batch features"]:
        """The encoder's output for the tokens of one state of which nothing else is known."""
        data = {n: state.new_zeros(len(state), 1, m.size) for n, m in self.modalities.items()} | {STATE: state[:, None]}
        visible = {
            n: torch.full((len(state), 1, m.tokens), n == STATE, device=state.device)
            for n, m in self.modalities.items()
        }
        return self._encode(self.targets(data), visible)[1].reshape(len(state), -1)

    def _changed(self, name: str, told: Tensor, values: Tensor, visible: Tensor) -> Tensor:
        """Values: told as a change where one was visible until then, and as they are before."""
        whole, change = told.chunk(2, 3)
        changed = last_visible(values, visible) + change * self.get_buffer(f"{name}_change")
        return torch.where(visible.cummax(1).values[..., None], changed, whole)

    def _statistics(self, name: str) -> tuple[Tensor, Tensor]:
        return self.get_buffer(f"{name}_mean"), self.get_buffer(f"{name}_std")

    def _encode(self, targets: Mapping[str, Tensor], visible: Visible) -> tuple[Tensor, Tensor]:
        """Where visible tokens are among all, shape (seen,), and what the encoder makes of them, shape (seen, dim)."""
        length = next(iter(visible.values())).shape[1]
        if length > self.sizes.length:
            fix = "cut the windows, or train a model of longer ones"
            raise ConfigError("windows", expected=f"at most {self.sizes.length} steps", got=str(length), fix=fix)
        parts = []
        for name, modality in self.modalities.items():
            x = targets[name]
            if modality.kind == "continuous":
                if modality.residual:
                    changes = torch.cat(visible_changes(x, visible[name]), 3)
                    x = torch.cat([x, changes / self.get_buffer(f"{name}_change").repeat(2)], 3)
                embedded = self.embed[name](x.clamp(-INPUT_LIMIT, INPUT_LIMIT))
            else:  # the same as a linear map of a one-hot vector
                weight, bias = (self.get_parameter(f"embed.{name}.{of}") for of in ("weight", "bias"))
                embedded = functional.embedding(x, weight.T) + bias
            parts.append(embedded.flatten(1, 2))
        seen = torch.cat([visible[name].flatten(1) for name in self.modalities], 1)
        tokens, marks = seen.flatten().nonzero()[:, 0], self._marks(self.encoder_mark, length)
        x = torch.cat(parts, 1).flatten(0, 1)[tokens] + marks[tokens % len(marks)]
        if not len(tokens):
            return tokens, x  # the decoder has its own tokens for what is hidden
        # Visible tokens alone go through the encoder, those of several samples in each row.
        place, ids = (of.to(x.device) for of in packed(seen.sum(1).cpu()))
        rows = x.new_zeros(ids.numel(), x.shape[1]).index_copy(0, place, x)
        return tokens, self.encoder(rows.reshape(*ids.shape, -1), mask=Segments(ids)).flatten(0, 1)[place]

    def _decode(self, tokens: Tensor, found: Tensor, visible: Visible) -> dict[str, Tensor]:
        batch, length = next(iter(visible.values())).shape[:2]
        hidden = torch.cat([self.hidden[name].expand(length * n, -1) for name, n in self.tokens.items()])
        x = hidden.expand(batch, -1, -1).flatten(0, 1).index_copy(0, tokens, found.to(hidden.dtype))
        x = x.reshape(batch, *hidden.shape) + self._marks(self.decoder_mark, length)
        return {name: self.heads[name](of) for name, of in self._apart(self.decoder(x, mask=Full())).items()}

    def _marks(self, mark: nn.ParameterDict, length: int) -> Float[Tensor, "n dim"]:
        """What is added to a token for its modality and its step."""
        positions = _table(length, self.sizes.dim, next(self.parameters()).device)[:, None]
        return torch.cat([(mark[name] + positions).flatten(0, 1) for name in self.modalities])

    def _apart(self, x: Float[Tensor, "batch n dim"]) -> dict[str, Float[Tensor, "batch time tokens dim"]]:
        length = x.shape[1] // sum(self.tokens.values())
        pieces = torch.split(x, [length * n for n in self.tokens.values()], 1)
        return {
            name: piece.reshape(len(x), length, n, -1)
            for piece, (name, n) in zip(pieces, self.tokens.items(), strict=True)
        }


def masked_loss(
    model: MaskedTrajectoryModel,
    told: Mapping[str, Float[Tensor, "batch time tokens f"]],
    targets: Mapping[str, Tensor],
    counted: Mapping[str, Bool[Tensor, "batch time tokens"]],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum over modalities of the mean squared error, or cross-entropy, of the counted tokens; and its parts."""
    parts = {}
    for name, modality in model.modalities.items():
        if modality.kind == "continuous":
            each = (told[name] - targets[name]).square().mean(3)
        else:
            flat = functional.cross_entropy(told[name].flatten(0, 2), targets[name].flatten(), reduction="none")
            each = flat.reshape(targets[name].shape)
        weight = counted[name].float()
        parts[name] = torch.sum(each * weight) / weight.sum().clamp(min=1.0)
    return torch.stack([*parts.values()]).sum(), parts


def packed(counts: Int64[Tensor, " batch"]) -> tuple[Int64[Tensor, " tokens"], Int64[Tensor, "rows width"]]:
    """Fills rows with whole samples, the largest first, so that little room is left.

    Args:
        counts: tokens of each sample; the largest of them is the width.

    Returns:
        For each token, in the order of the samples, its place among all places; and of each place its sample, or -1.

    Example:
        >>> place, ids = packed(torch.tensor([1, 3, 2]))
        >>> place.tolist(), ids.tolist()
        ([5, 0, 1, 2, 3, 4], [[1, 1, 1], [2, 2, 0]])
    """
    sizes = counts.numpy()
    width = int(sizes.max())
    waiting: list[list[int]] = [[] for _ in range(width + 1)]
    for sample in range(len(sizes) - 1, -1, -1):
        waiting[sizes[sample]].append(sample)
    start, rows, left = np.zeros(len(sizes), np.int64), 0, int((sizes > 0).sum())
    while left:
        room = width
        for size in range(width, 0, -1):
            while size <= room and waiting[size]:
                start[waiting[size].pop()] = rows * width + width - room
                room, left = room - size, left - 1
        rows += 1
    samples = np.repeat(np.arange(len(sizes)), sizes)
    place = np.arange(len(samples)) + np.repeat(start - (np.cumsum(sizes) - sizes), sizes)
    ids = np.full(rows * width, -1)
    ids[place] = samples
    return torch.from_numpy(place), torch.from_numpy(ids.reshape(rows, width))


def last_visible(
    values: Float[Tensor, "batch time tokens f"], visible: Bool[Tensor, "batch time tokens"]
) -> Float[Tensor, "batch time tokens f"]:
    """At each step the last value that was visible until then; zero, the mean, before there was one.

    Example:
        >>> values, visible = torch.tensor([5.0, 6.0, 7.0]), torch.tensor([False, True, False])
        >>> last_visible(values[None, :, None, None], visible[None, :, None]).flatten()
        tensor([0., 6., 6.])
    """
    steps = torch.arange(values.shape[1], device=values.device)[:, None]
    last = torch.where(visible, steps, -1).cummax(1).values
    found = values.gather(1, last.clamp(min=0)[..., None].expand_as(values))
    return found.masked_fill((last < 0)[..., None], 0.0)


def visible_changes(
    values: Float[Tensor, "batch time tokens f"], visible: Bool[Tensor, "batch time tokens"]
) -> tuple[Float[Tensor, "batch time tokens f"], Float[Tensor, "batch time tokens f"]]:
    """The change in a step since the visible value before each value, and until the visible one after it; else 0.

    Example:
        >>> values, visible = torch.tensor([5.0, 6.0, 9.0]), torch.tensor([True, False, True])
        >>> before, after = visible_changes(values[None, :, None, None], visible[None, :, None])
        >>> before.flatten().tolist(), after.flatten().tolist()
        ([0.0, 1.0, 2.0], [2.0, 3.0, 0.0])
    """

    def back(x: Tensor, seen: Tensor) -> Tensor:
        seen = functional.pad(seen[:, :-1], (0, 0, 1, 0))
        last = last_visible(functional.pad(x[:, :-1], (0, 0, 0, 0, 1, 0)), seen)
        steps = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        gap = steps - torch.where(seen, steps - 1, -1).cummax(1).values
        return ((x - last) / gap[..., None]).masked_fill(~seen.cummax(1).values[..., None], 0.0)

    # In the mirror image of time, and negated, what comes after is what was before.
    both = back(torch.cat([values, -values.flip(1)]), torch.cat([visible, visible.flip(1)]))
    before, after = both.chunk(2)
    return before, after.flip(1)


def _bin(standard: Float[Tensor, "batch time size"], classes: int) -> Int64[Tensor, "batch time size"]:
    return ((standard / _BINS_REACH + 1) / 2 * classes).long().clamp(0, classes - 1)


def _unbin(found: Int64[Tensor, "batch time size"], classes: int) -> Float[Tensor, "batch time size"]:
    return ((found + 0.5) / classes * 2 - 1) * _BINS_REACH


def _small(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * 0.02)


def _backbone(sizes: Sizes, layers: int) -> BackboneConfig:
    return BackboneConfig(
        dim=sizes.dim, layers=layers, heads=sizes.heads, dropout=sizes.dropout, ffn="gelu", bias="all", positions="none"
    )


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _table(length: int, dim: int, device: torch.device) -> Float[Tensor, "length dim"]:
    """Sines and cosines of falling frequencies, halved, as in the authors' code.

    Kept outside the model, for one that is built without numbers, to be read from a file, has none of its own.

    Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.5.
    """
    rates = torch.exp(torch.arange(0, dim, 2, device=device) * (-math.log(10_000.0) / dim))
    angles = torch.arange(length, device=device)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1) / 2
