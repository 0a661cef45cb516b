import os
import signal
import time
from importlib.util import find_spec

import pytest

from offbook.errors import ConfigError, DataError, MissingExtraError, OffbookError
from offbook.runs.parallel import _ray, run_parallel
from offbook.runs.progress import track
from offbook.runs.seeding import generator

_held: list[bytes] = []


def square(number: int) -> tuple[int, int]:
    return number**2, os.getpid()


def fail_on_two(number: int) -> int:
    if number == 2:
        raise DataError("item 2", expected="another", got="two", fix="leave it out")
    return number


def grow(number: int) -> int:
    _held.append(b"x" * (350 << 20) if number else b"")
    time.sleep(1.2)  # a worker's memory is looked at once a second
    return number


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_one_job_works_here_lazily_and_in_order() -> None:
    results = run_parallel(square, range(4))
    assert next(results) == (0, os.getpid())
    assert [value for value, _ in results] == [1, 4, 9]


def test_two_jobs_give_the_same_in_the_same_order() -> None:
    results = list(run_parallel(square, range(20), jobs=2, label="squares"))
    assert [value for value, _ in results] == [n**2 for n in range(20)]
    assert os.getpid() not in {process for _, process in results}


def test_workers_follow_to_the_folder_of_the_caller(tmp_path, monkeypatch) -> None:
    list(run_parallel(square, range(2), jobs=2))
    monkeypatch.chdir(tmp_path)
    assert set(run_parallel(os.path.abspath, ["a", "b"], jobs=2)) == {str(tmp_path / "a"), str(tmp_path / "b")}


def test_error_of_a_worker_keeps_its_kind_and_words() -> None:
    with pytest.raises(DataError, match="item 2: expected another, got two; leave it out") as caught:
        list(run_parallel(fail_on_two, range(4), jobs=2))
    assert caught.value.fix == "leave it out"


def test_worker_that_grew_is_replaced_and_its_work_goes_on() -> None:
    assert list(run_parallel(grow, range(6), jobs=2)) == list(range(6))


@pytest.mark.faults
def test_killed_worker_is_an_error_with_advice() -> None:
    with pytest.raises(OffbookError, match=r"a worker process that was killed.*lower --jobs"):
        list(run_parallel(die, range(2), jobs=2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"jobs": 0}, "--jobs"), ({"backend": "slurm"}, "--backend"), ({"address": "auto"}, "--address")],
)
def test_wrong_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_parallel(square, [1], **settings)  # type: ignore[arg-type]


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
def test_missing_ray_answers_with_the_install_line() -> None:
    with pytest.raises(MissingExtraError, match=r"pip install 'offbook\[ray\]'"):
        list(run_parallel(square, [1], backend="ray"))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'offbook[ray]'")
@pytest.mark.filterwarnings("ignore")
def test_ray_gives_the_same_on_the_loopback_interface() -> None:
    # Functions that Ray's workers can import: they do not know this file.
    assert list(run_parallel(abs, range(-20, 0), jobs=2, backend="ray")) == list(range(20, 0, -1))
    with pytest.raises(ConfigError, match="seed: expected an integer of 0 or more, got -1"):
        list(run_parallel(generator, [0, -1], jobs=2, backend="ray"))
    with _ray(1, None):
        assert __import__("ray").util.get_node_ip_address() == "127.0.0.1"


def test_progress_goes_to_stderr_and_can_be_switched_off(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(track(iter("ab"), "letters", total=2)) == ["a", "b"]
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("OFFBOOK_QUIET", "0")
    assert list(track(iter("ab"), "letters", total=2)) == ["a", "b"]
    out, err = capsys.readouterr()
    assert out == ""
    assert "letters: 100%" in err
