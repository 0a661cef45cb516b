"""What kills, torn files and a full disk do to a store: nothing that was appended is lost, and nothing is made up."""

import os
import random
import resource
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from made import SCHEMA, values

from killing import killed
from offbook.data import writer as writing
from offbook.data.check import check_store
from offbook.data.store import EpisodeStore
from offbook.errors import DataError

pytestmark = pytest.mark.faults

HERE = Path(__file__).parent
WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
from dataclasses import replace
from made import SCHEMA, values
from pathlib import Path
from offbook.data import filming
from offbook.data.schema import Schema
from offbook.data.store import EpisodeStore

path, way = Path(sys.argv[1]), sys.argv[3]
fields = [replace(spec, video=way != "raw") if spec.camera else spec for spec in SCHEMA.fields]
schema = replace(SCHEMA, fields=tuple(fields))

def begin():
    there = (path / "store.json").exists()
    writer = EpisodeStore.append_to(path) if there else EpisodeStore.create(path, schema)
    number = len(writer)
    while True:
        given = values(number, 20 + number % 7), dict(terminated=True, truncated=False, seed=number)
        if way == "soon":
            writer.append_soon(given[0], **given[1]).add_done_callback(lambda done: announce(done.result()))
        else:
            announce(writer.append(given[0], **given[1]))
        number += 1
        if number % 5 == 0:
            writer.close()
            writer = EpisodeStore.append_to(path)
"""


def start(path, script, **more):
    arguments = [sys.executable, "-c", textwrap.dedent(script), str(path), str(HERE)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, **more)


def write(path, numbers, schema=SCHEMA):
    with (
        EpisodeStore.append_to(path) if (path / "store.json").exists() else EpisodeStore.create(path, schema) as writer
    ):
        for number in numbers:
            writer.append(values(number, 20 + number % 7), terminated=True, truncated=False, seed=number, sync=False)
    return EpisodeStore.open(path)


@pytest.mark.parametrize("way", ["raw", "video", "soon"])
def test_twenty_kills_lose_nothing_that_was_finished(tmp_path, way):
    path, count = tmp_path / "s", 0
    for announced in killed(WRITER, str(path), str(HERE), way):
        if not (path / "store.json").exists():
            assert not announced
            continue
        store = EpisodeStore.open(path)
        store.verify()
        assert announced == list(range(count, count + len(announced)))
        # The last one may have been finished and not yet announced.
        assert len(store) >= count + len(announced)
        for number in range(count, len(store)):
            back, given = store.episode(number), values(number, 20 + number % 7)
            assert (back.seed, back.length) == (number, 20 + number % 7)
            for name in ("joints", "action", "reward", *(("front",) if way == "raw" else ())):
                np.testing.assert_array_equal(back.fields[name], given[name])
        count = len(store)
    assert count > 20
    # Recording goes on, to the very files of a recording without a kill.
    reference = write(tmp_path / "reference", range(count + 3), store.schema)
    assert write(path, range(count, count + 3)).digest == reference.digest
    files = {file.relative_to(path) for file in path.rglob("*")}
    assert files == {file.relative_to(reference.path) for file in reference.path.rglob("*")}
    assert check_store(path).sound


@pytest.fixture
def unclosed(tmp_path):
    """A store as a kill leaves it: four episodes, two of them in the journal only, the files' heads not brought up."""
    path = tmp_path / "unclosed"
    write(path, range(2))
    writer = EpisodeStore.append_to(path)
    for number in (2, 3):
        writer.append(values(number, 20 + number % 7), terminated=True, truncated=False, seed=number)
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    writer.close()
    return copy


@pytest.mark.parametrize("seed", range(8))
def test_a_torn_journal_keeps_its_whole_lines(unclosed, tmp_path, seed):
    journal = unclosed / "episodes.journal"
    content = journal.read_bytes()
    size = random.Random(seed).randrange(len(content))
    journal.write_bytes(content[:size])
    kept = 2 + content[:size].count(b"\n")
    store = EpisodeStore.open(unclosed)
    assert len(store) == kept
    store.verify()
    assert write(unclosed, range(kept, 6)).digest == write(tmp_path / "reference", range(6)).digest


def test_what_a_kill_left_behind_the_last_episode_is_cut(unclosed, tmp_path):
    for file in [*unclosed.glob("fields/*.npy"), *unclosed.glob("final/*.npy")]:
        with file.open("ab") as stream:
            stream.write(os.urandom(random.Random(1).randint(1, 5000)))
    with (unclosed / "episodes.journal").open("ab") as stream:
        stream.write(b'{"crc":"00000000","episode":[4,{"start"')
    assert len(EpisodeStore.open(unclosed)) == 4
    store = write(unclosed, [4])
    store.verify()
    reference = write(tmp_path / "reference", range(5))
    assert store.digest == reference.digest
    for file in unclosed.glob("f*/*.npy"):
        assert file.read_bytes() == (reference.path / file.relative_to(unclosed)).read_bytes()


def test_a_crash_while_compacting_counts_no_episode_twice(tmp_path):
    path = tmp_path / "s"
    writer = EpisodeStore.create(path, SCHEMA)
    for number in range(3):
        writer.append(values(number, 20 + number % 7), terminated=True, truncated=False, seed=number)
    journal = (path / "episodes.journal").read_bytes()
    writer.close()
    assert (path / "episodes.journal").read_bytes() == b""
    (path / "episodes.journal").write_bytes(journal)
    assert EpisodeStore.open(path).digest == write(tmp_path / "reference", range(3)).digest
    assert len(write(path, [3])) == 4


