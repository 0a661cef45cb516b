"""A trivial world for cloning: a point walks to a goal that it is told, or that it sees as a bright square."""

import numpy as np

from offbook.client.protocol import ActionSpec, Observation
from offbook.data.store import EpisodeStore, FieldSpec, Schema

SIDE = 24
STEPS = 12


def picture(goal):
    """A frame with a bright square where the goal in [-1, 1]^2 is."""
    frame = np.full((SIDE, SIDE, 3), 30, np.uint8)
    column, row = np.round((goal + 1) / 2 * (SIDE - 5)).astype(int)
    frame[row : row + 5, column : column + 5] = 220
    return frame


def expert(place, goal):
    """A linear law."""
    return np.clip(0.5 * (goal - place), -0.3, 0.3).astype(np.float32)


def starts(episodes, seed):
    return np.random.default_rng(seed).uniform(-0.9, 0.9, (episodes, 2, 2)).astype(np.float32)


def schema(discrete=False):
    action = (
        ActionSpec(size=1, low=(0.0,), high=(3.0,), choices=4)
        if discrete
        else ActionSpec(size=2, low=(-0.3, -0.3), high=(0.3, 0.3))
    )
    fields = (
        FieldSpec("place", "float32", (2,), "observation"),
        FieldSpec("goal", "float32", (2,), "observation"),
        FieldSpec("front", "uint8", (SIDE, SIDE, 3), "observation"),
        FieldSpec("action", "int64", (), "action") if discrete else FieldSpec("action", "float32", (2,), "action"),
        FieldSpec("reward", "float32", (), "reward"),
    )
    return Schema(fields, environment="test:point", rate_hz=10.0, action=action)


def record(path, episodes=30, *, seed=0, discrete=False, success=True, poison=None):
    """A store of expert episodes; `poison` is an episode whose action is NaN at step 4."""
    with EpisodeStore.create(path, schema(discrete)) as writer:
        for number, (place, goal) in enumerate(starts(episodes, seed)):
            places, actions = [place], []
            for _ in range(STEPS):
                move = expert(places[-1], goal)
                if discrete:
                    axis = int(np.abs(move).argmax())
                    index = 2 * axis + int(move[axis] > 0)
                    actions.append(index)
                    move = np.zeros(2, np.float32)
                    move[axis] = 0.15 * (1 if index % 2 else -1)
                else:
                    actions.append(move)
                places.append(places[-1] + move)
            actions = np.asarray(actions, np.int64 if discrete else np.float32)
            if poison == number:
                actions[4, 0] = np.nan
            fields = {
                "place": np.asarray(places, np.float32),
                "goal": np.repeat(goal[None], STEPS + 1, 0),
                "front": np.repeat(picture(goal)[None], STEPS + 1, 0),
                "action": actions,
                "reward": np.full(STEPS, number % 7, np.float32),
            }
            known = success if isinstance(success, bool) or success is None else success(number)
            writer.append(fields, terminated=False, truncated=True, success=known)
    return EpisodeStore.open(path)


def distances(policy, episodes=40, seed=99):
    """How far from the goal the policy ends, each episode started anew."""
    place, goal = starts(episodes, seed).transpose(1, 0, 2)
    parts = {"place": None, "goal": goal}
    sessions = tuple(map(str, range(episodes)))
    policy.reset(sessions, [""] * episodes)
    frames = np.stack([picture(g) for g in goal])
    step = 0
    while step < STEPS:
        parts["place"] = place
        state = [parts[name] for name, _ in policy.meta.observation.state]
        observation = Observation(
            sessions=sessions,
            state=np.concatenate([np.zeros((episodes, 0), np.float32), *state], 1).astype(np.float32),
            images=dict.fromkeys(policy.meta.observation.cameras, frames),
            time=np.full(episodes, step / 10),
        )
        for action in policy.infer(observation).transpose(1, 0, 2):
            place, step = place + action, step + 1
    return np.linalg.norm(place - goal, axis=1)
