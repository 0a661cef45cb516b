"""Rewards worked out from recorded physics are those that dm_control gives while it plays."""

import dataclasses
import json
from contextlib import closing

import numpy as np
import pytest
from dm_control import suite

from offbook.data.splits import read_splits, write_splits
from offbook.data.store import EpisodeStore, FieldSpec
from offbook.errors import ConfigError, DataError
from offbook.learning.offline import OfflineConfig, check_offline
from offbook.sim.adapters import make
from offbook.sim.recording import record
from offbook.sim.rewards import _HIDDEN, TaskRewards, add_rewards

SHORT = {"physics": True, "time_limit": 0.75}  # 30 steps of the walker
TASKS = [f"{domain}-{task}" for domain, task in suite.ALL_TASKS]
SPEEDS = ("stand", "walk", "run")


def copied(store, out, *, change=None, **schema):
    """A store with another schema or, by `change(number, fields)`, other values."""
    with EpisodeStore.create(out, dataclasses.replace(store.schema, **schema)) as writer:
        for number in range(len(store)):
            given = {**dict.fromkeys(spec.name for spec in writer.schema.fields), **store.episode(number).fields}
            given = {name: value for name, value in given.items() if name in writer.schema}
            writer.append(change(number, given) if change else given, terminated=False, truncated=True)
    return EpisodeStore.open(out)


@pytest.fixture(scope="module")
def explored(tmp_path_factory):
    """Three short episodes of a walker without rewards."""
    out = tmp_path_factory.mktemp("explored") / "store"
    return record("dmc:walker-walk", 3, out, policy="drift", rewards=False, settings=SHORT)


