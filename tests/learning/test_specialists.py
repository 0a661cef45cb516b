from dataclasses import replace

import numpy as np
import pytest
import torch

import linear_world
from offbook.client.protocol import ActionSpec, Observation, ObservationSpec, Policy, PolicyMeta, check_chunk
from offbook.data.returns import ReturnSpec
from offbook.data.splits import write_splits
from offbook.data.store import FieldSpec
from offbook.errors import ConfigError, DataError
from offbook.learning.fit import FitConfig
from offbook.learning.specialists import Specialist, SpecialistConfig, SpecialistPolicy, _episodes, train_specialist
from offbook.learning.trajectories import Trajectories
from offbook.runs.directory import RunDirectory

FIT = FitConfig(steps=300, batch_size=128, warmup=20, learning_rate=1e-2, ema=0.97, threads=1, weight_decay=0.0,
                log_every=500)  # fmt: skip
SMALL = SpecialistConfig(hidden=64, depth=1, fit=FIT)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return linear_world.record(tmp_path_factory.mktemp("recordings") / "store", (20,) * 100)


def train(store, path, config, **more):
    data = Trajectories(store, **{"held_out": 0.2, "returns": ReturnSpec()} | more)
    return train_specialist(data, config, RunDirectory.create(path, config)), data


def transitions(store, episodes):
    """States, actions and states after them, straight from the recordings."""
    found = [store.episode(int(number)).fields for number in episodes]
    return [np.concatenate(of) for of in zip(*((f["s"][:-1], f["a"], f["s"][1:]) for f in found), strict=True)]


def window(state, after=None, action=None, reward=None):
    """One window for each row, of the present step and the one after it."""
    data = {"state": torch.from_numpy(np.stack([state, state if after is None else after], 1))}
    if action is not None:
        data["action"] = torch.from_numpy(np.stack([action, np.full_like(action, np.nan)], 1))
    return {**data, **{f"{name} present": torch.ones(of.shape[:2], dtype=torch.bool) for name, of in data.items()}}


@torch.no_grad()
def missed(specialist, role, store, episodes):
    """Mean squared error in standard deviations, by the recordings' own numbers."""
    state, action, after = transitions(store, episodes)
    wanted = after if role == "fd" else action
    told = specialist(window(state, after, action) if role == "id" else window(state, None, action), 0).numpy()
    name = specialist.config.tells[0]
    mean, std = (specialist.get_buffer(f"{name}_{of}").numpy() for of in ("mean", "std"))
    return float(np.mean((told - (wanted - mean) / std) ** 2))


@pytest.mark.learning
@pytest.mark.parametrize("role", ["fd", "id"])
def test_dynamics_of_a_linear_system_are_learnt_both_ways(store, tmp_path, role):
    config = replace(SMALL, role=role, fit=replace(FIT, steps=1_000, learning_rate=2e-2))
    specialist, data = train(store, tmp_path / "run", config)
    assert missed(specialist, role, store, data.held_out) < 1e-4


@pytest.mark.learning
@pytest.mark.parametrize("role", ["fd", "id"])
def test_with_actions_a_step_off_they_could_not_be(tmp_path, role):
    def late(number, values):
        values["a"] = np.roll(values["a"], 1, 0)

    store = linear_world.record(tmp_path / "store", (20,) * 60, change=late)
    specialist, data = train(store, tmp_path / "run", replace(SMALL, role=role, fit=replace(FIT, steps=200)))
    assert missed(specialist, role, store, data.held_out) > 0.05


def from_the_state_before(number, values):
    """States drawn anew each step, and actions that repeat what the state before was; 0 in the first step."""
    values["s"] = np.random.default_rng(number).uniform(-1, 1, values["s"].shape)
    values["a"] = np.concatenate([np.zeros((1, 2)), values["s"][:-2, :2]])


def meta_of(store):
    return PolicyMeta(name="s", observation=store.schema.observation_spec(), action=store.schema.action_spec())


def play(policy, states):
    """Actions of one session that is shown these states."""
    policy.reset(["a"], [""])
    answers = []
    for state in states:
        seen = Observation(sessions=("a",), state=state[None], images={}, time=np.zeros(1))
        answers.append(check_chunk(policy.infer(seen), 1, policy.meta)[0, 0])
    return np.array(answers)


@pytest.mark.learning
def test_history_tells_what_the_present_does_not_also_at_the_start(tmp_path):
    store = linear_world.record(tmp_path / "store", (8,) * 80, change=from_the_state_before)
    episode = store.episode(3).fields
    errors = {}
    for history in (1, 2):
        specialist, _ = train(store, tmp_path / str(history), replace(SMALL, history=history), held_out=0.0)
        policy = SpecialistPolicy(specialist, meta_of(store))
        assert isinstance(policy, Policy)
        errors[history] = np.abs(play(policy, episode["s"][:-1]) - episode["a"]).max(1)
    assert errors[2].max() < 0.15  # the first step, where there is no history, among them
    assert errors[1].max() > 0.4


