"""Agents of Stable-Baselines3: their state as a checkpoint, and the recording of everything that one lives through."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from gymnasium import spaces
from torch import Tensor

from offbook.data.store import EpisodeStore
from offbook.errors import ConfigError, needs_extra
from offbook.runs.checkpoint import load_checkpoint, save_checkpoint
from offbook.runs.progress import track
from offbook.runs.seeding import generator, training_seeds
from offbook.sim.adapters import AnyEnv, make
from offbook.sim.play import Played
from offbook.sim.recording import open_recording
from offbook.sim.spaces import ACTION, REWARD, flatten, from_env_action, schema_for

_FIRST_RANDOM = 1000  # steps before the learning starts


def record_replay(
    env_id: str,
    steps: int,
    out: str | Path,
    *,
    seed: int = 0,
    round_steps: int = 10_000,
    settings: Mapping[str, Any] | None = None,
) -> EpisodeStore:
    """Trains soft actor-critic on a task and records all of its episodes, from the first random ones on.

    The training goes in rounds of whole episodes. After each the agent is saved beside the store, and the next begins
    with seeds of its own. So a killed recording, called again, takes the saved agent and the episodes until then, lives
    the begun round once more, and ends with the store that it would have had.

    Args:
        env_id: a task with one vector as observation and continuous actions, such as `"gym:Hopper-v5"`.
        steps: of the environment, at least; the last round is finished.
        out: folder of the store; the agent is in `OUT.agent.safetensors`.
        seed: of weights, exploration and environment.
        round_steps: steps between two saves, at least; the last episode is finished.
        settings: further arguments of `make`.

    Raises:
        ConfigError: the task is none that the agent can learn, or the folder holds another recording.
        MissingExtraError: Stable-Baselines3 is not installed.

    Source: Haarnoja et al., "Soft Actor-Critic Algorithms and Applications" (2018), as Stable-Baselines3 has it.
    """
    out, settings = Path(out), dict(settings or {})
    plan = {"policy": "sac", "seed": seed, "round_steps": round_steps, "settings": settings}
    env = make(env_id, **settings)
    try:
        if not (isinstance(env.observation_space, spaces.Box) and isinstance(env.action_space, spaces.Box)):
            got = f"{env.observation_space} and {env.action_space}"
            raise ConfigError(env_id, expected="one vector and continuous actions", got=got, fix="choose another task")
        source = "the replay of soft actor-critic"
        with open_recording(out, env_id, plan, lambda: schema_for(env, env_id, source=source)) as writer:
            life = _Life(env, seed, out)
            known, left = len(EpisodeStore.open(out)), max(steps - life.steps, 0)
            for episode in track(life.go(steps, round_steps), f"training on {env_id}", total=left):
                # What was lived after the last save, before an interruption, is lived again, but stands there already.
                if episode is not None and life.episodes > known:
                    writer.append(
                        episode.fields,
                        terminated=episode.terminated,
                        truncated=episode.truncated,
                        task=env_id,
                        source="sac",
                        seed=episode.seed,
                    )
    finally:
        env.close()
    return EpisodeStore.open(out)


class _Life:
    """One agent in one environment, from its birth or from where it was saved.

    Attributes:
        steps: lived so far.
        episodes: lived so far.
    """

    def __init__(self, env: AnyEnv, seed: int, out: Path) -> None:
        with needs_extra("rl"):
            from stable_baselines3 import SAC
            from stable_baselines3.common.logger import configure
        self._env, self._seed, self._saved = env, seed, out.with_name(f"{out.name}.agent.safetensors")
        first = int(generator(seed, "agent").integers(2**31))
        # Half the usual width: two processor cores are to finish, and a mixture of good and bad is what is wanted.
        width = {"net_arch": [128, 128]}
        self._agent = SAC("MlpPolicy", env, seed=first, device="cpu", policy_kwargs=width)
        self._agent.set_logger(configure(None, []))
        self._rounds = self.steps = self.episodes = 0
        store = EpisodeStore.open(out)
        # An agent that outlived its recordings begins anew.
        if self._saved.exists() and len(store) >= (saved := load_checkpoint(self._saved, "sac")).record["lived"][2]:
            self._rounds, self.steps, self.episodes, self._agent._n_updates = saved.record["lived"]
            load_agent_state(self._agent, saved.values)
            for number in range(self.episodes):
                episode = store.episode(number)
                seen, actions, rewards = (episode.fields[name] for name in ("observation", ACTION, REWARD))
                for t in range(len(actions)):
                    ended = episode.terminated and t == len(actions) - 1
                    self._remember(seen[t], seen[t + 1], actions[t], rewards[t], ended)

    def go(self, steps: int, round_steps: int) -> Iterator[Played | None]:
        """Lives on; gives None for each step but an episode's last, and for that one the episode."""
        while self.steps < steps:
            target = self.steps + round_steps
            rng = generator(self._seed, "replay round", self._rounds)
            self._agent.set_random_seed(int(rng.integers(2**31)))
            while self.steps < target:
                yield from self._episode(rng)
            self._rounds += 1
            lived = [self._rounds, self.steps, self.episodes, self._agent._n_updates]
            save_checkpoint(self._saved, "sac", agent_state(self._agent), {"lived": lived})

    def _episode(self, rng: np.random.Generator) -> Iterator[Played | None]:
        env, space = self._env, cast(spaces.Box, self._env.action_space)
        seed = training_seeds(self._seed, 1, start=self.episodes)[0]
        now, _ = env.reset(seed=seed)
        seen, actions, rewards, terminated, truncated = [now], [], [], False, False
        while not (terminated or truncated):
            if self.steps < _FIRST_RANDOM:
                action = rng.uniform(space.low, space.high).astype(space.dtype)
            else:
                action, _ = self._agent.predict(now, deterministic=False)
            after, reward, terminated, truncated, _ = env.step(action)
            self._remember(now, after, action, float(reward), terminated)
            if self.steps >= _FIRST_RANDOM:
                self._agent.train(gradient_steps=1, batch_size=self._agent.batch_size)
            now, self.steps = after, self.steps + 1
            seen.append(now)
            actions.append(from_env_action(space, action))
            rewards.append(reward)
            if not (terminated or truncated):
                yield None
        self.episodes += 1
        leaves = [flatten(env.observation_space, one) for one in seen]
        yield Played(
            seed=seed,
            fields={
                **{name: np.stack([leaf[name] for leaf in leaves]) for name in leaves[0]},
                ACTION: np.stack(actions),
                REWARD: np.array(rewards),
            },
            rewards=np.array(rewards),
            terminated=terminated,
            truncated=truncated and not terminated,
            success=None,
            score=None,
        )

    def _remember(self, now: Any, after: Any, action: Any, reward: float, terminated: bool) -> None:
        scaled = self._agent.policy.scale_action(np.asarray(action))
        # A limit of time is no end: what the buffer calls done is an end of the task.
        one = (np.asarray(value)[None] for value in (now, after, scaled, reward, terminated))
        memory: Any = self._agent.replay_buffer
        memory.add(*one, [{}])


def agent_state(agent: Any) -> dict[str, Tensor]:
    """The weights of a soft actor-critic of Stable-Baselines3 and the state of its optimisers, by name."""
    tensors = {"log_ent_coef": agent.log_ent_coef}
    for module, state in agent.get_parameters().items():
        if "param_groups" not in state:
            tensors |= {f"{module}/{name}": tensor for name, tensor in state.items()}
            continue
        for index, moments in state["state"].items():
            tensors |= {f"{module}/{index}/{name}": moment for name, moment in moments.items()}
    return tensors


def load_agent_state(agent: Any, tensors: Mapping[str, Tensor]) -> None:
    """Gives an agent what `agent_state` took from one of the same kind."""
    parameters = agent.get_parameters()
    for module, state in parameters.items():
        mine = {
            name.removeprefix(f"{module}/"): value for name, value in tensors.items() if name.startswith(f"{module}/")
        }
        if "param_groups" not in state:
            parameters[module] = mine
            continue
        state["state"] = {}
        for name, value in mine.items():
            index, _, moment = name.partition("/")
            state["state"].setdefault(int(index), {})[moment] = value
    agent.set_parameters(parameters, device="cpu")
    agent.log_ent_coef.data.copy_(tensors["log_ent_coef"])
