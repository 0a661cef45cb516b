"""The role card: how far off a model is in each role, on episodes held out, beside simple rules and specialists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from offbook.errors import DataError, needs_extra
from offbook.evaluate.stats import Interval, bootstrap_mean
from offbook.learning.masked_model import MaskedTrajectoryModel
from offbook.learning.masked_patterns import Shape, Visible, at_step
from offbook.learning.networks import standard
from offbook.learning.specialists import Specialist
from offbook.learning.trajectories import ACTION, RETURN, STATE, Trajectories
from offbook.runs.directory import atomic_path

# Windows that are looked at, at most, and how many go through the model at a time.
_WINDOWS, _AT_ONCE = 4096, 512
_MODEL, _SPECIALIST, _RULE = "#0072b2", "#d55e00", "#777777"  # of Okabe and Ito's, and a grey
MODEL = "model"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One role.

    Attributes:
        role: what is told.
        tells: the same in words.
        unit: of the errors.
        errors: mean error by who tells it: `MODEL`, specialists, simple rules; with an interval over episodes.
        specialists: which of them are.
    """

    role: str
    tells: str
    unit: str
    errors: Mapping[str, Interval]
    specialists: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        errors = {name: interval.to_json() for name, interval in self.errors.items()}
        return {"role": self.role, "tells": self.tells, "unit": self.unit, "errors": errors}


@dataclass(frozen=True, kw_only=True)
class _Question:
    """What is asked in a role: what is visible, and which step of which modality is to be told."""

    tells: str
    seen: Visible
    modality: str
    step: int
    rules: Mapping[str, Tensor]


def role_card(
    model: MaskedTrajectoryModel, data: Trajectories, specialists: Mapping[str, Specialist] | None = None
) -> list[Row]:
    """Errors of a model in each role that the recordings allow, on windows spread evenly over the held-out steps.

    Errors of continuous values are squared, in standard deviations of the training data, averaged over entries; of
    discrete ones, the share that is wrong. Intervals are over episodes, which windows of one episode are not.

    Args:
        model: in evaluation mode.
        data: what it was trained on; the held-out episodes are used.
        specialists: others that tell the same, by name, each in the row of its own role.

    Raises:
        DataError: no held-out episode has a window.
    """
    windows, episodes = _held_out(model, data)
    rows = []
    for role, question in _questions(model, windows, data).items():
        kept = windows[f"{question.modality} present"][:, question.step]
        for name in {STATE, ACTION, RETURN} & model.modalities.keys():
            if bool(question.seen[name].any()):
                kept = kept & windows[f"{name} present"].all(1)
        if not bool(kept.any()):
            continue
        chosen = {name: values[kept] for name, values in windows.items()}
        wanted = chosen[question.modality][:, question.step]
        experts = {name: one for name, one in (specialists or {}).items() if one.config.role == role}
        told = {MODEL: _told(model, chosen, question)}
        for name, expert in experts.items():
            told[name] = _said(expert, expert(chosen, question.step - expert.config.tells[1]))
        told |= {name: rule[kept] for name, rule in question.rules.items()}
        index = model.modalities[question.modality].kind == "index"
        std = torch.ones(1) if index else _of(data, question.modality)[1]
        errors = {name: _errors(values, wanted, std, index) for name, values in told.items()}
        numbers = episodes[kept.numpy()]
        rows.append(
            Row(
                role=role,
                tells=question.tells,
                unit="share wrong" if index else "mean squared error in standard deviations",
                errors={name: _over_episodes(values, numbers) for name, values in errors.items()},
                specialists=tuple(experts),
            )
        )
    return rows


def _held_out(model: MaskedTrajectoryModel, data: Trajectories) -> tuple[dict[str, Tensor], np.ndarray]:
    length = model.sizes.length
    sampler = data.held_out_sampler(length)
    if sampler is None:
        fix = "hold more episodes out: offbook data split"
        where, expected = f"{data.store.path}, role card", f"a held-out episode with a window of {length} steps"
        raise DataError(where, expected=expected, got=f"none among {len(data.held_out)}", fix=fix)
    windows = sampler.at(np.unique(np.linspace(0, len(sampler) - 1, _WINDOWS).astype(np.int64)))
    return data.tensors(windows), windows.episode


def _of(data: Trajectories, modality: str) -> tuple[Tensor, Tensor]:
    """Mean and deviation over the real steps, whatever the model itself is standardised by."""
    mean, std = (torch.from_numpy(of.astype(np.float32)) for of in data.statistics[modality])
    return mean, std


