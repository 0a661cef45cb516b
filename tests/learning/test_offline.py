import json
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import point_world
import pytest
import torch
from torch import nn

from offbook.client.protocol import ActionSpec, Observation, Policy, check_chunk
from offbook.data.splits import write_splits
from offbook.data.store import EpisodeStore, FieldSpec, Schema
from offbook.data.transitions import Transitions
from offbook.errors import CheckpointError, ConfigError, DataError
from offbook.learning import offline
from offbook.learning.actor_critic import Actor, ActorCritic
from offbook.learning.cloning import CloningConfig, train_cloning
from offbook.learning.fit import FitConfig
from offbook.learning.offline import OfflineConfig, train_offline
from offbook.learning.policies import load_policy
from offbook.runs.checkpoint import load_checkpoint, save_checkpoint
from offbook.runs.directory import RunDirectory

ALGORITHMS = ("iql", "td3bc", "cql")
FIT = FitConfig(
    steps=6, batch_size=128, learning_rate=1e-3, weight_decay=0.0, warmup=0, schedule="constant", clip_norm=0.0,
    checkpoint_every=2, log_every=2, threads=1,
)  # fmt: skip
BOUND = ActionSpec(size=2, low=(-0.3, -0.3), high=(0.3, 0.3))
FIELDS = (
    FieldSpec("place", "float32", (2,), "observation"),
    FieldSpec("goal", "float32", (2,), "observation"),
    FieldSpec("action", "float32", (2,), "action"),
    FieldSpec("reward", "float32", (), "reward"),
)


def brief(algorithm, **changes):
    return replace(OfflineConfig(algorithm=algorithm, hidden=16, save_every=2, fit=FIT), **changes)


