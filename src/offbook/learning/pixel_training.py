"""How an agent that sees pictures lives: it acts, learns from whole episodes, and is kept so that it can go on.

All that is random is a function of the seed and the step. An episode is on disk before it is learnt from; a life
that was interrupted takes its episodes from there and learns what it had learnt, on a CPU to the last bit.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from offbook.client.protocol import ObservationSpec, PolicyMeta
from offbook.errors import CheckpointError, ConfigError, OffbookError, check_settings
from offbook.learning.pixel_agent import Exploration, PixelAgent, PixelNetwork, PixelSizes, TwinCritic, draw_weights
from offbook.learning.pixel_policy import PixelPolicy, from_unit, to_unit
from offbook.learning.pixel_replay import PaidFor, PixelReplay
from offbook.learning.states import join_state, split_state
from offbook.runs.checkpoint import load_checkpoint, save_checkpoint
from offbook.runs.directory import RunDirectory
from offbook.runs.progress import track
from offbook.runs.seeding import evaluation_seeds, generator, torch_generator, training_seeds
from offbook.sim.adapters import AnyEnv, hold, make
from offbook.sim.play import play
from offbook.sim.recording import open_recording
from offbook.sim.spaces import (
    ACTION,
    REWARD,
    action_spec,
    flatten,
    from_env_action,
    observation_leaves,
    schema_for,
    to_env_action,
)

KIND = "pixel-training"

Explores = Callable[[int, int, torch.device], Exploration]
"""Makes an exploration for maps and actions of some sizes, on a device."""


@dataclass(frozen=True, kw_only=True)
class PixelConfig:
    """How to learn from pictures. Steps are control steps of the environment, an action that is held counts each time.

    Attributes:
        steps: of a life, at least; the last episode is finished.
        camera: whose pictures are looked at.
        image_size: their height and width in pixels, where the environment draws them for us.
        repeat: steps for which an action is held; a picture is seen before each action.
        sizes: of the networks.
        batch_size: transitions of an update.
        n_steps: actions between the two ends of a transition.
        gamma: discount of an action.
        learning_rate: of Adam.
        tau: share of the critics that their target takes over in an update.
        shift: largest random shift of pictures in pixels, up or down and sideways.
        update_every: actions between two updates.
        noise_start: deviation of the noise on actions, from -1 to 1, at first.
        noise_end: its deviation in the end.
        noise_steps: steps over which it falls.
        noise_clip: largest noise in what is learnt from.
        random_steps: steps with random actions at first, before anything is learnt.
        replay: actions of the past that are learnt from; older ones stay on disk.
        evaluate_every: steps between two tests without noise, after whole episodes; 0 for none.
        evaluate_episodes: of a test, on seeds that no training has.
        checkpoint_every: steps between two checkpoints to resume from, after whole episodes.
        seed: of all that is random.
        device: auto takes an accelerator where there is one.

    Source: the defaults are those of the code of Yarats et al. (2021) for easy tasks, as the code of Kim et al. (2023),
    which is made of it, has them.
    """

    steps: int = 1_000_000
    camera: str = "image"
    image_size: int = 84
    repeat: int = 2
    sizes: PixelSizes = field(default_factory=PixelSizes)
    batch_size: int = 256
    n_steps: int = 3
    gamma: float = 0.99
    learning_rate: float = 1e-4
    tau: float = 0.01
    shift: int = 4
    update_every: int = 2
    noise_start: float = 1.0
    noise_end: float = 0.1
    noise_steps: int = 200_000
    noise_clip: float = 0.3
    random_steps: int = 4_000
    replay: int = 1_000_000
    evaluate_every: int = 10_000
    evaluate_episodes: int = 10
    checkpoint_every: int = 20_000
    seed: int = 0
    device: Literal["auto", "cpu"] = "auto"

    def __post_init__(self) -> None:
        positive = ("steps", "repeat", "n_steps", "update_every", "noise_steps", "replay", "evaluate_episodes")
        checks = {name: (getattr(self, name) >= 1, "1 or more") for name in (*positive, "checkpoint_every")}
        natural = ("random_steps", "evaluate_every", "seed")
        checks |= {name: (getattr(self, name) >= 0, "0 or more") for name in natural}
        noises = ("noise_start", "noise_end", "noise_clip")
        checks |= {name: (0 <= getattr(self, name) < math.inf, "a number, 0 or more") for name in noises}
        checks |= {
            "image_size": (16 <= self.image_size <= 4_096, "16 to 4096 pixels"),
            "batch_size": (self.batch_size >= 2, "2 or more"),
            "gamma": (0 <= self.gamma <= 1, "0 to 1"),
            "learning_rate": (0 < self.learning_rate < math.inf, "a positive number"),
            "tau": (0 < self.tau <= 1, "above 0, up to 1"),
            "shift": (0 <= self.shift <= 64, "0 to 64 pixels"),
        }
        check_settings(self, checks)

    def noise(self, step: int) -> float:
        """The deviation of the noise at a step.

        Example:
            >>> PixelConfig(noise_start=1.0, noise_end=0.2, noise_steps=100).noise(25)
            0.8
        """
        return self.noise_start + (self.noise_end - self.noise_start) * min(step / self.noise_steps, 1.0)


def train_pixels(
    env_id: str,
    config: PixelConfig,
    run: RunDirectory,
    *,
    resume: bool = False,
    settings: Mapping[str, Any] | None = None,
    explores: Explores | None = None,
    paid_for: PaidFor | None = None,
) -> PixelPolicy:
    """Lets an agent live in a task that it sees through a camera, and saves the policy as the run's checkpoint `last`.

    Its episodes are recordings in the run's folder `replay`, a store like any other, with a row for each action.

    Args:
        env_id: a task with a camera and continuous actions, such as `"dmc:walker-walk"`; see `offbook.sim.adapters`.
        config: see `PixelConfig`.
        run: where metrics, checkpoints and episodes go.
        resume: go on with the life in that folder. On the CPU the result is equal to the last bit.
        settings: further arguments of `make`.
        explores: makes what pays the agent beside its reward.
        paid_for: what the steps of an episode are paid instead of the task's reward, which then is not looked at. It
            should depend on the episode alone, for an interrupted life asks again.

    Raises:
        ConfigError: the task has no such camera, or actions that are not continuous.
        DataError: a reward is not finite.
        OffbookError: the critics diverged.
        CheckpointError: what is to be resumed does not fit.
    """
    with ExitStack() as stack:
        stack.callback(run.close)
        world = _World(env_id, config, settings or {})
        stack.callback(world.close)
        life = _Life(world, config, run, explores, paid_for)
        life.replay = stack.enter_context(life.open_replay())
        if resume:
            life.restore()
        for _ in track(life.go(), f"learning {env_id}", total=max(0, -(-config.steps // config.repeat) - life.actions)):
            pass
    return life.policy


def check_pixels(env_id: str, config: PixelConfig, settings: Mapping[str, Any] | None = None) -> None:
    """Refuses what `train_pixels` would refuse, before a folder is made.

    Raises:
        ConfigError: the task has no such camera, or actions that are not continuous.
    """
    _World(env_id, config, settings or {}).close()


class _Held(gym.Wrapper[Any, Any, Any, Any]):
    """Holds each action for some steps, or to the end of the episode, and adds up what they pay."""

    def __init__(self, env: AnyEnv, repeat: int) -> None:
        super().__init__(env)
        self._repeat, rate = repeat, env.metadata.get("control_hz")
        self.metadata = {**env.metadata, **({} if rate is None else {"control_hz": rate / repeat})}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """So many steps."""
        return hold(self.env, action, self._repeat)


class _World:
    """A task as the agent meets it, and once more for tests.

    Attributes:
        env: with actions that are held.
        observation: what the policy wants.
        action: what it gives.
        rate_hz: control steps in a second, if that is known.
    """

    def __init__(self, env_id: str, config: PixelConfig, settings: Mapping[str, Any]) -> None:
        self.env_id, self.settings, self._config = env_id, dict(settings), config
        drawn = config.camera == "image" or env_id.startswith("offbook:")
        self._make = partial(make, env_id, **{**({"image_size": config.image_size} if drawn else {}), **settings})
        try:
            self.env, self._tests = _Held(self._make(), config.repeat), list[AnyEnv]()
        except ConfigError as error:
            raise self._unseen(config.camera, "none") if error.where == "image_size" else error from None
        try:
            leaves = {leaf.name: leaf for leaf in observation_leaves(self.env.observation_space) if leaf.camera}
            self.action = action_spec(self.env.action_space)
            self._check(config.camera, [*leaves])
        except ConfigError:
            self.close()
            raise
        height, width, _ = leaves[config.camera].shape
        self.observation = ObservationSpec(cameras={config.camera: (height, width)})
        self.rate_hz = self.env.env.metadata.get("control_hz")

    def _check(self, camera: str, cameras: list[str]) -> None:
        if camera not in cameras:
            raise self._unseen(camera, ", ".join(cameras) or "none")
        bounds = [*self.action.low, *self.action.high]
        if self.action.choices is not None or not np.isfinite(bounds).all():
            got, fix = str(self.env.action_space), "choose another task"
            raise ConfigError(self.env_id, expected="continuous actions with bounds", got=got, fix=fix)

    def _unseen(self, camera: str, got: str) -> ConfigError:
        fix = "give --camera another name, or choose a task that is drawn"
        return ConfigError(f"cameras of {self.env_id}", expected=f"one called {camera!r}", got=got, fix=fix)

    def test(self, policy: PixelPolicy, episodes: int) -> dict[str, float]:
        """Mean return and success of a policy on the first evaluation seeds."""
        self._tests = self._tests or [_Held(self._make(), self._config.repeat)]
        once = PixelPolicy(policy.module, replace(policy.meta, chunk=1), {})  # the environment holds its actions
        played = [*play(self._tests, once, evaluation_seeds(0, episodes), keep=False)]
        found = {"eval_return": float(np.mean([one.return_ for one in played]))}
        if all(one.success is not None for one in played):
            found["eval_success"] = float(np.mean([bool(one.success) for one in played]))
        return found

    def close(self) -> None:
        """Closes both."""
        for env in (self.env, *self._tests):
            env.close()


class _Life:
    """An agent from its birth on, or from where it was saved.

    Attributes:
        actions: so many so far.
        replay: what it has lived through.
        policy: what it would do.
    """

    replay: PixelReplay

    def __init__(
        self, world: _World, config: PixelConfig, run: RunDirectory, explores: Explores | None, paid_for: PaidFor | None
    ) -> None:
        self.world, self.config, self.run, self.paid_for, self.actions = world, config, run, paid_for, 0
        accelerated = config.device == "auto" and torch.accelerator.is_available()
        self.device = torch.accelerator.current_accelerator() if accelerated else None
        self.device = self.device or torch.device("cpu")
        size, (side,) = world.action.size, world.observation.cameras.values()
        # Weights come from the default generator; forked and seeded, they are a function of the seed alone.
        with torch.random.fork_rng():
            torch.manual_seed(int(generator(config.seed, "weights").integers(2**62)))
            network = PixelNetwork(side, size, config.sizes)
            critic = TwinCritic(network.maps, size, config.sizes)
            for module in (network, critic):
                draw_weights(module)
        self.agent = PixelAgent(
            network.to(self.device), critic.to(self.device), learning_rate=config.learning_rate, tau=config.tau,
            shift=config.shift, clip=config.noise_clip,
        )  # fmt: skip
        self.exploration = None if explores is None else explores(network.maps, size, self.device)
        meta = PolicyMeta(
            name=f"pixels-{run.path.name}", observation=world.observation, action=world.action, chunk=config.repeat
        )
        self.policy = PixelPolicy(network, meta, {"environment": world.env_id, "rate_hz": world.rate_hz, "steps": 0})
        self._losses: list[dict[str, Tensor]] = []

    @property
    def steps(self) -> int:
        return self.actions * self.config.repeat

    def open_replay(self) -> PixelReplay:
        config, world = self.config, self.world
        plan = {"policy": "pixels", "repeat": config.repeat, "seed": config.seed, "settings": world.settings}
        schema = partial(schema_for, world.env, world.env_id, source="an agent that learns from pictures")
        return PixelReplay(
            open_recording(self.run.path / "replay", world.env_id, plan, schema), config.camera,
            partial(to_unit, spec=world.action), stack=config.sizes.stack, n_steps=config.n_steps, gamma=config.gamma,
            capacity=config.replay,
        )  # fmt: skip

    def go(self) -> Iterator[None]:
        """Lives on to the end, a sign for each action."""
        while self.steps < self.config.steps:
            begun, waiting = self.steps, self.replay.waiting
            # What an interrupted life had lived is on disk: it is learnt beside, not lived again.
            for _ in self._episode() if waiting is None else range(waiting.length):
                self._learn()
                yield
            self.replay.take(self.paid_for)
            self._report(begun)

    def _episode(self) -> Iterator[None]:
        world, spec = self.world.env, self.world.action
        space = world.observation_space
        seed = training_seeds(self.config.seed, 1, start=self.replay.episodes)[0]
        observation, _ = world.reset(seed=seed)
        seen, actions, rewards, over = [flatten(space, observation)], [], [], False
        film = deque([seen[0][self.config.camera]] * self.config.sizes.stack, self.config.sizes.stack)
        while not over:
            action = to_env_action(world.action_space, from_unit(self._act(film), spec))
            observation, reward, terminated, truncated, info = world.step(action)
            seen.append(flatten(space, observation))
            film.append(seen[-1][self.config.camera])
            actions.append(from_env_action(world.action_space, action))
            rewards.append(float(reward))
            over = terminated or truncated
            yield
        fields = {name: np.stack([one[name] for one in seen]) for name in seen[0]}
        self.replay.append(
            {**fields, ACTION: np.stack(actions), REWARD: np.array(rewards)}, terminated=terminated,
            truncated=truncated and not terminated, task=self.world.env_id, source="pixels", seed=seed,
            success=info.get("success"), score=info.get("score"),
        )  # fmt: skip

    @torch.inference_mode()
    def _act(self, film: deque[np.ndarray]) -> Float32[np.ndarray, " action"]:
        """From -1 to 1."""
        rng, size = generator(self.config.seed, "act", self.actions), self.world.action.size
        if self.steps < self.config.random_steps:
            return rng.uniform(-1, 1, size).astype(np.float32)
        told = self.policy.module(torch.from_numpy(np.stack(film))[None].to(self.device))[0].cpu().numpy()
        drawn = self.config.noise(self.steps) * rng.standard_normal(size)
        return np.asarray(told + drawn, np.float32).clip(-1, 1)

    def _learn(self) -> None:
        """What comes after each action."""
        config = self.config
        self.actions += 1
        if self.steps <= config.random_steps or self.actions % config.update_every or not len(self.replay):
            return
        batch = self.replay.sample(config.batch_size, generator(config.seed, "replay", self.actions))
        batch = replace(batch, **{name: tensor.to(self.device) for name, tensor in vars(batch).items()})
        if self.exploration is not None:
            self.exploration.step = self.steps
        rng = torch_generator(config.seed, "update", self.actions)
        self._losses.append(self.agent.update(batch, config.noise(self.steps), rng, self.exploration))

    def _report(self, begun: int) -> None:
        """After an episode: metrics, a test, a checkpoint."""
        config, episode = self.config, self.replay.store.episode(self.replay.episodes - 1)
        row = {"return": episode.return_, "length": episode.length, "noise": config.noise(self.steps)}
        row |= {} if episode.success is None else {"success": float(episode.success)}
        row["paid"] = float(self.replay.rewards[-episode.length :].mean())
        losses, self._losses = self._losses, []
        if losses:
            row |= {name: float(torch.stack([one[name] for one in losses]).mean()) for name in losses[0]}
            if not math.isfinite(row["critic_loss"]):
                where, fix = f"{self.world.env_id}, step {self.steps}", "lower --learning-rate, or look at the rewards"
                raise OffbookError(where, expected="a finite loss of the critics", got="NaN or infinity", fix=fix)
        if self.exploration is not None:
            row |= {f"explore/{name}": value for name, value in self.exploration.report.items()}

        def due(every: int) -> bool:
            return bool(every) and (self.steps // every > begun // every or self.steps >= config.steps)

        if due(config.evaluate_every):
            row |= self.world.test(self.policy, config.evaluate_episodes)
        self.run.log(self.steps, **row)
        if due(config.checkpoint_every):
            self._save()

    def _save(self) -> None:
        self.policy.provenance["steps"] = self.steps
        self.policy.save(self.run.checkpoint())
        explored = {} if self.exploration is None else self.exploration.state_dict()
        tensors, record = split_state({"agent": self.agent.state_dict(), "exploration": explored}, "state")
        lived = {"actions": self.actions, "episodes": self.replay.episodes}
        rewards = {"rewards": torch.from_numpy(self.replay.rewards)}
        save_checkpoint(self.run.checkpoint("training"), KIND, {**tensors, **rewards}, {**lived, "state": record})

    def restore(self) -> None:
        """Goes back to the last checkpoint, if there is one."""
        path = self.run.checkpoint("training")
        if path.exists():
            saved = load_checkpoint(path, KIND)
            try:
                self.actions, episodes = int(saved.record["actions"]), int(saved.record["episodes"])
                self.replay.restore(saved.values["rewards"].numpy(), episodes)
                state = join_state(saved.values, saved.record["state"])
                self.agent.load_state_dict(state["agent"])
                if self.exploration is not None:
                    self.exploration.load_state_dict(state["exploration"])
            except (KeyError, RuntimeError, TypeError, ValueError) as error:
                fix = "resume with the configuration in the run's config.json"
                got = f"another one ({str(error).strip().splitlines()[0]})"
                raise CheckpointError(str(path), expected="the state of this very life", got=got, fix=fix) from error
            self.policy.provenance["steps"] = self.steps
        self.run.truncate_metrics(self.steps)
