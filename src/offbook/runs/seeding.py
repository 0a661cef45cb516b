"""One seed, many independent named streams of random numbers; nothing here touches a global generator."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from offbook.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import torch

# Simulators differ in the seeds that they accept; all take 31 bits. Half for training, half for evaluation.
_HALF = 2**30


def _sequence(seed: int, names: tuple[str | int, ...]) -> np.random.SeedSequence:
    import numpy as np

    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError("seed", expected="an integer of 0 or more", got=repr(seed), fix="choose another seed")
    key: list[int] = []
    for name in names:
        # The type is hashed too, so that the streams 1 and "1" differ.
        digest = hashlib.sha256(f"{type(name).__name__}:{name}".encode()).digest()
        key += [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4)]
    return np.random.SeedSequence(seed, spawn_key=key)


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """A NumPy generator that depends on the seed and the names alone, independent of every other name's.

    Args:
        seed: the run's seed, 0 or more.
        names: what the numbers are for, such as `"data", step`.

    Raises:
        ConfigError: the seed is negative or no integer.

    Example:
        >>> a, b = generator(0, "data", 3), generator(0, "data", 3)
        >>> bool((a.random(4) == b.random(4)).all())
        True
    """
    import numpy as np

    return np.random.Generator(np.random.PCG64(_sequence(seed, names)))


def torch_generator(seed: int, *names: str | int) -> torch.Generator:
    """A torch generator on the CPU that depends on the seed and the names alone; see `generator`."""
    import torch

    low, high = (int(word) for word in _sequence(seed, names).generate_state(2))
    return torch.Generator().manual_seed((high << 32 | low) & (2**63 - 1))


def training_seeds(seed: int, n: int, start: int = 0) -> list[int]:
    """Seeds for `env.reset` while recording or training; never one of `evaluation_seeds`.

    Args:
        seed: the run's seed.
        n: how many, 0 to 2**30.
        start: index of the first, so that a resumed run continues the same list.

    Returns:
        Different integers below 2**30.

    Example:
        >>> training_seeds(0, 5)[2:] == training_seeds(0, 3, start=2)
        True
    """
    return _range(seed, n, start, "training", 0)


def evaluation_seeds(seed: int, n: int) -> list[int]:
    """Seeds for `env.reset` in evaluation: the same for every arm of a comparison, never a training seed.

    Example:
        >>> set(evaluation_seeds(0, 100)) & set(training_seeds(0, 100))
        set()
    """
    return _range(seed, n, 0, "evaluation", _HALF)


def _range(seed: int, n: int, start: int, name: str, offset: int) -> list[int]:
    if not 0 <= n <= _HALF:
        raise ConfigError("number of seeds", expected="0 to 2**30", got=str(n), fix="ask for fewer episodes")
    first = int(_sequence(seed, (name,)).generate_state(1)[0])
    return [offset + (first + start + i) % _HALF for i in range(n)]
