"""Offline reinforcement learning: better actions than the recorded ones, from recordings with rewards alone."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor, nn

from offbook.client.protocol import Observation, ObservationSpec, PolicyMeta
from offbook.data.normalise import Normalizer
from offbook.data.returns import without_rewards
from offbook.data.store import EpisodeStore
from offbook.data.transitions import Transitions
from offbook.errors import ConfigError, DataError, check_settings
from offbook.learning.actor_critic import Actor, ActorCritic, Algorithm, Loss, cql_loss, iql_loss, td3bc_loss
from offbook.learning.fit import FitConfig, fit
from offbook.learning.policies import check_meta
from offbook.learning.recordings import choose_episodes, choose_observation
from offbook.runs.checkpoint import save_checkpoint
from offbook.runs.directory import RunDirectory
from offbook.runs.progress import note
from offbook.runs.seeding import generator

KIND = "offline"
_OWN = {
    "iql": ("expectile", "beta", "max_weight"),
    "td3bc": ("alpha", "policy_delay", "policy_noise", "noise_clip"),
    "cql": ("cql_alpha", "samples"),
}


def _fit() -> FitConfig:
    return FitConfig(
        steps=20_000, batch_size=256, learning_rate=3e-4, weight_decay=0.0, warmup=0, schedule="constant",
        clip_norm=0.0, checkpoint_every=2_000, log_every=200,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OfflineConfig:
    """How to learn from rewards. The defaults are those of the papers, but for the number of steps.

    Attributes:
        algorithm: implicit Q-learning, TD3 with behaviour cloning, or conservative Q-learning.
        parts: state parts to look at, such as joints; None takes all that the recordings have.
        hidden: width of the layers of every network.
        depth: number of those layers.
        gamma: discount.
        target_rate: share of the way that target networks go to the trained ones in one move.
        reward_scale: what rewards are multiplied by.
        reward_shift: what is then added to them.
        expectile: IQL: tau, from 1/2, which values average actions, towards 1, which values the best ones.
        beta: IQL: inverse temperature; 0 clones all recorded actions alike.
        max_weight: IQL: largest weight of a recorded action.
        alpha: TD3+BC: weight of the critic beside cloning.
        policy_delay: TD3+BC: steps of the critics for one of the actor and of the target networks.
        policy_noise: TD3+BC: deviation of the noise on target actions, where actions go from -1 to 1.
        noise_clip: TD3+BC: largest such noise.
        cql_alpha: CQL: weight of the conservative term.
        samples: CQL: how many actions of each of three kinds estimate it.
        save_every: steps between two savings of the policy.
        fit: the training loop.

    Source: Kostrikov et al., "Offline Reinforcement Learning with Implicit Q-Learning" (2021), appendix B; Fujimoto and
        Gu, "A Minimalist Approach to Offline Reinforcement Learning" (2021), table 2; Kumar et al., "Conservative
        Q-Learning for Offline Reinforcement Learning" (2020), appendix F, with the authors' program. All networks share
        one constant learning rate: IQL lets its actor's fall like a cosine, and CQL takes a smaller one for its actor
        and a third layer. States are standardised for all three, which the paper does for TD3+BC.
    """

    algorithm: Algorithm
    parts: tuple[str, ...] | None = None
    hidden: int = 256
    depth: int = 2
    gamma: float = 0.99
    target_rate: float = 0.005
    reward_scale: float = 1.0
    reward_shift: float = 0.0
    expectile: float = 0.7
    beta: float = 3.0
    max_weight: float = 100.0
    alpha: float = 2.5
    policy_delay: int = 2
    policy_noise: float = 0.2
    noise_clip: float = 0.5
    cql_alpha: float = 5.0
    samples: int = 10
    save_every: int = 2_000
    fit: FitConfig = field(default_factory=_fit)

    def __post_init__(self) -> None:
        amounts = ("beta", "max_weight", "alpha", "policy_noise", "noise_clip", "cql_alpha")
        checks = {
            "algorithm": (self.algorithm in get_args(Algorithm), f"one of {', '.join(get_args(Algorithm))}"),
            "hidden": (1 <= self.hidden <= 65_536, "1 to 65536"),
            "depth": (1 <= self.depth <= 64, "1 to 64"),
            "gamma": (0 <= self.gamma <= 1, "a discount in [0, 1]"),
            "target_rate": (0 < self.target_rate <= 1, "a share in (0, 1]"),
            "reward_scale": (0 < self.reward_scale < math.inf, "a finite number above 0"),
            "reward_shift": (math.isfinite(self.reward_shift), "a finite number"),
            "expectile": (0 < self.expectile < 1, "between 0 and 1"),
            **{name: (0 <= getattr(self, name) < math.inf, "a finite number, 0 or more") for name in amounts},
            **{name: (getattr(self, name) >= 1, "1 or more") for name in ("policy_delay", "samples", "save_every")},
            # Target networks move, and actors wait, by calls of the loss.
            "fit.accumulate": (self.fit.accumulate == 1, "1"),
        }
        check_settings(self, checks)
        for algorithm, names in _OWN.items():
            for each in fields(self):
                if each.name in names and algorithm != self.algorithm and getattr(self, each.name) != each.default:
                    flag, expected = f"--{each.name.replace('_', '-')}", f"settings of {self.algorithm}"
                    raise ConfigError(flag, expected=expected, got=f"one of {algorithm}", fix=f"leave {flag} out")


class OfflinePolicy:
    """A trained actor as a `Policy`, without noise; made by `train_offline`, or read by `policies.load_policy`.

    Args:
        module: the actor, in evaluation mode.
        meta: what it wants and gives.
        provenance: JSON types kept in the file: the environment, the control rate, the recordings.
    """

    def __init__(self, module: Actor, meta: PolicyMeta, provenance: Mapping[str, Any]) -> None:
        self.module, self.meta, self.provenance = module.eval(), meta, dict(provenance)
        self._device = module.state_mean.device

    def reset(self, sessions: Sequence[str], prompts: Sequence[str]) -> None:
        """Nothing to forget: each answer depends on the present observation alone."""

    @torch.inference_mode()
    def infer(self, observation: Observation) -> Float32[np.ndarray, "batch 1 action"]:
        """The next action for each session, within the bounds of the actions."""
        state = torch.tensor(observation.state, dtype=torch.float32, device=self._device)
        action, bounds = self.module.act(state).cpu().numpy(), self.meta.action
        return action.clip(np.asarray(bounds.low, np.float32), np.asarray(bounds.high, np.float32))[:, None]

    def save(self, path: Path) -> None:
        """Writes the policy as one file that needs nothing else to run."""
        record = {"meta": self.meta.to_json(), "network": self.module.sizes, **self.provenance}
        save_checkpoint(path, KIND, self.module.state_dict(), record)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> OfflinePolicy:
        """A policy of the recorded sizes, on whatever device is the default, whose weights mean nothing yet.

        Raises:
            ConfigError: the record is not what `save` writes.
        """
        meta = PolicyMeta.from_json(record["meta"])
        check_meta(meta)
        sizes = {name: record["network"][name] for name in ("algorithm", "hidden", "depth")}
        plain = all(type(sizes[name]) is int for name in ("hidden", "depth")) and type(sizes["algorithm"]) is str
        own = meta.chunk == 1 and meta.action.choices is None and not meta.observation.cameras
        if not (plain and own and meta.observation.state_size and meta.action.size):
            expected = "an actor from a state to a continuous action"
            raise ConfigError("policy record", expected=expected, got="another", fix="save the policy again")
        OfflineConfig(**sizes)
        module = Actor(state_size=meta.observation.state_size, action_size=meta.action.size, **sizes)
        return cls(module, meta, {k: v for k, v in record.items() if k not in ("meta", "network")})


def check_offline(store: EpisodeStore, config: OfflineConfig) -> ObservationSpec:
    """What a policy trained in this way would look at; to be asked before anything is written.

    Raises:
        ConfigError: the recordings have no such part, or several processes were started.
        DataError: the recordings have no reward, no state, no single continuous action, or no episode with all of them.
    """
    where, schema = str(store.path), store.schema
    if schema.reward is None:
        fix = without_rewards(store, "record rewards too, or clone the behaviour: offbook train bc")
        raise DataError(where, expected="recordings with a reward", got="none", fix=fix)
    if len(schema.actions) != 1 or schema.action_spec().choices is not None:
        got = f"{len(schema.actions)} fields of actions" if len(schema.actions) != 1 else "discrete ones"
        fix = "record with one Box action space, or clone the behaviour: offbook train bc"
        raise DataError(where, expected="one field of continuous actions", got=got, fix=fix)
    if not schema.observation_spec().state:
        fix = "record the state too, or clone the behaviour: offbook train bc --cameras"
        raise DataError(where, expected="a low-dimensional part of the state", got="none", fix=fix)
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        fix = "start offbook without torchrun"
        raise ConfigError("torchrun", expected="one process", got=str(processes), fix=fix)
    chosen = choose_observation(store, config.parts)
    _episodes(store, [name for name, _ in chosen.state])
    return chosen


def _episodes(store: EpisodeStore, parts: Sequence[str]) -> np.ndarray:
    reward = store.schema.reward or ""
    # Poor episodes tell what to avoid, so that success does not matter.
    return choose_episodes(store, [*parts, *store.schema.actions, reward], held_out=0.0)[0]


def train_offline(
    store: EpisodeStore, config: OfflineConfig, run: RunDirectory, *, resume: bool = False
) -> OfflinePolicy:
    """Learns a policy from recorded rewards and saves it as the run's checkpoint `last`.

    Bounds of actions that are not finite are replaced by the range of the recorded actions.

    Args:
        store: the recordings, of good and poor behaviour; episodes that the store holds out are not learnt from.
        config: see `OfflineConfig`.
        run: where metrics and checkpoints go.
        resume: continue an interrupted training. On the CPU the result is equal to the last bit.

    Raises:
        ConfigError: see `check_offline`.
        DataError: likewise; or a value is NaN or infinite.

    Source: see `OfflineConfig`, and `iql_loss`, `td3bc_loss` and `cql_loss` in `offbook.learning.actor_critic`.
    """
    observation = check_offline(store, config)
    parts = [name for name, _ in observation.state]
    episodes, action, reward = _episodes(store, parts), store.schema.actions[0], store.schema.reward or ""
    normalizer = Normalizer.fit(store, parts, episodes)
    for name, count in normalizer.constants.items():
        note(f"{count} of {normalizer.mean[name].size} entries of {name} never vary and tell nothing")
    data = Transitions.read(store, parts, action, reward, episodes)
    meta = PolicyMeta(
        name=f"{config.algorithm}-{run.path.name}", observation=observation, action=store.schema.action_spec()
    )
    provenance = {
        "environment": store.schema.environment,
        "rate_hz": store.schema.rate_hz,
        "recordings": {"sha256": store.digest, "episodes": len(episodes)},
    }
    model = _model(data, normalizer, parts, meta, config)

    def keep(step: int, trained: nn.Module) -> Mapping[str, float]:
        _policy(trained, meta, provenance).save(run.checkpoint())
        return {}

    result = fit(
        model,
        partial(_batch, data, config),
        lambda module, batch, rng: module(batch, rng),
        config.fit,
        run,
        resume=resume,
        hooks=[(config.save_every, keep)],
    )
    return _policy(result.module.cpu(), meta, provenance)


def _policy(model: nn.Module, meta: PolicyMeta, provenance: Mapping[str, Any]) -> OfflinePolicy:
    if not isinstance(model, ActorCritic):
        raise TypeError("fit hands on the module that it was given")
    return OfflinePolicy(model.actor, meta, provenance)


def _model(
    data: Transitions, normalizer: Normalizer, parts: Sequence[str], meta: PolicyMeta, config: OfflineConfig
) -> ActorCritic:
    size, action = meta.observation.state_size, meta.action
    # The initial weights come from the default generator; forked and seeded, it is a function of the seed alone.
    with torch.random.fork_rng():
        torch.manual_seed(int(generator(config.fit.seed, "weights").integers(2**62)))
        actor = Actor(config.algorithm, size, action.size, config.hidden, config.depth)
        delay = config.policy_delay if config.algorithm == "td3bc" else 1
        model = ActorCritic(actor, _loss(config), target_rate=config.target_rate, move_every=delay)
    mean, std = (
        np.concatenate([statistic[name].reshape(-1) for name in parts]).astype(np.float32)
        for statistic in (normalizer.mean, normalizer.std)
    )
    low, high = np.asarray(action.low), np.asarray(action.high)
    bounded = np.isfinite(low) & np.isfinite(high)
    low, high = np.where(bounded, low, data.action.min(0)), np.where(bounded, high, data.action.max(0))
    actor.scale((mean, std), (low.astype(np.float32), high.astype(np.float32)))
    return model


def _loss(config: OfflineConfig) -> Loss:
    own = {name: getattr(config, name) for name in _OWN[config.algorithm]}
    if config.algorithm == "iql":
        return partial(iql_loss, gamma=config.gamma, **own)
    if config.algorithm == "td3bc":
        return partial(td3bc_loss, gamma=config.gamma, **own)
    return partial(cql_loss, gamma=config.gamma, alpha=config.cql_alpha, samples=config.samples)


def _batch(data: Transitions, config: OfflineConfig, index: int) -> Mapping[str, Tensor]:
    """Batch number `index`, drawn evenly from all steps."""
    drawn = generator(config.fit.seed, "transitions", index).integers(len(data), size=config.fit.batch_size)
    rows = data.rows[drawn]
    return {
        "state": torch.from_numpy(data.observations[rows]),
        "next_state": torch.from_numpy(data.observations[rows + 1]),
        "action": torch.from_numpy(data.action[drawn]),
        "reward": torch.from_numpy(config.reward_scale * data.reward[drawn] + config.reward_shift),
        "terminated": torch.from_numpy(data.terminated[drawn].astype(np.float32)),
    }