def record(path, episodes=24, *, action=BOUND, fields=FIELDS, poison=None):
    """Every fourth episode is an expert's, who walks to the goal; the others walk at random.

    Args:
        poison: field and row of the first episode that is NaN.
    """
    rng, steps = np.random.default_rng(0), point_world.STEPS
    with EpisodeStore.create(path, Schema(fields, action=action)) as writer:
        for number, (place, goal) in enumerate(point_world.starts(episodes, 0)):
            places, actions = [place], []
            for _ in range(steps):
                walk = rng.uniform(-0.3, 0.3, 2) if number % 4 else point_world.expert(places[-1], goal)
                actions.append(walk)
                places.append(places[-1] + walk)
            values = {"place": places, "goal": [goal] * (steps + 1), "action": actions}
            values["reward"] = -np.linalg.norm(np.asarray(places[1:]) - goal, axis=1)
            values = {spec.name: np.array(values[spec.name], spec.dtype) for spec in fields}
            if poison and not number:
                values[poison[0]][poison[1]] = np.nan
            writer.append(values, terminated=False, truncated=True)
    return EpisodeStore.open(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return record(tmp_path_factory.mktemp("recordings") / "store")


def train(store, path, config, *, resume=False):
    return train_offline(store, config, RunDirectory.create(path, config, resume=resume), resume=resume)


def observe(batch=5, size=4):
    state = np.random.default_rng(1).uniform(-1, 1, (batch, size)).astype(np.float32)
    return Observation(sessions=tuple(map(str, range(batch))), state=state, images={}, time=np.zeros(batch))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return record(tmp_path_factory.mktemp("mixed") / "store", 200)


@pytest.mark.learning
def test_cloning_a_mixture_hardly_comes_near_the_goal(mixed, tmp_path):
    # What the three below are compared with: a quarter of an expert and three quarters of noise make a slow walk.
    fit = FitConfig(steps=1000, batch_size=128, learning_rate=2e-3, ema=0.99, threads=1)
    config = CloningConfig(chunk=1, execute=1, hidden=64, validate_every=1000, fit=fit)
    policy = train_cloning(mixed, config, RunDirectory.create(tmp_path / "run", config))
    assert point_world.distances(policy).mean() > 0.4


@pytest.mark.learning
@pytest.mark.parametrize(("algorithm", "steps"), [("iql", 1000), ("td3bc", 1000), ("cql", 400)])
def test_rewards_tell_the_expert_from_the_noise(mixed, tmp_path, algorithm, steps):
    fit = replace(FIT, steps=steps, log_every=200, checkpoint_every=steps)
    config = OfflineConfig(algorithm=algorithm, hidden=64, reward_scale=10.0, save_every=steps, fit=fit)
    policy = train(mixed, tmp_path / "run", config)
    assert isinstance(policy, Policy)
    assert policy.meta.observation.state == (("place", 2), ("goal", 2))
    assert point_world.distances(policy).mean() < 0.15


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_resumed_training_is_the_uninterrupted_one(store, tmp_path, algorithm, monkeypatch):
    # Interrupted at the hook of step 4, before that step's checkpoint; the name of a run is in its policy.
    config = brief(algorithm)
    train(store, tmp_path / "a" / "run", config)

    class StopError(Exception):
        pass

    save, saved = offline.OfflinePolicy.save, []

    def interrupt(self, path):
        saved.append(path)
        if len(saved) == 2:
            raise StopError
        save(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(offline.OfflinePolicy, "save", interrupt)
        with pytest.raises(StopError):
            train(store, tmp_path / "b" / "run", config)
    cut = load_checkpoint(tmp_path / "b" / "run" / "checkpoints" / "training.safetensors")
    assert cut.record["step"] == cut.values["module.steps"] == 2
    train(store, tmp_path / "b" / "run", config, resume=True)
    for file in ("checkpoints/last.safetensors", "checkpoints/training.safetensors", "metrics.jsonl"):
        contents = [(tmp_path / name / "run" / file).read_bytes() for name in ("a", "b")]
        assert contents[0] == contents[1]


def test_an_actor_that_waits_is_not_moved_by_momentum(store, tmp_path, monkeypatch):
    seen = []
    policy = offline._policy
    monkeypatch.setattr(
        offline, "_policy", lambda model, *rest: seen.append(weights(model.actor)) or policy(model, *rest)
    )
    train(store, tmp_path / "run", brief("td3bc", save_every=1, policy_delay=3))
    moved = [not torch.equal(before, after) for before, after in pairwise(seen[:6])]
    assert moved == [False, True, False, False, True]


def weights(module):
    return nn.utils.parameters_to_vector(module.parameters()).clone()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_nothing_follows_a_terminated_step_and_something_a_truncated_one(tmp_path, algorithm):
    fields = (
        FieldSpec("x", "float64", (1,), "observation"),
        FieldSpec("action", "float32", (1,), "action"),
        FieldSpec("reward", "float32", (), "reward"),
    )
    with EpisodeStore.create(
        tmp_path / "store", Schema(fields, action=ActionSpec(size=1, low=(-1.0,), high=(1.0,)))
    ) as writer:
        for first, rewards, terminated in ((0, [1, 2], True), (10, [3], False)):
            steps = len(rewards)
            values = {"x": first + np.arange(steps + 1.0)[:, None], "action": np.zeros((steps, 1), np.float32)}
            values["reward"] = np.array(rewards, np.float32)
            writer.append(values, terminated=terminated, truncated=not terminated)
    store = EpisodeStore.open(tmp_path / "store")
    data = Transitions.read(store, ["x"], "action", "reward", np.array([0, 1]))
    assert data.observations[data.rows].T.tolist() == [[0, 1, 10]]
    assert data.observations[data.rows + 1].T.tolist() == [[1, 2, 11]]
    assert data.terminated.tolist() == [False, True, False]
    assert Transitions.read(store, ["x"], "action", "reward", np.array([1])).reward.tolist() == [3]
    # With critics of 0, whose copies say 5 and 7 (for IQL the value says 5), and a discount of 1/2 the targets are
    # 1 + 5 / 2, 2, and 3 + 5 / 2.
    fit = replace(FIT, steps=1, batch_size=300, log_every=1)
    config = brief(algorithm, gamma=0.5, fit=fit, **({"cql_alpha": 0.0} if algorithm == "cql" else {}))
    chosen = offline._batch(data, config, 0)
    model = ActorCritic(Actor(algorithm, 1, 1, 16, 2), offline._loss(config), target_rate=0.1)
    outputs = {model.target_critics.each[0]: 5, model.target_critics.each[1]: 7}
    outputs |= dict.fromkeys(model.critics.each, 0) | ({model.value: 5} if algorithm == "iql" else {})
    for network, output in outputs.items():
        nn.init.zeros_(network[-1].weight)
        nn.init.constant_(network[-1].bias, output)
    _, metrics = model(chosen, torch.Generator().manual_seed(0))
    rewards = chosen["reward"].numpy()
    assert set(rewards.tolist()) == {1, 2, 3}
    targets = np.select([rewards == 1, rewards == 2, rewards == 3], [3.5, 2.0, 5.5])
    assert float(metrics["critic_loss"].detach()) == pytest.approx(2 * (targets**2).mean(), rel=1e-6)
    scaled = offline._batch(data, replace(config, reward_scale=2.0, reward_shift=-1.0), 0)["reward"].numpy()
    assert np.array_equal(scaled, 2 * rewards - 1)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_saved_and_loaded_acts_the_same_to_the_last_bit(store, tmp_path, algorithm):
    policy = train(store, tmp_path / "run", brief(algorithm))
    loaded = load_policy(tmp_path / "run")
    assert loaded.meta == policy.meta
    assert (policy.meta.name, policy.meta.chunk, policy.meta.action) == (f"{algorithm}-run", 1, BOUND)
    assert loaded.provenance == policy.provenance
    assert policy.provenance["recordings"] == {"sha256": store.digest, "episodes": 24}
    seen = observe()
    answer = check_chunk(policy.infer(seen), 5, policy.meta)
    assert np.array_equal(answer, loaded.infer(seen))
    assert answer.std() > 0
    far = replace(seen, state=seen.state * 1e9)
    assert np.abs(check_chunk(policy.infer(far), 5, policy.meta)).max() <= np.float32(0.3)


def test_where_actions_have_no_bounds_the_recorded_ones_do(tmp_path):
    unbound = ActionSpec(size=2, low=(-np.inf, -0.2), high=(np.inf, 0.2))
    store = record(tmp_path / "store", action=unbound)
    policy = train(store, tmp_path / "run", brief("td3bc"))
    recorded = store.field("action")[:, 0]
    middle, half = policy.module.action_middle, policy.module.action_half
    assert float(middle[0] + half[0]) == pytest.approx(recorded.max())
    assert float(middle[0] - half[0]) == pytest.approx(recorded.min())
    assert (float(middle[1]), float(half[1])) == pytest.approx((0.0, 0.2))
    answer = check_chunk(load_policy(tmp_path / "run").infer(observe(50)), 50, policy.meta)
    assert np.abs(answer).max() <= 0.3 + 1e-6


def test_episodes_that_the_store_holds_out_are_not_learnt_from(tmp_path):
    store = record(tmp_path / "store", 8)
    write_splits(store, {"train": [1, 2, 5], "held_out": [0]})
    assert train(store, tmp_path / "run", brief("iql")).provenance["recordings"]["episodes"] == 3
    data = Transitions.read(store, ["place"], "action", "reward", np.array([1, 5]))
    ends = store.episodes["start"][[1, 5]] + point_world.STEPS
    assert np.array_equal(data.action[[11, 23]], store.field("action")[ends - 1])
    assert np.array_equal(data.observations[data.rows[[11, 23]] + 1], store.final("place")[[1, 5]])


def test_half_precision_trains_too(store, tmp_path):
    for algorithm in ALGORITHMS:
        config = brief(algorithm, fit=replace(FIT, precision="bf16"))
        policy = train(store, tmp_path / algorithm, config)
        assert np.isfinite(policy.infer(observe())).all()


@pytest.mark.faults
@pytest.mark.parametrize(
    ("poison", "message"),
    [
        (("action", 4), r"field 'action', episode 0, step 4: expected finite numbers, got NaN"),
        (("place", 4), r"field 'place', episode 0, step 4: expected finite numbers, got NaN"),
        (("reward", 11), r"field 'reward', episode 0, step 11: expected finite numbers, got NaN"),
        (("place", 12), r"field 'place', episode 0, step 12: expected finite numbers, got NaN"),
    ],
)
def test_nan_in_the_recordings_names_episode_and_step(tmp_path, poison, message):
    store = record(tmp_path / "store", 3, poison=poison)
    with pytest.raises(DataError, match=message):
        train(store, tmp_path / "run", brief("iql"))


DISCRETE = ActionSpec(size=1, low=(0.0,), high=(3.0,), choices=4)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("fields", "action", "message"),
    [
        (FIELDS[:3], BOUND, "expected recordings with a reward, got none; .*offbook train bc"),
        (FIELDS, DISCRETE, "expected one field of continuous actions, got discrete ones; .*offbook train bc"),
        ((*FIELDS, replace(FIELDS[2], name="grip")), BOUND, "continuous actions, got 2 fields of actions"),
        (FIELDS[2:], BOUND, "expected a low-dimensional part of the state, got none; .*offbook train bc"),
        (FIELDS, None, "expected the bounds of the actions, got recordings without them"),
    ],
)
def test_recordings_that_do_not_fit(cli, tmp_path, fields, action, message):
    schema = Schema(fields, action=action)
    with EpisodeStore.create(tmp_path / "store", schema) as writer:
        rows = {spec.name: np.zeros((2 + (spec.role == "observation"), *spec.shape), spec.dtype) for spec in fields}
        writer.append(rows, terminated=True, truncated=False)
    done = cli(["train", "iql", "--data", str(tmp_path / "store"), "--out", str(tmp_path / "run")])
    assert done.exit_code == 1
    assert re.search(message, done.stderr), done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["iql", "--parts", "plaice"], "did you mean 'place'"),
        (["iql", "--expectile", "1"], "--expectile: expected between 0 and 1, got 1.0"),
        (["iql", "--beta", "nan"], "--beta: expected a finite number, 0 or more, got nan"),
        (["td3bc", "--policy-delay", "0"], "--policy-delay: expected 1 or more, got 0"),
        (["cql", "--samples", "0"], "--samples: expected 1 or more"),
        (["cql", "--gamma", "1.5"], "--gamma: expected a discount in [0, 1], got 1.5"),
        (["cql", "--fit.accumulate", "2"], "--fit.accumulate: expected 1, got 2"),
        (["iql", "--alpha", "1"], "--alpha: expected settings of iql, got one of td3bc; leave --alpha out"),
        (["iql", "--algorithm", "cql"], "--algorithm: expected iql, got cql; run: offbook train cql"),
        (["iql", "--preset", "tini"], "did you mean 'tiny'"),
    ],
)
def test_wrong_use(cli, store, tmp_path, words, message):
    done = cli(["train", words[0], "--data", str(store.path), "--out", str(tmp_path / "run"), *words[1:]])
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_several_processes_are_refused(store, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="torchrun: expected one process, got 2"):
        train(store, tmp_path / "run", brief("iql"))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_verb_trains_resumes_and_says_how_to_go_on(cli, store, tmp_path, algorithm):
    words = ["train", algorithm, "--data", str(store.path), "--out", str(tmp_path / "run"), "--preset", "smoke"]
    words += ["--fit.steps", "4", "--fit.log-every", "2", "--hidden", "16"]
    done = cli(words)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("learnt from place, goal: 24 episodes, 4 steps")
    assert done.stdout.splitlines()[-1] == f"test it: offbook evaluate {tmp_path / 'run'} --task TASK --episodes 50"
    config = RunDirectory.open(tmp_path / "run").config()
    assert (config["algorithm"], config["parts"], config["hidden"]) == (algorithm, ["place", "goal"], 16)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = cli([*words, "--resume", "--json"])
    assert again.exit_code == 0
    assert json.loads(again.stdout)["metrics"]["step"] == 4
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert load_policy(tmp_path / "run").meta.name == f"{algorithm}-run"


