"""Recordings of a linear system, s' = A s + B a, which knows what each thing told from another should be."""

import numpy as np

from offbook.client.protocol import ActionSpec
from offbook.data.store import EpisodeStore, FieldSpec, Schema

A = np.array([[0.9, 0.2, 0.0], [-0.2, 0.8, 0.1], [0.0, 0.1, 0.7]])
B = np.array([[0.5, 0.0], [0.1, 0.4], [0.0, 0.6]])
BOUNDS = ActionSpec(size=2, low=(-1.0, -1.0), high=(1.0, 1.0))
REWARD = FieldSpec("reward", "float32", (), "reward")
FIELDS = (FieldSpec("s", "float32", (3,), "observation"), FieldSpec("a", "float32", (2,), "action"), REWARD)


def walk(steps, rng):
    """T + 1 states, T random actions, and rewards for being near the origin."""
    states, actions = [rng.normal(size=3)], rng.uniform(-1, 1, (steps, 2))
    for action in actions:
        states.append(A @ states[-1] + B @ action)
    return {"s": np.array(states), "a": actions, "reward": -np.abs(states[1:]).sum(1)}


def record(path, lengths=(20,) * 12, *, seed=0, fields=FIELDS, action=BOUNDS, change=lambda number, values: None):
    """A store of such episodes; `change(number, values)` works on the values by field in place, None for a lack."""
    rng = np.random.default_rng(seed)
    with EpisodeStore.create(path, Schema(fields, environment="test:linear", rate_hz=10.0, action=action)) as writer:
        for number, steps in enumerate(lengths):
            values = walk(steps, rng)
            change(number, values)
            typed = {
                field.name: None if values[field.name] is None else values[field.name].astype(field.dtype)
                for field in fields
            }
            writer.append(typed, terminated=False, truncated=True, sync=False)
    return EpisodeStore.open(path)


def lacking(name, episodes):
    """A change: these episodes do not have that field."""

    def change(number, values):
        if number in episodes:
            values[name] = None

    return change
