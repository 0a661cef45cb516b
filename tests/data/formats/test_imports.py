"""Every format goes the whole way: file, store, description, training, test in the world that it is from."""

import json
import shutil
import warnings

import foreign
import foreign_lerobot
import gymnasium
import numpy as np
import pytest
from minari import create_dataset_from_buffers
from minari.data_collector.episode_buffer import EpisodeBuffer

from offbook.data.formats import FORMATS, Recordings, import_dataset
from offbook.data.formats import d4rl as d4rl_format
from offbook.data.store import EpisodeStore
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


def minari(folder, swings):
    buffers = [
        EpisodeBuffer(
            observations=swing["observation"],
            actions=swing["action"],
            rewards=swing["reward"],
            terminations=np.zeros(25, bool),
            truncations=np.arange(25) == 24,
        )
        for swing in swings
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        create_dataset_from_buffers("swings-v0", buffers, env="Pendulum-v1")
    return "minari:swings-v0", None, "observation", ""


def lerobot_v3(folder, swings):
    foreign_lerobot.recorded(folder / "f", swings, "v3.0")
    return f"lerobot:{folder}/f", "gym:Pendulum-v1", "observation", "observation.state is taken for what gym:Pend"


def lerobot_v21(folder, swings):
    foreign_lerobot.recorded(folder / "f", swings, "v2.1")
    return f"lerobot:{folder}/f", "gym:Pendulum-v1", "observation", "observation.state is taken for what gym:Pend"


def d4rl(folder, swings):
    foreign.d4rl(folder / "f.hdf5", swings)
    return f"d4rl:{folder}/f.hdf5", "gym:Pendulum-v1", "observation", "episodes end at terminals and timeouts"


def robomimic(folder, swings):
    foreign.robomimic(folder / "f.hdf5", swings, env_args={"type": 2, "env_name": "Pendulum-v1", "env_kwargs": {}})
    return f"robomimic:{folder}/f.hdf5", None, "observation", "is the recorded next observation of its last step"


def exorl(folder, swings):
    foreign.exorl(folder / "f", swings)
    return f"exorl:{folder}/f", "gym:Pendulum-v1", "observation", "row t + 1 belong to observation t"


def paths(folder, swings):
    foreign.paths(folder / "f.pkl", swings, after=False)
    return f"paths:{folder}/f.pkl", "gym:Pendulum-v1", "observation", "the last observation is the final one"


def toto(folder, swings):
    foreign.toto(folder / "f", foreign.walks((25,) * 3, size=7, actions=7))
    return f"toto:{folder}/f@0", "offbook:pour", "joints", "the weight in the last row is the score"


def zarr(folder, swings):
    rewards = np.concatenate([foreign.padded(swing["reward"]) for swing in swings])
    foreign.zarr_buffer(folder / "f.zarr", swings, **{"data/reward": rewards})
    return f"zarr:{folder}/f.zarr", "gym:Pendulum-v1", "observation", "the obs is taken for what gym:Pendulum-v1 shows"


@pytest.mark.learning
@pytest.mark.parametrize(
    "make",
    [minari, lerobot_v3, lerobot_v21, d4rl, robomimic, exorl, paths, toto, zarr],
    ids=lambda make: make.__name__,
)
def test_from_a_foreign_file_to_a_tested_policy(tmp_path, cli, swings, make, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    source, given, state, stated = make(tmp_path, swings)

    def run(*words):
        outcome = cli([*map(str, words), "--json"])
        assert outcome.exit_code == 0, outcome.stderr
        return json.loads(outcome.stdout)

    out, environment = tmp_path / "store", given or "gym:Pendulum-v1"
    data = run("data", "import", source, "--out", out, *([] if given is None else ["--env", given]))

    check = run("data", "check", out)
    results = {finding["check"]: finding["result"] for finding in check["findings"]}
    assert check["ok"]
    assert (results["index"], results["leftovers"], results["checksums"], results["numbers"]) == ("ok",) * 4
    assert results.get("videos", "ok") == "ok"

    assert data == run("data", "info", out)
    assert (data["episodes"], data["steps"], data["environment"]) == (3, 75, environment)
    assert data["length"]["least"] == data["length"]["most"] == 25
    assert stated in " / ".join(data["as_imported"])
    fields = {field["name"]: field for field in data["fields"]}
    assert (fields[state]["role"], fields["action"]["role"]) == ("observation", "action")
    assert all(field["episodes"] == 3 for field in fields.values())
    if environment == "gym:Pendulum-v1":
        np.testing.assert_array_equal(EpisodeStore.open(out).episode(1).fields[state], swings[1]["observation"])
        assert data["return"]["most"] == pytest.approx(max(swing["reward"].sum() for swing in swings), rel=1e-5)

    run("train", "bc", "--data", out, "--out", tmp_path / "run", "--no-success-only", *BRIEF)
    tested = run("evaluate", tmp_path / "run", "--episodes", "1", "--max-steps", "10", "--videos", "0")
    assert tested["task"] == environment
    assert len(tested["policies"]) == 1
    held_out = ["--held-out", "0.4", "--preset", "smoke", "--fit.steps", "2", "--model.dim", "16"]
    card = run("train", "mtm", "--data", out, "--out", tmp_path / "mtm", *held_out)["card"]
    assert [row["role"] for row in card] == ["bc", "rcbc", "id", "fd", "return", "waypoint"]


def test_what_an_unknown_or_unwritable_format_says(tmp_path, make_store, cli):
    with pytest.raises(ConfigError, match=r"format 'd4lr'; did you mean 'd4rl'\?"):
        import_dataset("d4lr:x.hdf5", tmp_path / "store")
    store = make_store([3])
    for name in sorted(set(FORMATS) - {"minari", "lerobot", "toto"}):
        outcome = cli(["data", "export", str(store.path), f"{name}:{tmp_path}/new"])
        assert (outcome.exit_code, outcome.stderr.count("\n")) == (2, 1)
        assert f"expected a format that can be written, got {name}; export to minari, lerobot or toto" in outcome.stderr
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
    source, *_ = d4rl(tmp_path, swings)
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
