"""The project's own datasets: the same digest each time, also after a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from offbook.cli.main import main
from offbook.data.store import EpisodeStore
from offbook.errors import ConfigError, DataError
from offbook.learning import agents
from offbook.learning.datasets import DATASETS, generate

SCRIPTED = [name for name, made in DATASETS.items() if made.policy != "sac"]
REPLAYED = [name for name, made in DATASETS.items() if made.policy == "sac"]


@pytest.mark.parametrize("name", SCRIPTED)
def test_a_dataset_is_the_same_each_time(name, tmp_path):
    first = generate(name, tmp_path / "first", size=2)
    again = generate(name, tmp_path / "again", size=2, jobs=2)
    other = generate(name, tmp_path / "other", size=1, seed=1)
    assert first.digest == again.digest
    assert first.episode(0).seed != other.episode(0).seed


@pytest.mark.parametrize("name", REPLAYED)
def test_a_replay_is_the_same_each_time(name, tmp_path, monkeypatch):
    monkeypatch.setattr(agents, "_FIRST_RANDOM", 60)
    made = DATASETS[name].env_id
    stores = [agents.record_replay(made, 100, tmp_path / place, round_steps=50) for place in ("first", "again")]
    assert stores[0].digest == stores[1].digest
    assert stores[0].steps >= 100
    shutil.rmtree(stores[1].path)  # its agent is left
    assert agents.record_replay(made, 100, tmp_path / "again", round_steps=50).digest == stores[0].digest
    other = agents.record_replay(made, 50, tmp_path / "other", round_steps=50, seed=1)
    assert not np.array_equal(stores[0].episode(0).fields["action"][:5], other.episode(0).fields["action"][:5])


_CHILD = """
import sys
from offbook.learning import agents
agents._FIRST_RANDOM = 100
agents.record_replay("gym:Hopper-v5", 400, sys.argv[1], round_steps=100)
"""


def test_a_killed_replay_ends_with_the_store_it_would_have_had(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run([sys.executable, "-c", _CHILD, str(whole)], check=True, capture_output=True)
    child = subprocess.Popen([sys.executable, "-c", _CHILD, str(cut)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    # Some episodes after the first save: those are lived again.
    while child.poll() is None and time.monotonic() < deadline and _episodes(cut) < 9:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert cut.with_name("cut.agent.safetensors").exists()
    before = _episodes(cut)
    subprocess.run([sys.executable, "-c", _CHILD, str(cut)], check=True, capture_output=True)
    assert EpisodeStore.open(cut).digest == EpisodeStore.open(whole).digest
    assert _episodes(cut) > before


def _episodes(path):
    try:
        return len(EpisodeStore.open(path))
    except DataError:
        return 0


@pytest.mark.slow
def test_soft_actor_critic_learns(tmp_path):
    store = agents.record_replay("gym:Pendulum-v1", 6000, tmp_path / "pendulum", round_steps=2000)
    returns = store.episodes["return"]
    assert returns[-5:].mean() > returns[:5].mean() + 500


def test_unlabelled_recordings_have_no_rewards(tmp_path):
    store = generate("walker-explore", tmp_path / "store", size=1)
    assert not store.present("reward").any()
    assert np.isnan(store.episodes["return"]).all()
    assert store.episode(0).fields["physics"].shape == (1001, 18)


def test_a_dataset_is_made_once_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OFFBOOK_CACHE", str(tmp_path))
    arguments = ["data", "generate", "minigrid-bot", "--size", "2", "--json"]
    assert main(arguments) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["path"] == str(tmp_path / "datasets" / "minigrid-bot-2-seed0")
    monkeypatch.delattr("offbook.sim.recording.make")  # without it nothing can be recorded
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out) == first


def test_a_damaged_dataset_is_noticed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OFFBOOK_CACHE", str(tmp_path))
    arguments = ["data", "generate", "minigrid-bot", "--size", "2"]
    assert main(arguments) == 0
    file = tmp_path / "datasets" / "minigrid-bot-2-seed0" / "fields" / "reward.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    capsys.readouterr()
    assert main(arguments) == 1
    assert "episode 1" in capsys.readouterr().err


def test_the_list_says_what_there_is(capsys):
    assert main(["data", "generate"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in DATASETS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["pointmaze-mixd"], "did you mean 'pointmaze-mixed'"), (["minigrid-bot", "--size", "0"], "1 or more episodes")],
)
def test_wrong_use_is_explained(arguments, message, capsys):
    assert main(["data", "generate", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_with_another_recording_is_left_alone(tmp_path):
    generate("minigrid-bot", tmp_path / "store", size=1)
    with pytest.raises(ConfigError, match="as this recording has it"):
        agents.record_replay("gym:Hopper-v5", 10, tmp_path / "store")
    assert len(EpisodeStore.open(tmp_path / "store")) == 1


def test_an_agent_that_cannot_learn_the_task_says_so(tmp_path):
    with pytest.raises(ConfigError, match="continuous actions"):
        agents.record_replay("gym:CartPole-v1", 10, tmp_path / "store")
    assert not os.path.lexists(tmp_path / "store")
