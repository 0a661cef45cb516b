import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offbook.errors import ConfigError
from offbook.runs.seeding import evaluation_seeds, generator, torch_generator, training_seeds


def test_streams_depend_on_seed_and_every_name() -> None:
    keys = [(0,), (1,), (0, "a"), (0, "b"), (0, "a", "b"), (0, "b", "a"), (0, "ab"), (0, 1), (0, "1"), (0, "a", 1)]
    draws = [tuple(generator(*key).integers(2**62, size=4)) for key in keys]
    assert len(set(draws)) == len(keys)
    assert draws == [tuple(generator(*key).integers(2**62, size=4)) for key in keys]
    torch_draws = [torch.rand(1, generator=torch_generator(*key)).item() for key in keys]
    assert len(set(torch_draws)) == len(keys)


def test_streams_never_change_between_versions() -> None:
    # Recordings and results name their seeds; a change here would silently give them other numbers.
    assert generator(3, "data", 7).integers(1000, size=3).tolist() == [328, 2, 635]
    assert training_seeds(3, 2) == [856814101, 856814102]
    assert evaluation_seeds(3, 2) == [1499937558, 1499937559]


@settings(derandomize=True, max_examples=50, deadline=None)
@given(st.integers(0, 2**64), st.integers(0, 200), st.integers(0, 2**31))
def test_training_and_evaluation_never_meet(seed: int, n: int, start: int) -> None:
    training, evaluation = training_seeds(seed, n, start), evaluation_seeds(seed, n)
    assert len(set(training)) == len(set(evaluation)) == n
    assert all(0 <= s < 2**30 for s in training)
    assert all(2**30 <= s < 2**31 for s in evaluation)
    assert training == training_seeds(seed, n + start, 0)[start:] if start < 1000 else True


def test_global_generators_are_left_alone() -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002  # the point is that nobody touches it
    torch_before = torch.get_rng_state()
    generator(0, "x").random(10)
    torch.rand(10, generator=torch_generator(0, "x"))
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_before)


@pytest.mark.parametrize("seed", [-1, 1.5, True, "0"])
def test_seeds_that_are_none(seed: object) -> None:
    with pytest.raises(ConfigError, match="an integer of 0 or more"):
        generator(seed)  # type: ignore[arg-type]


def test_too_many_seeds() -> None:
    with pytest.raises(ConfigError, match=r"0 to 2\*\*30"):
        training_seeds(0, 2**30 + 1)
