"""Visual imitation by nearest neighbours (VINN): do what was done where it looked most alike. Nothing is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn
from torch.nn import functional

from offbook.client.protocol import ActionSpec, Observation, ObservationSpec, PolicyMeta
from offbook.data.normalise import Normalizer
from offbook.data.store import EpisodeStore
from offbook.errors import ConfigError, DataError, check_settings
from offbook.learning.networks import INPUT_LIMIT, standard
from offbook.learning.policies import check_meta
from offbook.learning.recordings import choose_episodes, choose_observation
from offbook.models.knn import nearest
from offbook.runs.checkpoint import save_checkpoint
from offbook.runs.directory import RunDirectory

KIND = "vinn"
# Steps of the episodes held out whose actions are foretold, to say how well.
_VALIDATION = 1_024


@dataclass(frozen=True, kw_only=True)
class VinnConfig:
    """How to imitate by neighbours.

    Attributes:
        parts: state parts to compare, such as joints and a camera's features; None takes all that the recordings have.
        neighbours: number k of recorded steps whose actions are averaged.
        temperature: of the softmax of the distances that weighs them, in which a deviation of all numbers is 1.
        chunk: number H of actions in one answer. With more than one they are those that followed the nearest step.
        success_only: remember successful episodes only, where the recordings know of success.
        held_out: share of the episodes kept to tell the error, where the store does not say which; 0 for none.
        seed: of the draw of those.

    Source: Pari et al., "The Surprising Effectiveness of Representation Learning for Visual Imitation" (2021), section
        III; Zhou et al., "Train Offline, Test Online" (2023), for joints beside the features and for chunks. There
        distances are of the numbers as they are, so that it depends on their scale which of them count; here each state
        part is standardised and counts the same, however many numbers it has.
    """

    parts: tuple[str, ...] | None = None
    neighbours: int = 8
    temperature: float = 0.1
    chunk: int = 1
    success_only: bool = True
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "neighbours": (1 <= self.neighbours <= 10_000, "1 to 10000"),
            "temperature": (0 < self.temperature < math.inf, "a finite number above 0"),
            "chunk": (1 <= self.chunk <= 1_000, "1 to 1000"),
            "held_out": (0 <= self.held_out < 1, "a share in [0, 1)"),
            "seed": (self.seed >= 0, "0 or more"),
        }
        check_settings(self, checks)


class Neighbours(nn.Module):
    """Remembered steps: what was seen, what was done, and how many steps of their episode were still to come.

    Args:
        observation: what is compared.
        action: what is given.
        steps: number N of remembered steps.
        neighbours: number k of those that are averaged.
        temperature: see `VinnConfig`.
        chunk: number H of actions.
    """

    state_mean: Tensor
    state_std: Tensor
    share: Tensor
    seen: Tensor
    done: Tensor
    left: Tensor

    def __init__(
        self,
        observation: ObservationSpec,
        action: ActionSpec,
        *,
        steps: int,
        neighbours: int,
        temperature: float,
        chunk: int,
    ) -> None:
        super().__init__()
        self.action = action
        self.sizes = {"steps": steps, "neighbours": neighbours, "temperature": temperature, "chunk": chunk}
        size = observation.state_size
        self.register_buffer("state_mean", torch.zeros(size))
        self.register_buffer("state_std", torch.ones(size))
        # Of each number in the distance: a part with many counts as much as one with few.
        parts = len(observation.state)
        self.register_buffer(
            "share", torch.cat([torch.full((n,), (n * parts) ** -0.5) for _, n in observation.state])
        )  # fmt: skip
        self.register_buffer("seen", torch.zeros(steps, size))
        self.register_buffer("done", torch.zeros(steps, action.size))
        self.register_buffer("left", torch.zeros(steps))

    def embed(self, state: Float[Tensor, "batch state"]) -> Float[Tensor, "batch state"]:
        """A state of the recordings as it is compared."""
        x = standard(state, self.state_mean, self.state_std).clamp(-INPUT_LIMIT, INPUT_LIMIT)
        return x * self.share

    def forward(self, state: Float[Tensor, "batch state"]) -> Float[Tensor, "batch time action"]:
        """The actions for states of the recordings, in the robot's units."""
        chunk, k = int(self.sizes["chunk"]), int(self.sizes["neighbours"])
        distance, which = nearest(self.seen, self.embed(state), 1 if chunk > 1 else k)
        if chunk > 1:
            # Behind the end of its episode, the last action again.
            ahead = torch.arange(chunk, device=state.device).minimum(self.left[which].long())
            return self.done[which + ahead]
        weight = torch.softmax(-distance / self.sizes["temperature"], 1)[..., None]
        if self.action.choices is None:
            return (weight * self.done[which]).sum(1, keepdim=True)
        votes = weight * functional.one_hot(self.done[which][..., 0].long(), self.action.choices)
        return votes.sum(1).argmax(1)[:, None, None].float()


