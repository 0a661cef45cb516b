"""Made-up episodes, each a function of its number and length."""

import numpy as np

from offbook.data.store import FieldSpec, Schema

SCHEMA = Schema(
    (
        FieldSpec("joints", "float64", (3,), "observation", "rad"),
        FieldSpec("front", "uint8", (16, 16, 3), "observation"),
        FieldSpec("action", "float32", (2,), "action"),
        FieldSpec("reward", "float64", (), "reward"),
        FieldSpec("mode", "int32", (), "other"),
    ),
    environment="gym:Made-v0",
    rate_hz=10.0,
)


def values(number: int, length: int) -> dict[str, np.ndarray | None]:
    """The values of an episode, a function of its number and length."""
    random = np.random.default_rng([number, length])
    return {
        "joints": random.normal(3.0, 2.0, (length + 1, 3)),
        "front": random.integers(0, 256, (length + 1, 16, 16, 3), dtype=np.uint8),
        "action": random.uniform(-1, 1, (length, 2)).astype(np.float32),
        "reward": random.normal(size=length),
        "mode": random.integers(0, 9, length, dtype=np.int32),
    }
