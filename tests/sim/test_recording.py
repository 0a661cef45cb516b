import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from killing import killed
from offbook.data.store import EpisodeStore
from offbook.errors import ConfigError
from offbook.runs.seeding import training_seeds
from offbook.sim.recording import record

RECORD = "from offbook.sim.recording import record; record('offbook:pour', 6, {out!r}, grades=(1.0, 0.5), seed=2)"
SWINGS = """
import sys
from offbook.data.writer import Writer
from offbook.sim.recording import make, record

make("gym:Pendulum-v1").close()
append = Writer.append

def announced(*given, **outcome):
    number = append(*given, **outcome)
    announce(number)
    return number

def begin():
    Writer.append = announced
    record("gym:Pendulum-v1", 10_000, sys.argv[1], policy="drift", seed=4)
"""
SETTINGS = {"grades": (1.0, 0.5), "seed": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Six pours recorded in one go by one process."""
    return record("offbook:pour", 6, tmp_path_factory.mktemp("whole") / "store", **SETTINGS)


def test_a_recording_holds_what_the_observation_space_says(whole):
    assert len(whole) == 6
    assert whole.schema.environment == "offbook:pour"
    assert whole.schema.rate_hz == 30.0
    assert whole.schema.observation_spec().cameras == {"front": (64, 64)}
    episode = whole.episode(0)
    assert episode.fields["front"].shape == (episode.length + 1, 64, 64, 3)
    assert episode.fields["action"].shape == (episode.length, 7)
    assert episode.return_ == episode.score == 1.0
    columns = whole.episodes
    assert list(columns["source"]) == ["expert:1", "expert:0.5"] * 3
    assert list(columns["seed"]) == training_seeds(2, 6)
    assert list(columns["score"][::2]) == [1.0] * 3


def test_the_number_of_processes_makes_no_difference(whole, tmp_path):
    assert record("offbook:pour", 6, tmp_path / "store", jobs=2, **SETTINGS).digest == whole.digest


@pytest.mark.faults
def test_a_recording_that_was_killed_goes_on_to_the_same_store(whole, tmp_path):
    out = tmp_path / "store"
    process = subprocess.Popen([sys.executable, "-c", RECORD.format(out=str(out))], stderr=subprocess.PIPE)
    journal = out / "episodes.journal"
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.stat().st_size > 0):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    survived = len(EpisodeStore.open(out))
    assert 0 < survived < 6
    assert record("offbook:pour", 6, out, **SETTINGS).digest == whole.digest


@pytest.mark.faults
def test_a_recording_killed_twenty_times_is_that_of_one_go(tmp_path):
    out, count = tmp_path / "killed", 0
    for finished in killed(SWINGS, str(out)):
        store = EpisodeStore.open(out) if (out / "store.json").exists() else ()
        assert finished == list(range(count, count + len(finished)))
        assert len(store) >= count + len(finished)
        count = len(store)
    assert count > 20
    whole = record("gym:Pendulum-v1", count + 2, tmp_path / "whole", policy="drift", seed=4)
    for number in range(count):
        for name, values in whole.episode(number).fields.items():
            np.testing.assert_array_equal(values, store.episode(number).fields[name])
    assert record("gym:Pendulum-v1", count + 2, out, policy="drift", seed=4).digest == whole.digest


def test_a_longer_recording_begins_with_the_shorter_one(whole, tmp_path):
    out = tmp_path / "store"
    record("offbook:pour", 1, out, **SETTINGS)
    store = record("offbook:pour", 3, out, **SETTINGS)
    assert len(store) == 3
    for number in range(3):
        for name, values in whole.episode(number).fields.items():
            np.testing.assert_array_equal(values, store.episode(number).fields[name])
    # Nothing is left to do: the store is left as it is.
    assert record("offbook:pour", 2, out, **SETTINGS).digest == store.digest


def test_trials_of_an_instance_have_its_seed_and_differ(tmp_path):
    store = record("offbook:darkpoint", 12, tmp_path / "whole", grades=(1.0, 0.5, 0.5), trials=4, seed=2)
    assert list(store.episodes["seed"]) == np.repeat(training_seeds(2, 3), 4).tolist()
    assert list(store.episodes["source"]) == ["expert:1", "expert:0.5", "expert:0.5"] * 4
    assert len({episode.fields["action"].tobytes() for episode in map(store.episode, range(12))}) == 12
    for instance in range(3):
        assert store.episodes["return"][4 * instance : 4 * instance + 4].max() > 13  # one of each has grade 1
    drawn = record("offbook:darkpoint", 2, tmp_path / "random", policy="random", trials=2)
    assert (drawn.episode(0).fields["action"] != drawn.episode(1).fields["action"]).any()


_TRIALS = {"grades": (1.0, 0.5), "seed": 2, "trials": 4}


@pytest.mark.faults
def test_a_crash_among_trials_loses_no_more_than_those_of_one_instance(tmp_path):
    whole = record("offbook:darkpoint", 12, tmp_path / "whole", jobs=2, **_TRIALS)
    crash = (
        "import os, sys\n"
        "from offbook.data.writer import Writer\n"
        "from offbook.sim.recording import record\n"
        "append = Writer.append\n"
        "Writer.append = lambda *given, **outcome: os._exit(7) if append(*given, **outcome) == 6 else None\n"
        f"record('offbook:darkpoint', 12, sys.argv[1], **{_TRIALS})\n"
    )
    out = tmp_path / "cut"
    assert subprocess.run([sys.executable, "-c", crash, str(out)], check=False, capture_output=True).returncode == 7
    assert len(EpisodeStore.open(out)) == 4
    record("offbook:darkpoint", 10, out, **_TRIALS)  # ends among the trials of an instance
    assert record("offbook:darkpoint", 12, out, **_TRIALS).digest == whole.digest


def test_only_a_recording_of_trials_speaks_of_them(tmp_path):
    one = record("offbook:darkpoint", 1, tmp_path / "one", trials=1)
    some = record("offbook:darkpoint", 1, tmp_path / "some", trials=2)
    assert set(some.schema.extra["recording"]) - set(one.schema.extra["recording"]) == {"trials"}
    for store, trials in ((one, 2), (some, 1)):
        with pytest.raises(ConfigError, match="trials: expected"):
            record("offbook:darkpoint", 2, store.path, trials=trials)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"env_id": "gym:Pendulum-v1"}, "environment: expected 'gym:Pendulum-v1'"),
        ({"policy": "random"}, "policy: expected 'random'"),
        ({"grades": (0.3,)}, "grades"),
        ({"seed": 3}, "seed: expected 3"),
        ({"settings": {"split": "all"}}, "settings"),
    ],
)
def test_a_store_of_another_recording_is_not_continued(tmp_path, changed, message):
    out = tmp_path / "store"
    settings = {"image_size": 0}
    before = record("offbook:pour", 1, out, settings=settings).digest
    arguments = {"env_id": "offbook:pour", "settings": settings, **changed}
    with pytest.raises(ConfigError, match=message):
        record(arguments.pop("env_id"), 2, out, **arguments)
    assert EpisodeStore.open(out).digest == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"episodes": 0}, "--episodes"),
        ({"episodes": 1, "policy": "expert"}, "without a scripted expert"),
        ({"episodes": 1, "grades": ()}, "--grades"),
        ({"episodes": 1, "trials": 0}, "trials"),
        ({"episodes": 1, "policy": "random", "jobs": 0}, "--jobs"),
    ],
)
def test_wrong_settings_leave_nothing_behind(tmp_path: Path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        record("gym:Pendulum-v1", out=tmp_path / "store", **arguments)
    assert not (tmp_path / "store").exists() or len(EpisodeStore.open(tmp_path / "store")) == 0