@pytest.mark.parametrize("role", ["bc", "rcbc"])
@pytest.mark.parametrize("choices", [None, 4])
@pytest.mark.parametrize("history", [1, 3])
def test_a_policy_answers_as_the_network_does_in_training(tmp_path, role, choices, history):
    # What the policy did is recorded; windows of that, with padding at the start, must call for the same actions.
    size = 1 if choices else 2
    action = ActionSpec(size=1, low=(0.0,), high=(choices - 1.0,), choices=choices) if choices else linear_world.BOUNDS
    config = SpecialistConfig(role=role, history=history, hidden=16)
    torch.random.default_generator.manual_seed(0)
    specialist = Specialist(config, {"state": 3, "return": 1, "action": size}, choices).eval()
    for parameter in specialist.parameters():
        parameter.data *= 3
    specialist.get_buffer("state_mean").fill_(0.3)
    specialist.get_buffer("return_mean").fill_(-1.0)
    if not choices:
        specialist.get_buffer("action_std").fill_(0.4)
    meta = PolicyMeta(name="s", observation=ObservationSpec(state=(("s", 3),)), action=action)
    target = 2.0 if role == "rcbc" else None
    states = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    done = play(SpecialistPolicy(specialist, meta, target), states[:-1])
    assert len(np.unique(done[:, 0])) > 1

    def change(number, values):
        values["s"], values["a"], values["reward"] = states, done if choices is None else done[:, 0], np.eye(7)[6] * 2.0

    field = FieldSpec("a", "int64", (), "action") if choices else linear_world.FIELDS[1]
    fields = (linear_world.FIELDS[0], field, linear_world.REWARD)
    store = linear_world.record(tmp_path / "store", (7,), fields=fields, action=action, change=change)
    data = Trajectories(store, held_out=0.0, returns=ReturnSpec())
    sampler = data.sampler(history, pad="left")
    windows = data.tensors(sampler.at(np.arange(7)))
    with torch.no_grad():
        told = specialist(windows, history - 1)
    wanted = told.argmax(1, keepdim=True).numpy() if choices else np.clip(told.numpy() * 0.4, -1, 1)
    np.testing.assert_allclose(done, wanted, atol=1e-6)


@pytest.mark.learning
def test_a_higher_target_brings_the_actions_that_came_before_higher_returns(tmp_path):
    def change(number, values):
        values["a"][:] = number % 5 / 5
        values["reward"] = np.eye(len(values["reward"]))[-1] * (number % 5)

    store = linear_world.record(tmp_path / "store", (6,) * 30, change=change)
    config = replace(SMALL, role="rcbc")
    specialist, _ = train(store, tmp_path / "run", config, held_out=0.0)
    states = store.episode(0).fields["s"][:3]
    for target in (0.0, 2.0, 4.0):
        answers = play(SpecialistPolicy(specialist, meta_of(store), target), states)
        assert np.abs(answers - target / 5).max() < 0.1


def test_the_top_are_the_episodes_with_the_highest_returns(tmp_path):
    def change(number, values):
        values["reward"][:] = (number * 7) % 10
        if number == 9:
            values["reward"] = None

    store = linear_world.record(tmp_path / "store", (5,) * 10, change=change)
    data = Trajectories(store, held_out=0.0)
    # Returns, by episode: 0 7 4 1 8 5 2 9 6 -
    for top, best in ((0.3, [1, 4, 7]), (0.1, [7]), (1.0, range(10)), (0.01, [7])):
        assert _episodes(data, SpecialistConfig(top=top)).tolist() == list(best)
    write_splits(store, {"train": [0, 3, 6, 9], "held_out": [7]})
    split = Trajectories(store)
    assert _episodes(split, SpecialistConfig(top=0.25)).tolist() == [6]
    assert _episodes(split, SpecialistConfig(top=0.9)).tolist() == [0, 3, 6]


def test_the_top_of_recordings_without_returns_is_refused(tmp_path):
    store = linear_world.record(tmp_path / "store", (5,) * 4, fields=linear_world.FIELDS[:2])
    with pytest.raises(DataError, match=r"a training episode with a return, to choose the best of, got none"):
        train(store, tmp_path / "run", replace(SMALL, top=0.5))


def test_only_episodes_with_all_that_is_read_and_told_are_learnt_from(tmp_path):
    def change(number, values):
        if number in (1, 2):
            values["a"] = None
        if number in (2, 3):
            values["reward"] = None

    store = linear_world.record(tmp_path / "store", (5,) * 5, change=change)
    data = Trajectories(store, held_out=0.0, returns=ReturnSpec())
    assert _episodes(data, SpecialistConfig(role="bc")).tolist() == [0, 3, 4]
    assert _episodes(data, SpecialistConfig(role="rcbc")).tolist() == [0, 4]
    write_splits(store, {"train": [1, 3]})
    with pytest.raises(DataError, match=r"expected a training episode with action and return and state, got none"):
        train(store, tmp_path / "run", replace(SMALL, role="rcbc"))


@pytest.mark.parametrize("role", ["bc", "fd", "id", "rcbc"])
def test_what_no_episode_has_is_refused(tmp_path, role):
    field, word = ("reward", "return") if role == "rcbc" else ("a", "action")
    store = linear_world.record(tmp_path / "store", (5,) * 4, change=linear_world.lacking(field, range(4)))
    with pytest.raises(ConfigError, match=rf"specialist '{role}': expected {word}s in the recordings, got none"):
        train(store, tmp_path / "run", replace(SMALL, role=role))


@pytest.mark.parametrize("wrong", [{"history": 0}, {"history": 2, "role": "fd"}, {"top": 0.0}, {"top": 1.5},
                                   {"hidden": 0}, {"depth": 65}])  # fmt: skip
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(ConfigError, match=f"^{next(iter(wrong))}: expected"):
        SpecialistConfig(**wrong)


@pytest.mark.parametrize(("role", "target"), [("bc", 1.0), ("rcbc", None), ("fd", None)])
def test_a_policy_needs_a_target_exactly_when_it_aims(role, target):
    specialist = Specialist(SpecialistConfig(role=role, hidden=4), {"state": 3, "return": 1, "action": 2}, None)
    meta = PolicyMeta(name="s", observation=ObservationSpec(state=(("s", 3),)), action=linear_world.BOUNDS)
    with pytest.raises(ConfigError, match="expected bc, or rcbc and a target"):
        SpecialistPolicy(specialist, meta, target)