@pytest.mark.parametrize("task", SPEEDS)
def test_explored_episodes_get_what_the_task_gives_for_the_same_actions(explored, tmp_path, task):
    played = record(f"dmc:walker-{task}", 3, tmp_path / "played", policy="drift", settings=SHORT)
    worked_out = add_rewards(explored, f"walker-{task}", tmp_path / "out")
    worked_out.verify()
    assert worked_out.schema.environment == f"dmc:walker-{task}"
    assert worked_out.schema.fields == explored.schema.fields
    assert worked_out.schema.extra["rewards"] == {"task": f"dmc:walker-{task}", "of": explored.digest}
    assert "recording" not in worked_out.schema.extra
    assert worked_out.episodes["task"].tolist() == [f"dmc:walker-{task}"] * 3
    for column in ("source", "seed", "length", "terminated", "truncated"):
        assert worked_out.episodes[column].tolist() == explored.episodes[column].tolist(), column
    for number in range(3):
        real, mine = played.episode(number).fields, worked_out.episode(number).fields
        for name in explored.schema.observations + explored.schema.actions:
            np.testing.assert_array_equal(mine[name], real[name], err_msg=name)
        assert np.ptp(real["reward"]) > 1e-3
        np.testing.assert_allclose(mine["reward"], real["reward"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(worked_out.episodes["return"], played.episodes["return"], atol=1e-5)


@pytest.mark.parametrize("task", [task for task in TASKS if not {task, task.partition("-")[0]} & {*_HIDDEN}])
def test_every_task_that_is_not_refused_is_exact(task):
    """Also where reset draws what the state does not hold, and where actions cost."""
    rewards, states, actions, real = TaskRewards(task), [], [], []
    random = np.random.default_rng(0)
    with closing(make(f"dmc:{task}", physics=True)) as env:
        for seed in (3, 4):
            env.reset(seed=seed)
            for _ in range(4):
                actions.append(random.uniform(env.action_space.low, env.action_space.high).clip(-1e3, 1e3))
                observation, reward, *_ = env.step(actions[-1])
                states.append(observation["physics"])
                real.append(reward)
    np.testing.assert_allclose(rewards(np.array(states), np.array(actions), task), real, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", sorted(_HIDDEN))
def test_what_depends_on_more_than_the_state_is_refused(name):
    for task in [task for task in TASKS if task == name or task.startswith(f"{name}-")]:
        with pytest.raises(ConfigError, match=f"task 'dmc:{task}': expected rewards that follow from the state and"):
            TaskRewards(task)


def exorl(folder, physics="float64", observation=slice(None), leave_out=()):
    """Two episodes of a walker as ExoRL keeps them, and what `run` gives for the same actions."""
    folder.mkdir(parents=True)
    random, real = np.random.default_rng(1), []
    for number in range(2):
        stand = suite.load("walker", "stand", {"random": number, "time_limit": 0.75}, {"flat_observation": True})
        run = suite.load("walker", "run", {"random": number, "time_limit": 0.75})
        now, _ = stand.reset(), run.reset()
        rows = {"observation": [now.observation["observations"]], "action": [np.zeros(6)], "reward": [[0.0]]}
        rows |= {"discount": [[1.0]], "physics": [stand.physics.state()]}
        while not now.last():
            action = random.uniform(-1, 1, 6).astype(np.float32)
            now = stand.step(action)
            real.append(run.step(action).reward)
            values = (now.observation["observations"], action, [0.0], [now.discount], stand.physics.state())
            for name, value in zip(rows, values, strict=True):
                rows[name].append(value)
        arrays = {name: np.array(values, np.float32 if name != "physics" else physics) for name, values in rows.items()}
        arrays["observation"] = arrays["observation"][:, observation]
        kept = {name: array for name, array in arrays.items() if name not in leave_out}
        np.savez_compressed(folder / f"episode_{number:06d}_30.npz", **kept)
    return np.reshape(real, (2, 30))


@pytest.mark.parametrize(
    ("physics", "tolerance", "task"), [("float64", 1e-6, "walker-run"), ("float32", 1e-5, "dmc:walker-run")]
)
def test_a_folder_of_exorl_is_imported_with_the_rewards_of_a_task(tmp_path, cli, physics, tolerance, task):
    real = exorl(tmp_path / "walker" / "proto" / "buffer", physics)
    words = ["data", "import", f"exorl:{tmp_path}/walker/proto", "--task", task, "--out", str(tmp_path / "store")]
    outcome = cli(words)
    assert outcome.exit_code == 0, outcome.stderr
    assert "as imported  rewards are those of dmc:walker-run, by the physics" in outcome.stdout
    store = EpisodeStore.open(tmp_path / "store")
    assert (store.schema.environment, store.schema.observations) == (
        "dmc:walker-run",
        ("orientations", "height", "velocity"),
    )
    assert (store.episodes["task"].tolist(), store.episodes["source"].tolist()) == (
        ["dmc:walker-run"] * 2,
        ["proto"] * 2,
    )
    for number in range(2):
        fields = store.episode(number).fields
        assert fields["reward"].dtype == np.float64
        assert np.ptp(real[number]) > 1e-3
        np.testing.assert_allclose(fields["reward"], real[number], rtol=0, atol=tolerance)
    with pytest.raises(DataError, match="after the last step too, got that before each step only; import them again"):
        add_rewards(store, "walker-walk", tmp_path / "again")


def test_the_collector_is_told_without_a_task_too(tmp_path, cli):
    exorl(tmp_path / "rnd" / "buffer")
    words = ["data", "import", f"exorl:{tmp_path}/rnd/buffer", "--out", str(tmp_path / "store"), "--json"]
    assert json.loads(cli(words).stdout)["return"]["most"] == 0
    columns = EpisodeStore.open(tmp_path / "store").episodes
    assert (columns["task"].tolist(), columns["source"].tolist()) == (["", ""], ["rnd", "rnd"])


@pytest.mark.faults
@pytest.mark.parametrize(
    ("given", "words", "sentence"),
    [
        ({}, ["--task", "walker-jump"], "environment 'dmc:walker-jump': expected a name of the library 'dmc'"),
        ({}, ["--task", "reacher-easy"], "expected rewards that follow from the state and the action, got ones that"),
        ({}, ["--task", "walker-run", "--env", "dmc:walker-run"], "--env: expected either this or --task"),
        (
            {},
            ["--task", "hopper-hop"],
            "episode_000000_30.npz, physics: expected shape (14,) at each step, as dmc:hopper",
        ),
        # The physics of the cheetah has the size of the walker's; what it shows has not.
        ({}, ["--task", "cheetah-run"], "expected recordings of dmc:cheetah-run, which shows position 8, velocity 9"),
        ({"leave_out": ["physics"]}, ["--task", "walker-run"], "expected the key 'physics'"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_sentence(tmp_path, cli, given, words, sentence):
    exorl(tmp_path / "proto", **given)
    outcome = cli(["data", "import", f"exorl:{tmp_path}/proto", *words, "--out", str(tmp_path / "store")])
    assert sentence in outcome.stderr
    assert (outcome.exit_code > 0, outcome.stderr.count("\n")) == (True, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["proto"]


@pytest.mark.faults
def test_only_exorl_keeps_the_physics(tmp_path, cli):
    outcome = cli(["data", "import", f"minari:./{tmp_path}", "--task", "walker-run", "--out", str(tmp_path / "store")])
    assert "--task: expected exorl:FOLDER, which keeps the physics, got 'minari:" in outcome.stderr


@pytest.mark.faults
def test_a_bad_episode_leaves_no_store(explored, tmp_path):
    for name, step in (("physics", 6), ("action", 7)):

        def holed(number, fields, name=name):
            values = fields[name].copy()
            values[7] = np.nan
            return {**fields, name: values} if number == 1 else fields

        store = copied(explored, tmp_path / name, change=holed)
        with pytest.raises(
            DataError, match=rf"episode 1, {name}, step {step}: expected finite numbers, got NaN or inf"
        ):
            add_rewards(store, "walker-run", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["action", "physics"]


@pytest.mark.faults
def test_stores_that_cannot_tell_are_refused(explored, tmp_path):
    with pytest.raises(ConfigError, match=r"task 'dmc:cheetah-run': expected one of dmc:walker-\.\.\., got another"):
        add_rewards(explored, "cheetah-run", tmp_path / "out")
    with pytest.raises(DataError, match="expected a new or empty folder, got one in use"):
        add_rewards(explored, "walker-run", explored.path)
    bare = [spec for spec in explored.schema.fields if spec.name != "physics"]
    with pytest.raises(
        DataError, match=r"expected the state of the physics, .*got none; record with make\(\.\.\., physics"
    ):
        add_rewards(copied(explored, tmp_path / "bare", fields=tuple(bare)), "walker-run", tmp_path / "out")
    partly = copied(
        explored, tmp_path / "partly", change=lambda i, f: {**f, "physics": None if i == 2 else f["physics"]}
    )
    with pytest.raises(DataError, match="partly, episode 2: expected the field 'physics', got none"):
        add_rewards(partly, "walker-run", tmp_path / "out")


def test_held_out_episodes_stay_held_out_and_a_missing_field_is_added(explored, tmp_path, cli):
    fields = (FieldSpec("note", "int8", (), "other"), *(s for s in explored.schema.fields if s.role != "reward"))
    store = copied(explored, tmp_path / "store", fields=fields)
    write_splits(store, {"train": [0, 2], "held_out": [1]})
    words = ["data", "reward", str(store.path), "--task", "walker-run", "--out", str(tmp_path / "out")]
    outcome = cli(words)
    assert outcome.exit_code == 0, outcome.stderr
    out = EpisodeStore.open(tmp_path / "out")
    assert {name: ids.tolist() for name, ids in read_splits(out).items()} == {"train": [0, 2], "held_out": [1]}
    assert out.schema.fields == (*fields, FieldSpec("reward", "float64", (), "reward"))
    assert not out.present("note").any()
    assert np.isfinite(out.episodes["return"]).all()


def test_trainings_without_rewards_name_the_way(explored, tmp_path):
    way = f"work them out: offbook data reward {explored.path} --task dmc:walker-walk --out STORE"
    with pytest.raises(DataError, match=way):
        check_offline(explored, OfflineConfig(algorithm="iql"))
    unrewarded = copied(
        explored, tmp_path / "store", fields=tuple(s for s in explored.schema.fields if s.role != "reward")
    )
    with pytest.raises(
        DataError, match="expected recordings with a reward, got none; work them out: offbook data reward"
    ):
        check_offline(unrewarded, OfflineConfig(algorithm="iql"))