class VinnPolicy:
    """Remembered steps as a `Policy`; made by `train_vinn`, or read from a file by `policies.load_policy`.

    Args:
        module: the steps.
        meta: what it wants and gives.
        provenance: JSON types kept in the file: the environment, the control rate, the recordings.
    """

    def __init__(self, module: Neighbours, meta: PolicyMeta, provenance: Mapping[str, Any]) -> None:
        self.module, self.meta, self.provenance = module.eval(), meta, dict(provenance)
        self._device = module.seen.device

    def reset(self, sessions: Sequence[str], prompts: Sequence[str]) -> None:
        """Nothing to forget: each answer depends on the present observation alone."""

    @torch.inference_mode()
    def infer(self, observation: Observation) -> Float32[np.ndarray, "batch time action"]:
        """The next actions for each session, within the bounds of the actions."""
        state = torch.tensor(observation.state, dtype=torch.float32, device=self._device)
        action, bounds = self.module(state).cpu().numpy(), self.meta.action
        return np.asarray(action.clip(np.asarray(bounds.low, np.float32), np.asarray(bounds.high, np.float32)))

    def save(self, path: Path) -> None:
        """Writes the policy as one file that needs nothing else to run."""
        record = {"meta": self.meta.to_json(), "network": self.module.sizes, **self.provenance}
        save_checkpoint(path, KIND, self.module.state_dict(), record)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> VinnPolicy:
        """A policy of the recorded sizes, on whatever device is the default, whose numbers mean nothing yet.

        Raises:
            ConfigError: the record is not what `save` writes.
        """
        meta = PolicyMeta.from_json(record["meta"])
        check_meta(meta)
        sizes = {name: record["network"][name] for name in ("steps", "neighbours", "temperature", "chunk")}
        whole = all(type(sizes[name]) is int for name in ("steps", "neighbours", "chunk"))
        sound = whole and type(sizes["temperature"]) is float and 1 <= sizes["neighbours"] <= sizes["steps"] < 2**24
        if not sound or sizes["chunk"] != meta.chunk or meta.observation.cameras or not meta.observation.state_size:
            expected = "remembered steps, from a state to an action"
            raise ConfigError("policy record", expected=expected, got="others", fix="save the policy again")
        VinnConfig(**{name: value for name, value in sizes.items() if name != "steps"})
        module = Neighbours(meta.observation, meta.action, **sizes)
        return cls(module, meta, {k: v for k, v in record.items() if k not in ("meta", "network")})


def check_vinn(store: EpisodeStore, config: VinnConfig) -> ObservationSpec:
    """What a policy made in this way would look at; to be asked before anything is written.

    Raises:
        ConfigError: the recordings have no such part, or fewer steps than there are to be neighbours.
        DataError: the recordings have no state, not one field of actions, or no episode with all of them.
    """
    chosen = choose_observation(store, config.parts)
    if not chosen.state:
        fix = "look at a camera through an encoder: --encoder"
        raise DataError(str(store.path), expected="a part of the state that is no picture", got="none", fix=fix)
    if len(store.schema.actions) != 1:
        fix = "record with one Box or Discrete action space"
        raise DataError(str(store.path), expected="one action field", got=f"{len(store.schema.actions)}", fix=fix)
    steps = int(store.episodes["length"][_episodes(store, config, chosen)[0]].sum())
    if config.neighbours > steps:
        expected = f"at most {steps}, the remembered steps"
        fix = "ask for fewer"
        raise ConfigError("--neighbours", expected=expected, got=str(config.neighbours), fix=fix)
    return chosen


