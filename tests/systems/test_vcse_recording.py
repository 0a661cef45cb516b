"""What an exploring agent lives through: whole episodes, without a task, for any task, and the same after a crash."""

import os
import signal

import numpy as np
import pytest

from offbook.data.store import EpisodeStore
from offbook.errors import ConfigError
from offbook.runs.seeding import training_seeds
from offbook.sim.rewards import add_rewards
from offbook.systems.vcse import recording
from offbook.systems.vcse.recording import record_exploration


def short(monkeypatch, seconds):
    """Episodes of the control suite that take no longer."""
    make = recording.make
    monkeypatch.setattr(recording, "make", lambda name, **settings: make(name, time_limit=seconds, **settings))


def test_without_a_task_it_serves_every_task_of_the_body(tmp_path, monkeypatch):
    short(monkeypatch, 1.0)
    store = record_exploration("dmc:walker-walk", 130, tmp_path / "free")
    assert len(store) == 4  # 40 steps each; the fourth is finished
    assert not store.present("reward").any()
    assert store.present("physics").all()
    assert store.episodes["seed"].tolist() == training_seeds(0, 4)
    assert store.episode(3).truncated
    for task in ("dmc:walker-walk", "dmc:walker-run"):
        assert len(add_rewards(store, task, tmp_path / task[4:]).field("reward")) == 160


def test_with_the_reward_it_is_what_the_task_pays(tmp_path, monkeypatch):
    short(monkeypatch, 1.0)
    store = record_exploration("dmc:walker-walk", 80, tmp_path / "paid", bonus="vcse", with_reward=True, beta=0.1)
    again = add_rewards(store, "dmc:walker-walk", tmp_path / "again")
    np.testing.assert_allclose(store.field("reward"), again.field("reward"), atol=1e-6)


def test_the_agent_is_paid_by_the_bonus_and_sees_no_physics(tmp_path, monkeypatch):
    short(monkeypatch, 1.0)
    made = []
    agent = recording._agent
    monkeypatch.setattr(recording, "_agent", lambda *of: made.append(agent(*of)) or made[-1])
    record_exploration("dmc:walker-walk", 160, tmp_path / "a")
    assert made[0].observation_space.shape == (24,)
    buffer = made[0].replay_buffer
    assert (buffer.rewards[:160] == 0).all()
    assert (buffer.sample(32).rewards > 0).all()


def test_a_killed_life_is_lived_again_to_the_same_store(tmp_path, monkeypatch):
    whole = record_exploration("gym:Pendulum-v1", 400, tmp_path / "whole", bonus="rnd")
    live = recording._live

    def killed(agent, recorder, steps):
        for number, sign in enumerate(live(agent, recorder, 250)):
            yield sign
            if number == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    if not (child := os.fork()):
        monkeypatch.setattr(recording, "_live", killed)
        try:
            record_exploration("gym:Pendulum-v1", 400, tmp_path / "torn", bonus="rnd")
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert 0 < len(EpisodeStore.open(tmp_path / "torn")) < 2
    assert record_exploration("gym:Pendulum-v1", 400, tmp_path / "torn", bonus="rnd").digest == whole.digest
    assert record_exploration("gym:Pendulum-v1", 400, tmp_path / "torn", bonus="rnd").digest == whole.digest


def test_what_does_not_fit_is_said_in_a_sentence(tmp_path):
    for given, said in (
        ({"bonus": "vcse"}, "expected the task's reward"),
        ({"steps": 0}, "expected 1 or more"),
        ({"beta": float("nan")}, "expected a number, 0 or more"),
        ({"beta": float("inf")}, "expected a number, 0 or more"),
        ({"seed": -1}, "seed: expected an integer of 0 or more"),
        ({"env_id": "gym:CartPole-v1"}, "continuous actions, got actions Discrete"),
    ):
        with pytest.raises(ConfigError, match=said):
            record_exploration(**{"env_id": "gym:Pendulum-v1", "steps": 10, "out": tmp_path / "a", **given})
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("words", [["--bonus", "vcse"], ["--beta", "inf"], ["--seed", "-1"], ["--steps", "0"]])
def test_wrong_flags_leave_no_folder(cli, tmp_path, words):
    outcome = cli(["explore", "record", "gym:Pendulum-v1", *words, "--out", str(tmp_path / "a")])
    assert outcome.exit_code == 2
    assert words[0][2:] in outcome.stderr
    assert not (tmp_path / "a").exists()


def test_a_transformer_learns_from_what_was_explored(cli, tmp_path, monkeypatch):
    short(monkeypatch, 0.5)
    free, run, fitted = (str(tmp_path / name) for name in ("free", "run", "fitted"))
    assert cli(["explore", "record", "dmc:walker-walk", "--steps", "150", "--out", free]).exit_code == 0
    assert cli(["data", "reward", free, "--task", "dmc:walker-run", "--out", run]).exit_code == 0
    outcome = cli(["train", "agentic_transformer", "--preset", "smoke", "--data", run, "--out", fitted])
    assert outcome.exit_code == 0, outcome.stderr