def _questions(model: MaskedTrajectoryModel, windows: Mapping[str, Tensor], data: Trajectories) -> dict[str, _Question]:
    """The roles, with their simple rules; every one is asked at the end of the window, where there is most to see."""
    batch, length = windows[f"{STATE} present"].shape
    last = length - 1
    shape = Shape(tokens=model.tokens, length=length, batch=1)
    step, before = torch.tensor([[last]]), torch.tensor([[last - 1]])
    every = torch.ones(1, length, dtype=torch.bool)
    state = windows[STATE]
    found = {}
    if ACTION in model.modalities:
        action = windows[ACTION].float()
        rules = {"last action": action[:, last - 1]}
        if model.modalities[ACTION].kind != "index":
            rules["mean action"] = _of(data, ACTION)[0].expand(batch, -1)
        found["bc"] = _Question(
            tells="the action, from what was before", seen=at_step("bc", shape, step), modality=ACTION, step=last,
            rules=rules,
        )  # fmt: skip
        if RETURN in model.modalities:
            found["rcbc"] = _Question(
                tells="the action, from what was before and the returns", seen=at_step("rcbc", shape, step),
                modality=ACTION, step=last, rules=rules,
            )  # fmt: skip
        # The action before the one that is asked for, if the window has one.
        earlier = {name: rule for name, rule in rules.items() if name != "last action"}
        if last > 1:
            earlier = {"last action": action[:, last - 2], **earlier}
        found["id"] = _Question(
            tells="the action between two states", seen=shape.where(state=every), modality=ACTION, step=last - 1,
            rules=earlier,
        )  # fmt: skip
        found["fd"] = _Question(
            tells="the state after an action", seen=at_step("fd", shape, before), modality=STATE, step=last,
            rules={"state stays": state[:, last - 1]},
        )  # fmt: skip
    if RETURN in model.modalities:
        name = "plan" if ACTION in model.modalities else "bc"
        found["return"] = _Question(
            tells="the return, from what was before and the action", seen=at_step(name, shape, step), modality=RETURN,
            step=last, rules={"mean return": _of(data, RETURN)[0].expand(batch, -1)},
        )  # fmt: skip
    if length > 2:
        middle = length // 2
        ends = (torch.arange(length) == 0) | (torch.arange(length) == last)
        line = state[:, 0] + (state[:, last] - state[:, 0]) * (middle / last)
        found["waypoint"] = _Question(
            tells="the state in the middle, from the first and the last", seen=shape.where(state=ends[None]),
            modality=STATE, step=middle, rules={"straight line": line, "state stays": state[:, 0]},
        )  # fmt: skip
    return found


@torch.no_grad()
def _told(model: MaskedTrajectoryModel, windows: Mapping[str, Tensor], question: _Question) -> Tensor:
    parts = []
    for rows in torch.split(torch.arange(len(windows[STATE])), _AT_ONCE):
        part = {name: windows[name][rows] for name in model.modalities}
        visible = {name: seen.expand(len(rows), -1, -1) for name, seen in question.seen.items()}
        told = model(part, visible)[question.modality]
        parts.append(model.values(question.modality, told)[:, question.step])
    return torch.cat(parts)


def _said(specialist: Specialist, told: Tensor) -> Tensor:
    """What a specialist tells, in the recordings' units."""
    name, _ = specialist.config.tells
    if name == ACTION and specialist.choices:
        return told.argmax(1, keepdim=True).float()
    return told.detach() * specialist.get_buffer(f"{name}_std") + specialist.get_buffer(f"{name}_mean")


def _errors(told: Tensor, wanted: Tensor, std: Tensor, index: bool) -> Float64[np.ndarray, " windows"]:
    if index:
        return np.asarray((told != wanted).any(1).double().numpy())
    return np.asarray(standard(told.double(), wanted.double(), std.double()).square().mean(1).numpy())


def _over_episodes(errors: Float64[np.ndarray, " windows"], episodes: np.ndarray) -> Interval:
    """The mean over windows, with an interval that resamples whole episodes."""
    _, of = np.unique(episodes, return_inverse=True)
    sums, counts = np.bincount(of, errors), np.bincount(of)
    # Long episodes count for more, so that the mean is that over windows.
    return bootstrap_mean(sums / counts.mean())


def draw_card(path: Path, rows: Sequence[Row], title: str) -> None:
    """Draws the errors of each role below one another, on a logarithmic scale.

    Args:
        path: a PNG file, replaced atomically.
        rows: of `role_card`.
        title: above the picture.
    """
    with needs_extra("models"):
        from matplotlib.figure import Figure
    bars = sum(len(row.errors) + 1 for row in rows)
    figure = Figure(figsize=(7.5, 0.8 + 0.24 * bars), layout="constrained")
    axes = figure.subplots()
    places, names, place = list[float](), list[str](), 0
    for row in rows:
        axes.text(
            0.01, place, f"{row.role}: {row.tells}", transform=axes.get_yaxis_transform(), va="center", weight="bold"
        )
        for name, interval in row.errors.items():
            place += 1
            colour = _MODEL if name == MODEL else _SPECIALIST if name in row.specialists else _RULE
            axes.plot([interval.low, interval.high], [place, place], color=colour, linewidth=2.5)
            axes.plot([interval.value], [place], "o", color=colour, markersize=7)
            places.append(place)
            names.append(name)
        place += 1
    axes.set(xscale="log", xlabel="error on episodes held out, with 95% intervals", ylim=(place - 0.4, -0.6))
    axes.set_yticks(places, names)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    figure.suptitle(title, fontsize=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
