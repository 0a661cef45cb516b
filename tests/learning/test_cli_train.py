import json
from pathlib import Path

import numpy as np
import point_world
import pytest

from offbook.data.splits import write_splits
from offbook.learning.policies import load_policy
from offbook.runs.directory import RunDirectory

BRIEF = ["--preset", "smoke", "--fit.steps", "6", "--fit.log-every", "3", "--chunk", "4", "--execute", "2"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("recordings") / "store"
    point_world.record(path, 8)
    return path


def test_training_writes_a_run_and_says_how_to_go_on(cli, store, tmp_path):
    out = tmp_path / "bc"
    done = cli(["train", "bc", "--data", str(store), "--out", str(out), *BRIEF])
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("learnt from place, goal: 7 episodes, 6 steps")
    assert done.stdout.splitlines()[-1] == f"test it: offbook evaluate {out} --episodes 50"
    config = RunDirectory.open(out).config()
    assert config["parts"] == ["place", "goal"]
    assert (config["fit"]["steps"], config["hidden"], config["chunk"]) == (6, 64, 4)
    policy = load_policy(out)
    assert (policy.meta.name, policy.meta.chunk) == ("bc-bc", 2)
    assert policy.provenance["environment"] == "test:point"
    assert [row["step"] for row in RunDirectory.open(out).metrics()] == [3, 6]


def test_json_and_a_saved_configuration(cli, store, tmp_path):
    first = cli(["train", "bc", "--data", str(store), "--out", str(tmp_path / "a"), *BRIEF, "--json"])
    assert first.exit_code == 0, first.stderr
    result = json.loads(first.stdout)
    assert result["ok"]
    assert Path(result["policy"]).is_file()
    assert result["metrics"]["step"] == 6
    config = str(tmp_path / "a" / "config.json")
    again = cli(["train", "bc", "--data", str(store), "--out", str(tmp_path / "b"), "--config", config])
    assert again.exit_code == 0, again.stderr
    files = [load_policy(tmp_path / name).module.state_dict() for name in ("a", "b")]
    assert all(np.array_equal(files[0][name], files[1][name]) for name in files[0])


def test_resuming(cli, store, tmp_path):
    words = ["train", "bc", "--data", str(store), "--out", str(tmp_path / "a"), *BRIEF]
    assert cli(words).exit_code == 0
    refused = cli(words)
    assert refused.exit_code == 2
    assert "--resume" in refused.stderr
    before = (tmp_path / "a" / "metrics.jsonl").read_bytes()
    assert cli([*words, "--resume"]).exit_code == 0
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == before
    other = cli([*words, "--resume", "--hidden", "65"])
    assert other.exit_code == 2
    assert "hidden" in other.stderr


def test_episodes_recorded_after_the_split_are_not_passed_over_in_silence(cli, tmp_path):
    store = point_world.record(tmp_path / "store", 8)
    write_splits(store, {"train": range(5), "held_out": [5]})
    done = cli(["train", "bc", "--data", str(store.path), "--out", str(tmp_path / "bc"), *BRIEF])
    assert done.exit_code == 0, done.stderr
    assert "2 of 8 episodes are in no group and not learnt from: run offbook data split" in done.stderr


def test_an_encoder_and_policies_on_it(cli, store, tmp_path):
    eyes = tmp_path / "eyes"
    words = ["train", "encoder", "--data", str(store), "--preset", "smoke", "--out", str(eyes)]
    done = cli([*words, "--method", "moco", "--fit.steps", "4"])
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("moco: 32 features of front")
    assert RunDirectory.open(eyes).config()["cameras"] == ["front"]
    seeing = ["--data", str(store), "--parts", "place", "--encoder", str(eyes)]
    told = {"bc": BRIEF, "vinn": ["--neighbours", "3"],
            "dt": ["--preset", "smoke", "--fit.steps", "4", "--validate-every", "4"],
            "mtm": ["--preset", "smoke", "--fit.steps", "4", "--validate-every", "4"]}  # fmt: skip
    for name, more in told.items():
        out = tmp_path / name
        done = cli(["train", name, *seeing, "--out", str(out), *more])
        assert done.exit_code == 0, done.stderr
        assert load_policy(out).meta.observation.cameras == {"front": (24, 24)}
        assert RunDirectory.open(out).config()["parts"] == ["place", "front features"]
        assert cli(["train", name, *seeing, "--out", str(out), *more, "--resume"]).exit_code == 0
    assert "steps remembered" in cli(["train", "vinn", *seeing, "--out", str(tmp_path / "v"), *told["vinn"]]).stdout
    missing = cli(["train", "vinn", *seeing[:-1], str(tmp_path / "none"), "--out", str(tmp_path / "w")])
    assert missing.exit_code == 1
    assert "an encoder: a folder or a file, got neither" in missing.stderr
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parts", "plaice"], "did you mean 'place'"),
        (["--cameras", "wrist"], "--cameras wrist"),
        (["--preset", "tini"], "did you mean 'tiny'"),
        (["--fit.steps", "0"], "fit.steps"),
        (["--execute", "99"], "--execute"),
    ],
)
def test_wrong_use(cli, store, tmp_path, words, message):
    done = cli(["train", "bc", "--data", str(store), "--out", str(tmp_path / "a"), *words])
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    # Nothing was begun, so the same folder serves once the mistake is mended.
    assert not (tmp_path / "a").exists()


def test_recordings_that_are_not_there(cli, tmp_path):
    done = cli(["train", "bc", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "a")])
    assert done.exit_code == 1
    assert "none" in done.stderr
    assert not (tmp_path / "a").exists()
