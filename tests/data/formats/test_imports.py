"""Every format goes the whole way: file, store, description, training, test in the world that it is from."""

import json
import shutil

import foreign
import gymnasium
import numpy as np
import pytest

from offbook.data.formats import FORMATS, Recordings, import_dataset
from offbook.data.formats import d4rl as d4rl_format
from offbook.errors import ConfigError, DataError

BRIEF = ["--preset", "smoke", "--fit.steps", "20", "--chunk", "2", "--execute", "1"]


@pytest.fixture(scope="module")
def swings():
    """Three short episodes of a pendulum that is pushed at random."""
    env = gymnasium.make("Pendulum-v1", max_episode_steps=25)
    env.action_space.seed(0)
    episodes = []
    for seed in range(3):
        observations, actions, rewards, over = [env.reset(seed=seed)[0]], [], [], False
        while not over:
            actions.append(env.action_space.sample())
            observation, reward, terminated, truncated, _ = env.step(actions[-1])
            observations.append(observation)
            rewards.append(reward)
            over = terminated or truncated
        arrays = {"observation": observations, "action": actions, "reward": rewards}
        episodes.append({name: np.asarray(values, np.float32) for name, values in arrays.items()})
        episodes[-1]["terminated"] = False
    env.close()
    return episodes


def d4rl(folder, swings):
    foreign.d4rl(folder / "f.hdf5", swings)
    return f"d4rl:{folder}/f.hdf5", "gym:Pendulum-v1"


def robomimic(folder, swings):
    foreign.robomimic(folder / "f.hdf5", swings, env_args={"type": 2, "env_name": "Pendulum-v1", "env_kwargs": {}})
    return f"robomimic:{folder}/f.hdf5", None


def exorl(folder, swings):
    foreign.exorl(folder / "f", swings)
    return f"exorl:{folder}/f", "gym:Pendulum-v1"


def paths(folder, swings):
    foreign.paths(folder / "f.pkl", swings, after=False)
    return f"paths:{folder}/f.pkl", "gym:Pendulum-v1"


def toto(folder, swings):
    foreign.toto(folder / "f", foreign.walks((9, 8, 7), size=7, actions=7))
    return f"toto:{folder}/f@0", "offbook:pour"


def zarr(folder, swings):
    observations = np.concatenate([swing["observation"] for swing in swings])
    foreign.zarr_buffer(folder / "f.zarr", swings, **{"data/observation": observations, "data/obs": None})
    return f"zarr:{folder}/f.zarr", "gym:Pendulum-v1"


@pytest.mark.learning
@pytest.mark.parametrize("make", [d4rl, robomimic, exorl, paths, toto, zarr], ids=lambda make: make.__name__)
def test_from_a_foreign_file_to_a_tested_policy(tmp_path, cli, swings, make):
    source, environment = make(tmp_path, swings)

    def run(*words):
        outcome = cli([*map(str, words), "--json"])
        assert outcome.exit_code == 0, outcome.stderr
        return json.loads(outcome.stdout)

    given = [] if environment is None else ["--env", environment]
    data = run("data", "import", source, "--out", tmp_path / "store", *given)
    assert data == run("data", "info", tmp_path / "store")
    assert data["episodes"] == 3
    assert data["as_imported"]
    environment = environment or "gym:Pendulum-v1"
    assert data["environment"] == environment
    if environment == "gym:Pendulum-v1":
        assert data["length"]["least"] == data["length"]["most"] == 25
    run("train", "bc", "--data", tmp_path / "store", "--out", tmp_path / "run", "--no-success-only", *BRIEF)
    few = ["--episodes", "1", "--max-steps", "10", "--videos", "0"]
    assert run("evaluate", tmp_path / "run", *few)["task"] == environment


def test_what_an_unknown_or_unwritable_format_says(tmp_path, make_store, cli):
    with pytest.raises(ConfigError, match=r"format 'd4lr'; did you mean 'd4rl'\?"):
        import_dataset("d4lr:x.hdf5", tmp_path / "store")
    store = make_store([3])
    for name in sorted(set(FORMATS) - {"minari", "lerobot"}):
        outcome = cli(["data", "export", str(store.path), f"{name}:{tmp_path}/new"])
        assert (outcome.exit_code, outcome.stderr.count("\n")) == (2, 1)
        assert f"expected a format that can be written, got {name}; export to minari or lerobot" in outcome.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.faults
@pytest.mark.parametrize(
    "error", [ValueError("a\nb"), KeyError("x"), ZeroDivisionError(), MemoryError(), SyntaxError("b")]
)
@pytest.mark.parametrize("late", [False, True])
def test_whatever_a_file_makes_its_reader_raise_is_explained(tmp_path, make_store, monkeypatch, error, late):
    schema = make_store([3]).schema

    def episodes():
        raise error
        yield

    def read(name):
        if not late:
            raise error
        return Recordings(schema=schema, episodes=episodes(), total=1, stored=1)

    monkeypatch.setattr(d4rl_format, "read", read)
    with pytest.raises(
        DataError, match=f"^d4rl:x: expected recordings in the format's layout, got {type(error).__name__}"
    ) as told:
        import_dataset("d4rl:x", tmp_path / "new")
    assert "\n" not in str(told.value)
    assert not list(tmp_path.glob("new*"))


@pytest.mark.faults
def test_a_folder_of_the_users_own_is_never_taken_for_what_an_import_left(tmp_path, swings):
    source, _ = d4rl(tmp_path, swings)
    partial = tmp_path / "new.partial"
    for names in (["notes.txt"], ["store.json", "notes.txt"], ["fields"], [".git"]):
        partial.mkdir()
        for name in names:
            (partial / name).write_text("mine")
        with pytest.raises(DataError, match=r"new\.partial: expected what an import left, or nothing"):
            import_dataset(source, tmp_path / "new")
        assert [(partial / name).read_text() for name in names] == ["mine"] * len(names)
        shutil.rmtree(partial)
    partial.write_text("mine")
    with pytest.raises(DataError, match="expected what an import left, or nothing"):
        import_dataset(source, tmp_path / "new")
    partial.unlink()
    shutil.copytree(import_dataset(source, tmp_path / "whole").path, partial)
    (partial / "store.json").write_bytes((partial / "store.json").read_bytes()[:20])
    assert len(import_dataset(source, tmp_path / "new")) == 3
    assert not partial.exists()
