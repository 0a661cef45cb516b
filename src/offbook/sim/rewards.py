"""Rewards that nobody recorded: those of a task of the DeepMind control suite, from the recorded state of the physics.

One recording of exploration, in which no task was in view, so serves every task of the same body. What ExoRL publishes
for `walker`, `cheetah`, `quadruped` and `cartpole` is covered, as far as the suite has the task. Its `jaco`,
`point_mass_maze` and `cheetah_run_backward` are no tasks of the suite.

Source: https://arxiv.org/abs/2201.13425; `replay_buffer.py` of https://github.com/denisyarats/exorl (the rewards are
worked out when the recordings are read; the action is not set there, so that it costs nothing).
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Float64

from offbook.data.formats import Recordings, new_folder, write_whole
from offbook.data.formats.limits import size_of
from offbook.data.index import Outcome
from offbook.data.returns import PHYSICS
from offbook.data.schema import FieldSpec
from offbook.data.splits import read_splits
from offbook.data.store import EpisodeStore
from offbook.data.video import Video
from offbook.errors import ConfigError, DataError
from offbook.sim.adapters import ControlSuite, make
from offbook.sim.spaces import REWARD

_TARGET = "a target that every reset draws"
_HIDDEN = {
    "dog": "forces at the feet",
    "finger-turn_easy": _TARGET,
    "finger-turn_hard": _TARGET,
    "fish-swim": _TARGET,
    "manipulator": _TARGET,
    "reacher": _TARGET,
    "stacker": _TARGET,
    "swimmer": _TARGET,
}
"""Domains and tasks whose rewards need more than the state and the action."""
_LEAVE = "leave this episode out"


class TaskRewards:
    """The rewards of a task, equal to those that dm_control gives while it plays.

    They agree to 1e-6 for a state of float64, as dm_control has it.

    Args:
        task: such as `"dmc:walker-run"`; `dmc:` may be left out.

    Attributes:
        task: its name with the library.

    Raises:
        ConfigError: there is no such task, or its rewards depend on more than the state and the action.
        MissingExtraError: dm_control is not installed.

    Example:
        >>> stand = TaskRewards("walker-stand")
        >>> upright = np.zeros((1, 18))
        >>> stand.task, stand(upright, np.zeros((1, 6)), "upright").tolist()
        ('dmc:walker-stand', [1.0])
    """

    def __init__(self, task: str) -> None:
        name = task.removeprefix("dmc:")
        self.task = f"dmc:{name}"
        hidden = _HIDDEN.get(name, _HIDDEN.get(name.partition("-")[0]))
        if hidden:
            expected, fix = "rewards that follow from the state and the action", "choose another task"
            raise ConfigError(f"task {self.task!r}", expected=expected, got=f"ones that depend on {hidden}", fix=fix)
        # Closed when it is dropped.
        self._environment = make(self.task, physics=True)
        self._environment.reset(seed=0)  # some tasks finish their model then
        shown: Any = self._environment.observation_space
        self._sizes = {"physics": shown["physics"].shape, "action": self._environment.action_space.shape}

    def __call__(self, states: np.ndarray, actions: np.ndarray, where: str) -> Float64[np.ndarray, " steps"]:
        """The rewards of T actions, each with the state that it led to.

        Args:
            states: positions, velocities and activations of the physics after each action, (T, state).
            actions: what was done, (T, action).
            where: names them in messages.

        Raises:
            DataError: they have another size than the task's, are not finite, or no simulation can be in such a state.
        """
        from dm_control.rl.control import PhysicsError

        for what, values in (("physics", states), ("action", actions)):
            if values.shape[1:] != self._sizes[what]:
                expected, got = f"shape {self._sizes[what]} at each step, as {self.task} has", f"{values.shape[1:]}"
                fix = "name a task of the body that was recorded"
                raise DataError(f"{where}, {what}", expected=expected, got=got, fix=fix)
            wrong = np.flatnonzero(~np.isfinite(values).all(axis=1))
            if len(wrong):
                at, got = f"{where}, {what}, step {wrong[0]}", f"NaN or infinity at {len(wrong)} steps"
                raise DataError(at, expected="finite numbers", got=got, fix=_LEAVE)
        rewards, world = np.empty(len(actions)), cast(ControlSuite, self._environment.unwrapped)
        for step, (state, action) in enumerate(zip(states, actions, strict=True)):
            try:
                rewards[step] = world.reward_of(state, action)
            except PhysicsError as error:
                at, expected = f"{where}, physics, step {step}", "a state that the simulation can be in"
                raise DataError(at, expected=expected, got=str(error), fix=_LEAVE) from error
        return rewards


def add_rewards(store: EpisodeStore, task: str, out: str | Path) -> EpisodeStore:
    """Copies recordings and gives them the rewards of a task; the new store appears under its name when it is whole.

    Only the rewards, the task of each episode and the environment's name change. The recordings must hold the state of
    the physics as the observation "physics", as `make("dmc:...", physics=True)` shows it.

    Args:
        store: the recordings.
        task: see `TaskRewards`.
        out: the new store's folder, new or empty.

    Raises:
        ConfigError: see `TaskRewards`; or the recordings are of another domain.
        DataError: an episode lacks the state or the action, or they do not fit; or the folder is not empty.
    """
    rewards = TaskRewards(task)
    schema, name = store.schema, store.schema.reward or REWARD
    _check(store, rewards.task)
    reward = FieldSpec(name, "float64", (), "reward")
    known = tuple(reward if spec.name == name else spec for spec in schema.fields)
    extra = {key: value for key, value in schema.extra.items() if key != "recording"}  # it cannot be gone on with
    extra["rewards"] = {"task": rewards.task, "of": store.digest}
    if splits := read_splits(store):
        extra["splits"] = {group: numbers.tolist() for group, numbers in splits.items()}
    made = replace(
        schema,
        fields=known if name in schema else (*known, reward),
        environment=rewards.task,
        extra=extra,
    )
    folder = new_folder(out)
    recordings = Recordings(
        schema=made, episodes=_rewarded(store, name, rewards), total=len(store), stored=size_of(store.path)
    )
    return write_whole(recordings, str(store.path), folder, "working out rewards")


def _check(store: EpisodeStore, task: str) -> None:
    schema, where = store.schema, str(store.path)
    domain, before = task.partition("-")[0], schema.environment.partition("-")[0]
    if before not in ("", domain):
        fix = "name a task of that domain"
        raise ConfigError(f"task {task!r}", expected=f"one of {before}-...", got="another domain", fix=fix)
    if PHYSICS not in schema.observations:
        imported = PHYSICS in schema
        got = "that before each step only" if imported else "none"
        fix = "import them again, with --task" if imported else "record with make(..., physics=True)"
        raise DataError(where, expected="the state of the physics, after the last step too", got=got, fix=fix)
    if len(schema.actions) != 1:
        fix = "record with one Box action space"
        raise DataError(where, expected="one action field", got=f"{len(schema.actions)}", fix=fix)
    for field in (PHYSICS, *schema.actions):
        if not (present := store.present(field)).all():
            at, fix = f"{where}, episode {int(np.argmin(present))}", "copy the others to a store of their own"
            raise DataError(at, expected=f"the field {field!r}", got="none", fix=fix)


def _rewarded(
    store: EpisodeStore, name: str, rewards: TaskRewards
) -> Iterator[tuple[Mapping[str, np.ndarray | Video | None], Outcome]]:
    fields = [spec.name for spec in store.schema.fields]
    films = [field for field in fields if store.schema[field].video]
    for number in range(len(store)):
        episode = store.episode(number)
        values: dict[str, np.ndarray | Video | None] = {**dict.fromkeys(fields), **episode.fields}
        values |= {film: store.video(film, number) for film in films if film in episode.fields}
        where = f"{store.path}, episode {number}"
        values[name] = rewards(episode.fields[PHYSICS][1:], episode.fields[store.schema.actions[0]], where)
        known = {column.name: getattr(episode, column.name) for column in dataclasses.fields(Outcome)}
        yield values, Outcome(**{**known, "task": rewards.task})
