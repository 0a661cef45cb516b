"""Entropies beside closed forms of Gaussians."""

import math

import pytest
import torch

from offbook.models.entropy import conditional_entropy, joint_entropy, mutual_information, state_entropy

LOG = math.log(2 * math.pi * math.e)


def gaussians(count, size, rho, seed):
    """V standard normal, each number of S correlated with it."""
    rng = torch.Generator().manual_seed(seed)
    values, noise = torch.randn(count, generator=rng), torch.randn(count, size, generator=rng)
    return rho * values[:, None] + math.sqrt(1 - rho**2) * noise, values


@pytest.mark.parametrize("rho", [0.0, 0.6, 0.9])
@pytest.mark.parametrize("size", [1, 2])
def test_conditional_entropy_is_that_of_gaussians(size, rho):
    states, values = gaussians(4_096, size, rho, seed=1)
    assert conditional_entropy(states, values) == pytest.approx(size / 2 * (LOG + math.log(1 - rho**2)), abs=0.06)


def test_the_others_agree_with_it():
    states, values = gaussians(4_096, 2, 0.6, seed=2)
    # The covariance of (S, V) by its Schur complement at V: (1 - rho^2) I.
    both = 1.5 * LOG + math.log(1 - 0.36)
    assert joint_entropy(states, values) == pytest.approx(both, abs=0.06)
    alone = LOG + 0.5 * math.log(1 - 0.36**2)
    assert state_entropy(states) == pytest.approx(alone, abs=0.06)
    shared = alone + 0.5 * LOG - both
    assert mutual_information(states, values) == pytest.approx(shared, abs=0.06)


def test_more_samples_come_closer_where_there_is_a_bias():
    true = 5 / 2 * (LOG + math.log(1 - 0.81))
    off = [conditional_entropy(*gaussians(count, 5, 0.9, seed=0)) - true for count in (256, 1_024, 4_096)]
    assert off[0] > off[1] > off[2] > 0.05


def test_what_shifts_and_turns_leave_alone():
    states, values = gaussians(600, 3, 0.5, seed=0)
    before = conditional_entropy(states, values)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0))).Q
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    assert conditional_entropy((states @ turn)[order], values[order] + 2) == pytest.approx(before, abs=1e-4)
    assert conditional_entropy(3 * states, 3 * values) == pytest.approx(before + 3 * math.log(3), abs=1e-4)


def test_duplicates_have_no_density():
    assert conditional_entropy(torch.zeros(20, 2), torch.zeros(20), k=3) == -math.inf