def _set(*keys, to):
    def change(record):
        for key in keys[:-1]:
            record = record[key]
        record[keys[-1]] = to

    return change


@pytest.fixture(scope="module")
def sound(store, tmp_path_factory):
    path = tmp_path_factory.mktemp("policies") / "run"
    train(store, path, brief("iql"))
    return load_checkpoint(path / "checkpoints" / "last.safetensors")


@pytest.mark.faults
@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.clear(),
        lambda record: record.pop("network"),
        _set("network", to=[1, 2]),
        _set("network", "algorithm", to="sac"),
        _set("network", "algorithm", to=["iql"]),
        _set("network", "algorithm", to="cql"),
        _set("network", "hidden", to=10**12),
        _set("network", "hidden", to=True),
        _set("network", "depth", to="2"),
        _set("network", "depth", to=10**12),
        _set("meta", "chunk", to=2),
        _set("meta", "action", "size", to=10**15),
        _set("meta", "action", "size", to=0),
        _set("meta", "action", "low", to=[float("nan"), 0.0]),
        _set("meta", "action", "choices", to=4),
        _set("meta", "action", to={"size": 0, "low": [], "high": [], "choices": None}),
        _set("meta", "observation", "state", to=[]),
        _set("meta", "observation", "state", to=[["place", 10**18]]),
        _set("meta", "observation", "state", to=[["place", 5], ["goal", -1]]),
        _set("meta", "observation", "cameras", to={"front": [16, 16]}),
    ],
)
def test_records_that_lie(sound, tmp_path, change):
    record = json.loads(json.dumps(sound.record))
    save_checkpoint(tmp_path / "sound.safetensors", "offline", sound.values, record)
    assert isinstance(load_policy(tmp_path / "sound.safetensors"), Policy)
    change(record)
    save_checkpoint(tmp_path / "liar.safetensors", "offline", sound.values, record)
    with pytest.raises(CheckpointError, match=r"liar\.safetensors"):
        load_policy(tmp_path / "liar.safetensors")
