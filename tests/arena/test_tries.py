"""Policies over several trials in a row on a real arena: the benchmark says how many, and the worker counts."""

from __future__ import annotations

import io
import json
from contextlib import closing
from dataclasses import replace

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from arena_server import running
from sqlalchemy import select

from offbook.arena import submissions
from offbook.arena.suites import make_suite
from offbook.arena.tables import Result, Submission, Trial
from offbook.arena.worker import run_worker
from offbook.errors import SubmissionError
from offbook.learning.hindsight_presets import decision_transformer, smoke
from offbook.learning.hindsight_training import train_hindsight
from offbook.robots import make_robot
from offbook.robots.gym import GymRobot
from offbook.runs.checkpoint import load_checkpoint, save_checkpoint
from offbook.runs.directory import RunDirectory
from offbook.sim.adapters import make
from offbook.sim.recording import record

pytestmark = pytest.mark.service

LAST, FIRST = "last-of-4", "first-of-4"
ROBOT = "offbook:darkpoint@4"
SLOTS = 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An agentic and a decision transformer that have hardly learnt anything."""
    folder = tmp_path_factory.mktemp("runs")
    store = record("offbook:darkpoint", 24, folder / "store", grades=(0.0, 0.5, 1.0), trials=6)
    brief = replace(smoke(), group="seed", fit=replace(smoke().fit, steps=3, device="cpu"))
    made = {}
    for name, config in (("at", brief), ("dt", decision_transformer(brief))):
        run = RunDirectory.create(folder / name, config)
        train_hindsight(store, config, run)
        made[name] = run.path
    return made


@pytest.fixture(scope="module")
def arena(tmp_path_factory):
    with running(tmp_path_factory.mktemp("arena"), watchdog_seconds=10.0) as arena:
        with arena.database.write() as session:
            submissions.define_benchmark(session, make_suite("darkpoint", SLOTS, seed=1))
        yield arena


def submit(arena, cli, monkeypatch, policy, *more, role="ada"):
    monkeypatch.setenv("OFFBOOK_TOKEN", arena.tokens[role])
    done = cli(["arena", "submit", str(policy), "--url", arena.url, "--benchmark", "darkpoint", *more, "--json"])
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)["id"]


def work(arena, robot=ROBOT):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GymRobot, "frame", lambda self: None)  # films take most of the time
        return run_worker(arena.url, arena.tokens["lab"], robot, name=robot.rpartition(":")[2], idle_exit=0.3)


def played(arena, entry: str) -> dict[int, tuple[float, list[float]]]:
    """Of each seed the score, and the returns of its trials as a world without trials pays them."""
    found = {}
    with arena.database.read() as session, closing(make("offbook:darkpoint")) as env:
        query = select(Trial.seed, Result.score, Result.files).join(Result, Result.trial_id == Trial.id)
        for seed, score, files in session.execute(query.where(Trial.submission_id == int(entry))):
            sha256 = next(file["sha256"] for file in files if file["name"] == "episode.parquet")
            table = pq.read_table(io.BytesIO(httpx.get(f"{arena.url}/v1/blobs/{sha256}", trust_env=False).content))
            numbers, returns = np.array(table["state"].to_pylist())[:, 2], []
            for number in range(int(numbers.max()) + 1):
                env.reset(seed=seed if number == 0 else None)
                actions = np.array(table["action"].to_pylist())[numbers == number]
                returns.append(sum(env.step(action)[1] for action in actions))
            found[seed] = score, returns
    return found


def test_three_policies_stand_on_both_boards_with_the_return_of_the_trial_that_each_names(
    arena, runs, cli, monkeypatch
):
    entries = {}
    for split in (LAST, FIRST):
        for name in ("at", "dt"):
            entries[name, split] = submit(arena, cli, monkeypatch, runs[name], "--split", split, "--method", name)
        for name in ("random", "expert"):
            entries[name, split] = submit(arena, cli, monkeypatch, name, "--split", split, role="root")
    assert work(arena).trials == {"done": 8 * SLOTS}
    found = {key: played(arena, entry) for key, entry in entries.items()}
    for (_, split), trials in found.items():
        for score, returns in trials.values():
            assert len(returns) == (4 if split == LAST else 1)
            assert score == pytest.approx(returns[-1], abs=1e-5)
    # Neither the best of the trials nor their mean.
    assert any(max(returns) > score + 0.1 for score, returns in found["random", LAST].values())
    for name in ("random", "expert"):
        for seed, (first, _) in found[name, FIRST].items():
            assert first == pytest.approx(found[name, LAST][seed][1][0], abs=1e-5)
    assert all(score > 10 for score, _ in found["expert", LAST].values())
    with arena.client() as client:
        boards = {split: client.leaderboard("darkpoint", split) for split in (LAST, FIRST)}
        [listed] = [each for each in client.benchmarks() if each["name"] == "darkpoint"]
    for split, board in boards.items():
        rows = {row["name"]: row for row in board["rows"]}
        assert rows.keys() == {"at", "dt", "random", "expert"}
        assert rows["at"]["rank"]
        assert rows["dt"]["rank"]
        for name, row in rows.items():
            scores = [score for score, _ in found[name, split].values()]
            assert row["score"]["value"] == pytest.approx(np.mean(scores))
    # The last trial is what a visitor sees first, and what the front page names a leader of.
    assert listed["splits"] == [LAST, FIRST]
    best = max(("at", "dt"), key=lambda name: np.mean([score for score, _ in found[name, LAST].values()]))
    assert listed["leader"]["submission"] == entries[best, LAST]


def test_a_submission_can_neither_ask_for_more_trials_nor_tell_its_returns(arena, runs, cli, monkeypatch, tmp_path):
    whole = load_checkpoint(runs["at"] / "checkpoints" / "last.safetensors")
    claims = {"tries": 99, "stop": 99, "score": 1e9, "returns": [1e9] * 99, "success": True}
    save_checkpoint(tmp_path / "proud.safetensors", whole.kind, whole.values, {**whole.record, **claims})
    entry = submit(arena, cli, monkeypatch, tmp_path / "proud.safetensors", "--trials", "99")
    assert work(arena).trials == {"done": SLOTS}
    for score, returns in played(arena, entry).values():
        assert len(returns) == 4
        assert score == pytest.approx(returns[-1], abs=1e-5)
        assert score <= 16
    for more in ({"score": 1e9}, {"returns": [1e9]}, {"tries": 99}, {"scene": {"trials": 99}}, {"seed": 3}):
        with pytest.raises(SubmissionError, match=next(iter(more))):
            arena.submit(benchmark="darkpoint", **more)
    with arena.database.read() as session:
        assert session.get(Submission, int(entry)).wanted == SLOTS


def test_a_policy_that_reads_trials_is_refused_where_there_are_none(arena, runs, cli, monkeypatch):
    with arena.database.write() as session:
        submissions.define_benchmark(session, make_suite("pour", 1, seed=0))
    work(arena, "pour")
    monkeypatch.setenv("OFFBOOK_TOKEN", arena.tokens["ada"])
    refused = cli(["arena", "submit", str(runs["at"]), "--url", arena.url, "--benchmark", "pour"])
    assert refused.exit_code == 1
    line = refused.stderr.splitlines()[-1]
    assert "a state part 'trial' of size 3" in line or "a state part 'position' of size 2" in line
    assert "or a robot that has it" in line


def test_a_policy_check_finds_a_robot_with_as_many_trials_as_the_policy_reads(runs, cli):
    for name, robot in (("at", ROBOT), ("dt", "offbook:darkpoint@1")):
        checked = cli(["policy", "check", str(runs[name]), "--json"])
        assert checked.exit_code == 0, checked.stderr
        report = json.loads(checked.stdout)
        assert (report["robot"], report["fit"]) == (robot, True)
        assert {check["verdict"] for check in report["checks"]} <= {"fine", "note"}
    bare = cli(["policy", "check", str(runs["at"]), "--task", "offbook:darkpoint"])
    assert bare.exit_code == 1
    assert "expected a state part 'trial' of size 3" in bare.stdout
    assert cli(["policy", "check", "random", "--robot", ROBOT]).exit_code == 0


@pytest.mark.parametrize("name", ["pour", "scoop"])
def test_each_split_of_a_task_on_the_table_can_be_played_on_its_robot(name):
    suite = make_suite(name, 3, seed=2)
    assert list(suite.splits) == ["seen", "position", "object", "lighting", "all"]
    with closing(make_robot(suite.robot_class)) as robot:
        for cases in suite.splits.values():
            assert [case["seed"] for case in cases] == [case["seed"] for case in suite.splits["seen"]]
            shown = robot.reset(cases[0]["scene"], cases[0]["seed"]).state[0]
            np.testing.assert_allclose(shown[7:9], cases[0]["scene"]["bowl"], atol=1e-6)


@pytest.mark.parametrize("name", ["darkpoint", "hopper-tries"])
def test_both_splits_have_the_same_seeds_and_a_robot_that_plays_them(name):
    suite = make_suite(name, 5, seed=2)
    seeds = {split: [case["seed"] for case in cases] for split, cases in suite.splits.items()}
    assert seeds[LAST] == seeds[FIRST]
    assert len(set(seeds[LAST])) == 5
    assert [case["scene"] for case in suite.splits[FIRST]] == [{"trials": 1}] * 5
    with closing(make_robot(suite.robot_class)) as robot:
        assert robot.spec.name == suite.robot_class
        assert robot.reset(suite.splits[FIRST][0]["scene"], 0).state[0, -3:].tolist() == [0, 0, 0]
