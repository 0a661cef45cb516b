"""Behaviour cloning: from the present observation, the next few actions of whoever was recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn
from torch.nn import functional

from offbook.client.protocol import Observation, ObservationSpec, PolicyMeta
from offbook.data.normalise import Normalizer
from offbook.data.store import EpisodeStore
from offbook.data.windows import Windows, WindowSampler
from offbook.errors import ConfigError, DataError, check_settings
from offbook.learning.fit import FitConfig, fit
from offbook.learning.networks import HEADS, Body, CloningNetwork, shift_images
from offbook.learning.policies import check_meta
from offbook.learning.recordings import best_episodes, choose_episodes, choose_observation
from offbook.runs.checkpoint import save_checkpoint
from offbook.runs.directory import RunDirectory
from offbook.runs.progress import note
from offbook.runs.seeding import generator

KIND = "bc"
# Held-out windows that a validation looks at; more would cost time and hardly change the mean.
_VALIDATION = 1024


@dataclass(frozen=True, kw_only=True)
class CloningConfig:
    """How to clone.

    Attributes:
        parts: state parts to look at, such as joints; None takes all that the recordings have.
        cameras: cameras to look at.
        chunk: number H of future actions that the network predicts.
        execute: how many of them are carried out before the next look, 1 to H.
        body: what stands behind the encoders: an MLP, or a transformer in which a query for each action attends to the
            state and to each camera.
        hidden: width of its layers, for a transformer a multiple of 4.
        depth: number of those layers.
        dropout: share of their units that is dropped while training.
        shift: largest random shift of the images in pixels, sideways and up or down, while training.
        success_only: learn from successful episodes only, where the recordings know of success.
        top: share of the training episodes that it learns from, those with the highest returns.
        held_out: share of the episodes kept for the validation loss, where the store does not say which; 0 for none.
        validate_every: steps between two validations; each also saves the policy.
        on_nan: refuse recordings with NaN or infinity, or drop the windows that hold such a step, and say how many.
        fit: the training loop.
    """

    parts: tuple[str, ...] | None = None
    cameras: tuple[str, ...] = ()
    chunk: int = 50
    execute: int = 8
    body: Body = "mlp"
    hidden: int = 256
    depth: int = 2
    dropout: float = 0.0
    shift: int = 1
    success_only: bool = True
    top: float = 1.0
    held_out: float = 0.1
    validate_every: int = 250
    on_nan: Literal["refuse", "drop"] = "refuse"
    fit: FitConfig = field(default_factory=lambda: FitConfig(steps=1_500, batch_size=64, learning_rate=2e-3, ema=0.99))

    def __post_init__(self) -> None:
        checks = {
            "chunk": (1 <= self.chunk <= 1_000, "1 to 1000"),
            "execute": (1 <= self.execute <= self.chunk, f"1 to chunk ({self.chunk})"),
            "hidden": (
                1 <= self.hidden <= 65_536 and (self.body == "mlp" or self.hidden % HEADS == 0),
                f"1 to 65536, for a transformer a multiple of {HEADS}",
            ),
            "depth": (1 <= self.depth <= 64, "1 to 64"),
            "dropout": (0 <= self.dropout < 1, "a share in [0, 1)"),
            "shift": (0 <= self.shift <= 64, "0 to 64 pixels"),
            "top": (0 < self.top <= 1, "a share above 0, at most 1"),
            "held_out": (0 <= self.held_out < 1, "a share in [0, 1)"),
            "validate_every": (self.validate_every >= 1, "1 or more"),
        }
        check_settings(self, checks)


class ClonedPolicy:
    """A trained network as a `Policy`; made by `train_cloning`, or read from a file by `policies.load_policy`.

    Args:
        module: the network, in evaluation mode.
        meta: what it wants and gives; `meta.chunk` actions of each prediction are carried out.
        provenance: JSON types kept in the file: the environment, the control rate, the recordings.
    """

    def __init__(self, module: CloningNetwork, meta: PolicyMeta, provenance: Mapping[str, Any]) -> None:
        self.module, self.meta, self.provenance = module.eval(), meta, dict(provenance)
        self._device = next(module.parameters()).device

    def reset(self, sessions: Sequence[str], prompts: Sequence[str]) -> None:
        """Nothing to forget: each answer depends on the present observation alone."""

    @torch.inference_mode()
    def infer(self, observation: Observation) -> Float32[np.ndarray, "batch time action"]:
        """The next actions for each session, within the bounds of the actions."""
        state = torch.tensor(observation.state, dtype=torch.float32, device=self._device)
        images = {
            name: torch.as_tensor(np.ascontiguousarray(observation.images[name]), device=self._device)
            for name in self.meta.observation.cameras
        }
        chunk = self.module.act(state, images)[:, : self.meta.chunk].cpu().numpy()
        action = self.meta.action
        if action.choices is not None:
            return chunk
        return chunk.clip(np.asarray(action.low, np.float32), np.asarray(action.high, np.float32))

    def save(self, path: Path) -> None:
        """Writes the policy as one file that needs nothing else to run."""
        record = {"meta": self.meta.to_json(), "network": self.module.sizes, **self.provenance}
        save_checkpoint(path, KIND, self.module.state_dict(), record)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> ClonedPolicy:
        """A policy of the recorded sizes, on whatever device is the default, whose weights mean nothing yet.

        Raises:
            ConfigError: the record is not what `save` writes.
        """
        meta = PolicyMeta.from_json(record["meta"])
        network = {name: record["network"][name] for name in ("chunk", "hidden", "depth")}
        body = record["network"].get("body", "mlp")  # which policies saved earlier do not name
        check_meta(meta)
        if not (all(type(value) is int for value in network.values()) and body in get_args(Body)):
            raise ConfigError("policy record", expected="sizes of a network", got="others", fix="save the policy again")
        CloningConfig(execute=meta.chunk, body=body, **network)
        module = CloningNetwork(meta.observation, meta.action, dropout=0.0, body=body, **network)
        return cls(module, meta, {k: v for k, v in record.items() if k not in ("meta", "network")})


def check_cloning(store: EpisodeStore, config: CloningConfig) -> ObservationSpec:
    """What a policy trained in this way would look at; to be asked before anything is written.

    Raises:
        ConfigError: the recordings have no such part or camera, or nothing to look at is left.
        DataError: no episode can be used.
    """
    chosen = choose_observation(store, config.parts, config.cameras)
    _episodes(store, config, (*(name for name, _ in chosen.state), *chosen.cameras, *store.schema.actions))
    return chosen


def _episodes(
    store: EpisodeStore, config: CloningConfig, fields: Sequence[str]
) -> tuple[Int64[np.ndarray, " a"], Int64[np.ndarray, " b"]]:
    only, share = config.success_only, config.held_out
    train, held = choose_episodes(store, fields, success_only=only, held_out=share, seed=config.fit.seed)
    return best_episodes(store, train, config.top), held


def train_cloning(
    store: EpisodeStore, config: CloningConfig, run: RunDirectory, *, resume: bool = False
) -> ClonedPolicy:
    """Clones the recorded behaviour and saves the policy as the run's checkpoint `last`.

    Continuous actions are standardised and fitted by mean squared error, discrete ones by cross-entropy, in chunks of
    H; what lies beyond the end of an episode does not count. The validation loss is taken on episodes that were held
    out whole.

    Args:
        store: the recordings.
        config: see `CloningConfig`.
        run: where metrics and checkpoints go.
        resume: continue an interrupted training.

    Raises:
        ConfigError: the recordings have no such part or camera, or nothing to look at is left.
        DataError: no usable episode, or a value is NaN or infinite.

    Source: Zhao et al., "Learning Fine-Grained Bimanual Manipulation with Low-Cost Hardware" (2023), section IV, for
        chunks of actions (ours are not averaged over time); Zhou et al., "Train Offline, Test Online" (2023), section
        V, for the MLP on standardised joints.
    """
    data = _Recordings(store, config)
    data.tell()
    meta = PolicyMeta(
        name=f"bc-{run.path.name}", observation=data.observation, action=data.action, chunk=config.execute
    )
    module = _network(data, config)
    provenance = {
        "environment": store.schema.environment,
        "rate_hz": store.schema.rate_hz,
        "recordings": {"sha256": store.digest, "episodes": len(data.train)},
    }

    def keep(step: int, trained: nn.Module) -> Mapping[str, float]:
        if not isinstance(trained, CloningNetwork):
            raise TypeError("fit hands on the module that it was given")
        ClonedPolicy(trained, meta, provenance).save(run.checkpoint())
        return data.validate(trained)

    result = fit(
        module,
        data.batch_at,
        _loss(module, config),
        config.fit,
        run,
        resume=resume,
        hooks=[(config.validate_every, keep)],
    )
    trained = result.module.cpu()
    if not isinstance(trained, CloningNetwork):
        raise TypeError("fit hands back the module that it was given")
    return ClonedPolicy(trained, meta, provenance)


def _network(data: _Recordings, config: CloningConfig) -> CloningNetwork:
    sizes = {"chunk": config.chunk, "hidden": config.hidden, "depth": config.depth}
    # The initial weights come from the default generator; forked and seeded, it is a function of the seed alone.
    with torch.random.fork_rng():
        torch.manual_seed(int(generator(config.fit.seed, "weights").integers(2**62)))
        module = CloningNetwork(data.observation, data.action, dropout=config.dropout, body=config.body, **sizes)
    module.standardise(data.normalizer, data.parts, data.action_field if data.action.choices is None else None)
    return module


def _loss(
    network: CloningNetwork, config: CloningConfig
) -> Callable[[nn.Module, Mapping[str, Tensor], torch.Generator], tuple[Tensor, Mapping[str, Tensor]]]:
    def loss(
        module: nn.Module, batch: Mapping[str, Tensor], rng: torch.Generator
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        images = {k: shift_images(batch[f"camera {k}"], config.shift, rng) for k in network.observation.cameras}
        return _error(network, module(batch["state"], images), batch), {}

    return loss


def _error(
    network: CloningNetwork, predicted: Float[Tensor, "batch time outputs"], batch: Mapping[str, Tensor]
) -> Tensor:
    """Mean error of the actions that were really recorded."""
    valid = batch["valid"].float()
    if network.action.choices is not None:
        flat = functional.cross_entropy(predicted.flatten(0, 1), batch["action"].flatten(), reduction="none")
        each = flat.reshape(valid.shape)
    else:
        each = (predicted - network.targets(batch["action"])).square().mean(2)
    return torch.sum(each * valid) / valid.sum()


class _Recordings:
    """What is learnt from: the chosen fields and episodes of a store, as batches."""

    def __init__(self, store: EpisodeStore, config: CloningConfig) -> None:
        self.store, self.config = store, config
        self.observation = chosen = choose_observation(store, config.parts, config.cameras)
        self.parts, self.cameras = tuple(name for name, _ in chosen.state), tuple(chosen.cameras)
        self.action = store.schema.action_spec()
        if len(store.schema.actions) != 1:
            fix = "record with one Box or Discrete action space"
            raise DataError(str(store.path), expected="one action field", got=f"{len(store.schema.actions)}", fix=fix)
        self.action_field = store.schema.actions[0]
        self.train, self.held_out = _episodes(store, config, (*self.parts, *self.cameras, self.action_field))
        continuous = (self.action_field,) if self.action.choices is None else ()
        skip = config.on_nan == "drop"
        fields, fix = (*self.parts, *continuous), "leave such steps out: --on-nan drop"
        self.normalizer = Normalizer.fit(store, fields, self.train, skip_nan=skip, fix=fix)
        self.sampler = self._sampler(self.train)

    def _sampler(self, episodes: Int64[np.ndarray, " episodes"]) -> WindowSampler:
        return WindowSampler(
            self.store,
            (*self.parts, self.action_field),
            length=self.config.chunk,
            pad="right",
            episodes=episodes,
            on_nan="drop" if self.config.on_nan == "drop" else "keep",
            seed=self.config.fit.seed,
        )

    def tell(self) -> None:
        """Says what of the recordings is not learnt from."""
        if lost := self.sampler.dropped_windows:
            note(f"{lost} of {lost + len(self.sampler)} windows are left out for NaN or infinity")
        for name, count in self.normalizer.constants.items():
            note(f"{count} of {self.normalizer.mean[name].size} entries of {name} never vary and tell nothing")

    def batch_at(self, index: int) -> Mapping[str, Tensor]:
        """Batch number `index` for training."""
        return self._batch(self.sampler.sample(self.config.fit.batch_size, index))

    def _batch(self, windows: Windows) -> Mapping[str, Tensor]:
        size = len(windows.episode)
        state = [windows.data[name][:, 0].reshape(size, -1) for name in self.parts]
        action = windows.data[self.action_field].reshape(size, self.config.chunk, -1)
        # Images are wanted at the window's first step alone, so they are not part of the windows.
        rows = self.store.episodes["start"][windows.episode] + windows.start
        return {
            "state": torch.from_numpy(np.concatenate([np.zeros((size, 0)), *state], 1).astype(np.float32)),
            "action": torch.from_numpy(action.astype(np.float32 if self.action.choices is None else np.int64)),
            "valid": torch.from_numpy(windows.valid),
            **{f"camera {name}": torch.from_numpy(self.store.field(name)[rows]) for name in self.cameras},
        }

    def validate(self, network: CloningNetwork) -> Mapping[str, float]:
        """The mean loss over windows spread evenly over the steps held out, so that long episodes count for more.

        Nothing without such episodes.
        """
        if not len(self.held_out):
            return {}
        sampler = self._sampler(self.held_out)
        numbers = np.unique(np.linspace(0, len(sampler) - 1, _VALIDATION).astype(np.int64))
        losses = []
        device = network.state_mean.device
        for part in np.array_split(numbers, max(1, len(numbers) // 128)):
            batch = {name: value.to(device) for name, value in self._batch(sampler.at(part)).items()}
            images = {name: batch[f"camera {name}"] for name in self.cameras}
            losses.append(float(_error(network, network(batch["state"], images), batch)) * len(part))
        return {"held_out_loss": sum(losses) / len(numbers)}