@pytest.mark.parametrize("seed", range(4))
def test_a_field_file_that_lost_bytes_is_named_and_nothing_is_touched(unclosed, seed):
    chance = random.Random(seed)
    file = chance.choice(sorted([*unclosed.glob("fields/*.npy"), *unclosed.glob("final/*.npy")]))
    content = file.read_bytes()[: chance.randrange(file.stat().st_size)]
    file.write_bytes(content)
    for opening in (EpisodeStore.open, EpisodeStore.append_to):
        with pytest.raises(DataError) as caught:
            opening(unclosed)
        assert str(file) in str(caught.value)
        assert f"got {len(content)} bytes" in str(caught.value)
    assert file.read_bytes() == content


def test_other_damage_is_refused_by_name(unclosed, tmp_path):
    def refused(damage, word):
        path = tmp_path / "damaged"
        shutil.copytree(unclosed, path)
        damage(path)
        before = {file: file.read_bytes() for file in path.rglob("*.npy")}
        with pytest.raises(DataError, match=word):
            EpisodeStore.append_to(path)
        assert {file: file.read_bytes() for file in path.rglob("*.npy")} == before
        shutil.rmtree(path)

    def flip_first_journal_line(path):
        content = bytearray((path / "episodes.journal").read_bytes())
        content[40] ^= 1
        (path / "episodes.journal").write_bytes(content)

    refused(flip_first_journal_line, "line 1")
    refused(lambda path: (path / "episodes.parquet").unlink(), "episode 0 and those after it")
    refused(lambda path: (path / "episodes.parquet").write_bytes(b"PAR1"), "index of a store")
    refused(lambda path: (path / "fields" / "joints.npy").unlink(), "no file")
    other = np.zeros((500, 2), np.float64)
    refused(lambda path: np.save(path / "fields" / "action.npy", other), r"float32 \(2,\), got float64")


def test_a_lost_index_does_not_cost_the_values(tmp_path):
    path = write(tmp_path / "s", range(3)).path
    (path / "episodes.parquet").unlink()
    size = (path / "fields" / "joints.npy").stat().st_size
    with pytest.raises(DataError, match="an index of the"):
        EpisodeStore.append_to(path)
    assert (path / "fields" / "joints.npy").stat().st_size == size


HOLDER = """
import sys
from offbook.data.store import EpisodeStore
with EpisodeStore.append_to(sys.argv[1]):
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_a_second_writer_is_told_who_the_first_is(tmp_path):
    path = write(tmp_path / "s", [0]).path
    process = start(path, HOLDER, stdin=subprocess.PIPE)
    try:
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(DataError, match=f"process {process.pid} writing to it"):
            EpisodeStore.append_to(path)
        assert len(EpisodeStore.open(path)) == 1
    finally:
        process.kill()
        process.communicate(timeout=30)
    # The lock went with the process.
    with EpisodeStore.append_to(path), pytest.raises(DataError, match=f"process {os.getpid()} writing"):
        EpisodeStore.append_to(path)


def test_a_writer_that_is_dropped_lets_go_and_loses_nothing(tmp_path):
    writer = EpisodeStore.create(tmp_path / "s", SCHEMA)
    writer.append(values(0, 20), terminated=True, truncated=False, seed=0)
    del writer
    with EpisodeStore.append_to(tmp_path / "s") as writer:
        assert len(writer) == 1


FULL_DISK = """
import resource, signal, sys
sys.path.insert(0, sys.argv[2])
from made import SCHEMA, values
from offbook.data.store import EpisodeStore
from offbook.errors import DataError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
writer = EpisodeStore.create(sys.argv[1], SCHEMA)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
try:
    for number in range(99):
        writer.append(values(number, 20 + number % 7), terminated=True, truncated=False, seed=number)
except DataError as error:
    print(number, error, flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
writer.append(values(number, 20 + number % 7), terminated=True, truncated=False, seed=number)
writer.close()
"""


def test_a_full_disk_is_explained_and_appending_can_go_on(tmp_path):
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    process = start(tmp_path / "s", FULL_DISK)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    number, message = output.split(" ", 1)
    assert "File too large" in message
    assert "what was appended before is safe" in message
    reference = write(tmp_path / "reference", range(int(number) + 1))
    assert EpisodeStore.open(tmp_path / "s").digest == reference.digest


@pytest.mark.parametrize("sync", [True, False])
def test_an_append_that_is_interrupted_anywhere_is_whole_or_not_there(tmp_path, sync):
    def append(writer, number):
        fields = values(number, 20 + number % 7)
        return writer.append(fields, terminated=True, truncated=False, seed=number, sync=sync)

    def interrupted(writer, line):
        """Whether an append was interrupted, at so manieth a line of it or of the commit."""
        lines = iter(range(line))

        def trace(frame, event, _):
            if frame.f_code.co_filename != writing.__file__ or frame.f_code.co_name not in ("append", "_commit"):
                return None
            if event == "line" and next(lines, None) is None:
                raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            append(writer, 1)
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
        return False

    counts = set()
    for line in range(99):
        path = tmp_path / str(line)
        with EpisodeStore.create(path, SCHEMA) as writer:
            append(writer, 0)
            was = interrupted(writer, line)
            before = len(writer)
            assert append(writer, 2) == before
        store = EpisodeStore.open(path)
        assert store.episodes["seed"].tolist() == ([0, 2] if before == 1 else [0, 1, 2])
        assert check_store(path).findings[1].result == "ok"
        store.verify()
        counts.add(before)
        if not was:
            break
    assert counts == {1, 2}
    assert 20 < line < 98