def _episodes(
    store: EpisodeStore, config: VinnConfig, chosen: ObservationSpec
) -> tuple[Int64[np.ndarray, " a"], Int64[np.ndarray, " b"]]:
    fields = [*(name for name, _ in chosen.state), *store.schema.actions]
    only, share = config.success_only, config.held_out
    return choose_episodes(store, fields, success_only=only, held_out=share, seed=config.seed)


def train_vinn(store: EpisodeStore, config: VinnConfig, run: RunDirectory, *, resume: bool = False) -> VinnPolicy:
    """Remembers the recorded steps and saves them as the run's checkpoint `last`.

    Args:
        store: the recordings.
        config: see `VinnConfig`.
        run: where the metrics and the checkpoint go.
        resume: does nothing: it is done at once.

    Raises:
        ConfigError: see `check_vinn`.
        DataError: likewise; or a value is NaN or infinite.

    Source: see `VinnConfig`.
    """
    chosen, action = check_vinn(store, config), store.schema.actions[0]
    parts = [name for name, _ in chosen.state]
    train, held_out = _episodes(store, config, chosen)
    normalizer = Normalizer.fit(store, parts, train)
    starts, lengths = (store.episodes[name][train] for name in ("start", "length"))
    module = Neighbours(
        chosen, store.schema.action_spec(), steps=int(lengths.sum()), neighbours=config.neighbours,
        temperature=config.temperature, chunk=config.chunk,
    )  # fmt: skip
    for name, of in (("mean", normalizer.mean), ("std", normalizer.std)):
        joined = np.concatenate([of[part].reshape(-1) for part in parts]).astype(np.float32)
        module.get_buffer(f"state_{name}").copy_(torch.from_numpy(joined))
    rows = np.concatenate([np.arange(a, a + n) for a, n in zip(starts, lengths, strict=True)])
    module.seen.copy_(module.embed(_states(store, parts, rows)))
    module.done.copy_(_actions(store, action, rows))
    module.left.copy_(torch.from_numpy(np.concatenate([np.arange(n)[::-1] for n in lengths]).astype(np.float32)))
    meta = PolicyMeta(
        name=f"vinn-{run.path.name}", observation=chosen, action=store.schema.action_spec(), chunk=config.chunk
    )
    provenance = {
        "environment": store.schema.environment,
        "rate_hz": store.schema.rate_hz,
        "recordings": {"sha256": store.digest, "episodes": len(train)},
    }
    policy = VinnPolicy(module, meta, provenance)
    policy.save(run.checkpoint())
    if not run.metrics():
        run.log(0, steps=len(rows), **_validated(policy, store, parts, action, held_out))
    run.close()
    return policy


def _states(store: EpisodeStore, parts: Sequence[str], rows: Int64[np.ndarray, " rows"]) -> Tensor:
    found = [np.asarray(store.field(name)[rows]).reshape(len(rows), -1) for name in parts]
    return torch.from_numpy(np.concatenate(found, 1).astype(np.float32))


def _actions(store: EpisodeStore, action: str, rows: Int64[np.ndarray, " rows"]) -> Tensor:
    values = torch.from_numpy(np.asarray(store.field(action)[rows]).reshape(len(rows), -1).astype(np.float32))
    if not bool(torch.isfinite(values).all()):
        fix = "mend the recordings, or choose other episodes with offbook data split"
        raise DataError(f"{store.path}, field {action!r}", expected="finite numbers", got="NaN or infinity", fix=fix)
    return values


def _validated(
    policy: VinnPolicy, store: EpisodeStore, parts: Sequence[str], action: str, episodes: Int64[np.ndarray, " episodes"]
) -> dict[str, float]:
    """How far the first action of an answer is from the recorded one, on episodes held out; nothing without any.

    The mean squared error in deviations of the remembered actions, or the share of discrete actions that is wrong.
    """
    if not len(episodes):
        return {}
    starts, lengths = (store.episodes[name][episodes] for name in ("start", "length"))
    rows = np.concatenate([np.arange(a, a + n) for a, n in zip(starts, lengths, strict=True)])
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, _VALIDATION).astype(np.int64))]
    with torch.inference_mode():
        told, wanted = policy.module(_states(store, parts, rows))[:, 0], _actions(store, action, rows)
    if policy.meta.action.choices is not None:
        return {"held_out_loss": float((told != wanted).float().mean())}
    std = policy.module.done.std(0, correction=0)
    return {"held_out_loss": float(standard(told - wanted, torch.zeros_like(std), std).square().mean())}
