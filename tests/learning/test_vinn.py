"""Imitation by neighbours: averages, chunks, votes, what counts as near, and files that lie."""

import json

import numpy as np
import point_world
import pytest
import torch

from offbook.client.protocol import ActionSpec, Observation, ObservationSpec
from offbook.errors import CheckpointError, ConfigError, DataError
from offbook.learning.policies import load_policy
from offbook.learning.vinn import Neighbours, VinnConfig, check_vinn, train_vinn
from offbook.runs.checkpoint import load_checkpoint, save_checkpoint
from offbook.runs.directory import RunDirectory

TWO = ("place", "goal")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return point_world.record(tmp_path_factory.mktemp("recordings") / "store", 60)


def made(store, path, **changes):
    config = VinnConfig(parts=TWO, **changes)
    return train_vinn(store, config, RunDirectory.create(path, config))


def asked(policy, state):
    batch = len(state)
    seen = Observation(sessions=tuple(map(str, range(batch))), state=state, images={}, time=np.zeros(batch))
    return policy.infer(seen)


def memory(chunk=1, neighbours=2, temperature=1.0, choices=None):
    """Five steps on a line, of two episodes of three and two steps, with the actions 0 to 4."""
    action = ActionSpec(size=1, low=(0.0,), high=(4.0,), choices=choices)
    module = Neighbours(ObservationSpec(state=(("x", 1),)), action, steps=5, neighbours=neighbours,
                        temperature=temperature, chunk=chunk)  # fmt: skip
    module.seen.copy_(torch.tensor([0.0, 1, 2, 7, 8])[:, None])
    module.done.copy_(torch.arange(5.0)[:, None])
    module.left.copy_(torch.tensor([2.0, 1, 0, 1, 0]))
    return module


def test_actions_of_neighbours_are_weighed_by_the_distance():
    told = memory()(torch.tensor([[0.25], [7.5]]))
    near, far = np.exp(-0.25), np.exp(-0.75)
    np.testing.assert_allclose(told[:, 0, 0], [far / (near + far), 3.5], rtol=1e-5)
    sharp = memory(temperature=1e-3)(torch.tensor([[0.25], [7.4]]))
    np.testing.assert_allclose(sharp[:, 0, 0], [0, 3], atol=1e-5)
    votes = memory(neighbours=3, choices=5, temperature=100.0)
    votes.done.copy_(torch.tensor([4.0, 2, 4, 1, 1])[:, None])
    assert votes(torch.tensor([[1.0], [8.0]])).flatten().tolist() == [4.0, 1.0]


def test_a_chunk_is_what_followed_the_nearest_step_and_stays_in_its_episode():
    told = memory(chunk=4)(torch.tensor([[0.9], [7.2], [20.0]]))
    assert told[..., 0].tolist() == [[1, 2, 2, 2], [3, 4, 4, 4], [4, 4, 4, 4]]


def test_a_part_with_many_numbers_counts_as_much_as_one_with_few():
    action = ActionSpec(size=1, low=(0.0,), high=(1.0,))
    spec = ObservationSpec(state=(("joints", 2), ("features", 50)))
    module = Neighbours(spec, action, steps=1, neighbours=1, temperature=1.0, chunk=1)
    near = [float(module.embed(torch.cat([torch.full((1, 2), a), torch.full((1, 50), b)], 1)).norm())
            for a, b in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0))]  # fmt: skip
    np.testing.assert_allclose(near, [0.5**0.5, 0.5**0.5, 1.0], rtol=1e-5)


@pytest.mark.learning
def test_neighbours_reach_the_goal(store, tmp_path):
    policy = made(store, tmp_path / "run", neighbours=6)
    assert point_world.distances(policy).mean() < 0.25
    chunks = made(store, tmp_path / "chunks", chunk=6)
    assert chunks.meta.chunk == 6
    assert point_world.distances(chunks).mean() < 0.4
    row = RunDirectory.open(tmp_path / "run").metrics()[-1]
    assert row["held_out_loss"] < 0.5
    assert row["steps"] == 54 * point_world.STEPS
    loaded, states = load_policy(tmp_path / "run"), np.random.default_rng(0).uniform(-1, 1, (7, 4)).astype(np.float32)
    assert np.array_equal(asked(loaded, states), asked(policy, states))
    assert np.abs(asked(loaded, states)).max() <= np.float32(0.3)


def test_failures_are_not_remembered_and_discrete_actions_are_voted_on(tmp_path):
    mixed = point_world.record(tmp_path / "mixed", 10, success=lambda number: number % 2 == 0)
    assert len(made(mixed, tmp_path / "a", held_out=0.0).module.seen) == 5 * point_world.STEPS
    assert len(made(mixed, tmp_path / "b", held_out=0.0, success_only=False).module.seen) == 10 * point_world.STEPS
    discrete = point_world.record(tmp_path / "discrete", discrete=True)
    policy = made(discrete, tmp_path / "c")
    assert set(np.unique(asked(policy, np.random.default_rng(0).uniform(-1, 1, (50, 4)).astype(np.float32)))) <= {
        0.0, 1.0, 2.0, 3.0
    }  # fmt: skip
    assert 0 <= RunDirectory.open(tmp_path / "c").metrics()[-1]["held_out_loss"] < 0.65  # by chance 0.75


@pytest.mark.faults
def test_what_cannot_be_remembered_is_refused(store, tmp_path):
    with pytest.raises(ConfigError, match=r"--neighbours: expected at most 648.*got 10000"):
        check_vinn(store, VinnConfig(parts=TWO, neighbours=10_000))
    poisoned = point_world.record(tmp_path / "store", 4, poison=2)
    with pytest.raises(DataError, match=r"field 'action'.*NaN"):
        made(poisoned, tmp_path / "run", held_out=0.0)
    for bad in ({"neighbours": 0}, {"temperature": 0.0}, {"chunk": 0}, {"held_out": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(bad)).replace("_", "-")):
            VinnConfig(**bad)


@pytest.mark.faults
@pytest.mark.parametrize("change", [
    lambda r: r.clear(), lambda r: r["network"].update(steps=10**12), lambda r: r["network"].update(steps=2.0),
    lambda r: r["network"].update(neighbours=0), lambda r: r["network"].update(neighbours=10**6),
    lambda r: r["network"].update(temperature="hot"), lambda r: r["network"].update(temperature=float("nan")),
    lambda r: r["network"].update(chunk=2), lambda r: r["meta"].update(chunk=2),
    lambda r: r["meta"]["observation"].update(cameras={"front": [24, 24]}),
    lambda r: r["meta"]["observation"].update(state=[]), lambda r: r["meta"]["action"].update(size=10**15),
])  # fmt: skip
def test_records_that_lie(store, tmp_path, change):
    made(store, tmp_path / "run")
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.safetensors")
    record = json.loads(json.dumps(checkpoint.record))
    change(record)
    save_checkpoint(tmp_path / "liar.safetensors", "vinn", checkpoint.values, record)
    with pytest.raises(CheckpointError, match=r"liar\.safetensors"):
        load_policy(tmp_path / "liar.safetensors")
