import json

import line_world
import pytest
import torch
from joblib.externals.loky import get_reusable_executor

from offbook.client.protocol import ActionSpec, ObservationSpec, PolicyMeta
from offbook.learning.cloning import ClonedPolicy
from offbook.learning.networks import CloningNetwork
from offbook.runs.directory import RunDirectory


def saved(path, environment, *, part=("place", 1), actions=1):
    meta = PolicyMeta(
        name="clone",
        observation=ObservationSpec(state=(part,)),
        action=ActionSpec(size=actions, low=(-1.0,) * actions, high=(1.0,) * actions),
        chunk=2,
    )
    torch.random.default_generator.manual_seed(0)
    module = CloningNetwork(meta.observation, meta.action, chunk=2, hidden=4, depth=1, dropout=0.0)
    run = RunDirectory.create(path, {})
    ClonedPolicy(module, meta, {"environment": environment}).save(run.checkpoint())
    return str(path)


def test_a_run_is_tested_where_it_was_recorded(cli, tmp_path):
    run = saved(tmp_path / "run", line_world.NAME)
    done = cli(["evaluate", run, "--episodes", "4", "--videos", "1"])
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"{line_world.NAME}, 4 episodes each, with 95% intervals"
    assert "clone" in done.stdout
    assert done.stdout.splitlines()[-1] == f"results, videos and figure in {run}/evaluation"
    folder = tmp_path / "run" / "evaluation"
    results = json.loads((folder / "evaluation.json").read_text())
    assert results["task"] == line_world.NAME
    assert len(results["policies"][0]["episodes"]) == 4
    assert (folder / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(folder.rglob("*.mp4"))) == 1


def test_several_are_compared_on_the_same_episodes(cli, tmp_path):
    # Two runs with the same name inside are told apart by what was typed.
    first, second = saved(tmp_path / "a", line_world.NAME), saved(tmp_path / "b", line_world.NAME)
    words = ["evaluate", first, second, "random", "--episodes", "6", "--out", str(tmp_path / "out"), "--json"]
    done = cli(words)
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert [policy["policy"] for policy in result["policies"]] == [first, second, "random"]
    seeds = {tuple(e["seed"] for e in policy["episodes"]) for policy in result["policies"]}
    assert len(seeds) == 1
    equal = result["comparisons"][0]
    assert (equal["difference"]["value"], equal["mcnemar_p"], equal["verdict"]) == (0.0, 1.0, "not separated")
    assert len(result["comparisons"]) == 3
    assert len(list((tmp_path / "out" / "videos").iterdir())) == 3
    text = cli(["evaluate", first, "random", "--episodes", "3", "--out", str(tmp_path / "out")])
    assert "not separated" in text.stdout or "better" in text.stdout


def test_runs_whose_names_look_alike_keep_their_own_videos(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run in ("runs/bc", "runs-bc"):
        saved(tmp_path / run, line_world.NAME)
    done = cli(["evaluate", "runs/bc", "runs-bc", "--episodes", "1", "--videos", "1", "--out", "out"])
    assert done.exit_code == 0, done.stderr
    videos = [path.relative_to(tmp_path).parts for path in tmp_path.glob("out/videos/*/*.mp4")]
    assert sorted(folder for _, _, folder, _ in videos) == ["runs-bc", "runs-bc-2"]


def own_policy(folder, action):
    """The name of a policy for Pendulum that somebody wrote in that folder."""
    module = f"own_{folder.name.replace('-', '_')}"
    (folder / f"{module}.py").write_text(
        "import numpy as np\nfrom offbook.client import *\n"
        f"def act(state, images):\n    return {action}\n"
        "SEEN, DONE = ObservationSpec(state=(('observation', 3),)), ActionSpec(size=1, low=(-2.0,), high=(2.0,))\n"
        "policy = FunctionPolicy(PolicyMeta(name='one', observation=SEEN, action=DONE), act)\n"
    )
    return f"{module}:policy"


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_policy_of_ones_own_is_tested_in_other_processes_too(cli, tmp_path, monkeypatch, jobs):
    monkeypatch.chdir(tmp_path)
    policy = own_policy(tmp_path, "np.ones(1)")
    # Processes that another test left waiting know nothing of this folder.
    get_reusable_executor().shutdown(wait=True)
    words = ["--task", "gym:Pendulum-v1", "--episodes", "2", "--max-steps", "3", "--jobs", jobs, "--json"]
    done = cli(["evaluate", policy, *words])
    assert done.exit_code == 0, done.stderr
    (result,) = json.loads(done.stdout)["policies"]
    assert (result["policy"], [episode["steps"] for episode in result["episodes"]]) == ("one", [3, 3])


@pytest.mark.faults
def test_actions_that_are_no_numbers_end_a_test_in_one_sentence(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    policy = own_policy(tmp_path, "np.array([np.nan])")
    done = cli(["evaluate", policy, "--task", "gym:Pendulum-v1", "--episodes", "2", "--out", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "policy 'one'" in done.stderr
    assert "nan" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_one_episode_admits_that_it_knows_nothing(cli):
    done = cli(["evaluate", "random", "--task", line_world.NAME, "--episodes", "1"])
    assert done.exit_code == 0, done.stderr
    assert "[unknown]" in done.stdout
    assert done.stdout.splitlines()[-1] == "add --out FOLDER for videos and a figure"


@pytest.mark.faults
def test_a_checkpoint_for_another_environment_names_both_sides(cli, tmp_path):
    run = saved(tmp_path / "run", "offbook:pour", part=("joints", 7))
    done = cli(["evaluate", run, "--task", line_world.NAME, "--episodes", "1"])
    assert done.exit_code == 2
    assert "'joints' of size 7" in done.stderr
    assert "{'place': 1}" in done.stderr
    run = saved(tmp_path / "two", line_world.NAME, actions=2)
    done = cli(["evaluate", run, "--episodes", "1"])
    assert done.exit_code == 2
    assert "actions of size 2" in done.stderr
    assert "size 1" in done.stderr


@pytest.mark.faults
@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["random"], 2, "--task"),
        (["no/such/run", "--task", line_world.NAME], 1, "no/such/run"),
        (["no/such/run"], 1, "no/such/run"),
        (["random", "--task", "gym:Pendulun-v1"], 2, "did you mean 'Pendulum-v1'"),
        (["random", "random", "--task", line_world.NAME], 2, "name each once"),
        (["expert:much", "--task", "offbook:pour"], 2, "write expert:0.5"),
        (["expert:7", "--task", "offbook:pour"], 2, "grade"),
        (["expert", "--task", line_world.NAME], 2, "scripted expert"),
        (["random", "--task", line_world.NAME, "--episodes", "0"], 2, "--episodes"),
        ([], 2, "name each once"),
    ],
)
def test_wrong_use(cli, words, code, message):
    done = cli(["evaluate", *words])
    assert done.exit_code == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.faults
def test_a_pickle_is_refused(cli, tmp_path):
    torch.save({"weights": torch.zeros(1)}, tmp_path / "policy.pt")
    done = cli(["evaluate", str(tmp_path / "policy.pt")])
    assert done.exit_code == 1
    assert "pickle" in done.stderr
