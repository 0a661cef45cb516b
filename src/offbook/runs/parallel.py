"""Independent work on several processes, or on a Ray cluster: sweeps, seeds, recordings. Results come in order."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

from offbook.errors import ConfigError, OffbookError, needs_extra
from offbook.runs.progress import track

T = TypeVar("T")
R = TypeVar("R")


def run_parallel(
    function: Callable[[T], R],
    items: Sequence[T],
    *,
    jobs: int = 1,
    backend: Literal["local", "ray"] = "local",
    address: str | None = None,
    label: str = "",
) -> Iterator[R]:
    """Calls the function on every item and yields the results in the order of the items.

    Args:
        function: must be picklable for `jobs` > 1 or Ray: a function of a module, or a partial of one.
        items: the work.
        jobs: worker processes; 1 works in this process. Each worker computes with one thread.
        backend: `"local"` processes, or `"ray"`.
        address: the Ray cluster; without one, Ray is started for this call, bound to 127.0.0.1.
        label: shown beside the progress bar; empty shows none.

    Raises:
        ConfigError: a setting is wrong.
        MissingExtraError: Ray is wanted and not installed.
        OffbookError: a worker process died, of lack of memory as a rule.

    Example:
        >>> list(run_parallel(abs, [-1, -2]))
        [1, 2]
    """
    if jobs < 1:
        raise ConfigError("--jobs", expected="1 or more", got=str(jobs), fix="give the number of worker processes")
    if backend not in ("local", "ray"):
        raise ConfigError("--backend", expected="local or ray", got=repr(backend), fix="choose one of them")
    if address is not None and backend != "ray":
        raise ConfigError("--address", expected="--backend ray", got=f"--backend {backend}", fix="drop one of them")
    results = _results(function, items, jobs, backend, address)
    return track(results, label, len(items)) if label else results


def run_all(function: Callable[[T], R], items: Sequence[T], *, jobs: int, label: str = "") -> dict[T, R]:
    """The result of each item; see `run_parallel`."""
    return dict(zip(items, run_parallel(function, items, jobs=jobs, label=label), strict=True))


def _results(
    function: Callable[[T], R], items: Sequence[T], jobs: int, backend: str, address: str | None
) -> Iterator[R]:
    if backend == "local" and jobs == 1:
        yield from map(function, items)
        return
    import joblib
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    try:
        if backend == "local":
            # A worker that grew is replaced and its items go on. The thread that says so is the one that hands out
            # work: where warnings are errors it would end there, and this call would wait for ever.
            warnings.filterwarnings("ignore", "A worker stopped while some jobs were given", UserWarning)
            # Threads of several processes on few cores wait for one another.
            with joblib.parallel_config(backend="loky", inner_max_num_threads=1):
                parallel = joblib.Parallel(n_jobs=jobs, return_as="generator")
                yield from parallel(joblib.delayed(_here)(Path.cwd(), function, item) for item in items)
        else:
            with _ray(jobs, address), joblib.parallel_config(backend="ray"):
                yield from joblib.Parallel(n_jobs=jobs)(joblib.delayed(function)(item) for item in items)
    except TerminatedWorkerError as error:
        got = "a worker process that was killed, of lack of memory as a rule"
        raise OffbookError("parallel work", expected="workers that live", got=got, fix="lower --jobs") from error


def _here(folder: Path, function: Callable[[T], R], item: T) -> R:
    """Calls it where the caller is: a worker outlives calls, and stands where the first of them was made."""
    os.chdir(folder)
    return function(item)


@contextmanager
def _ray(jobs: int, address: str | None) -> Iterator[None]:
    # Ray listens on every interface by default, and turns 127.0.0.1 back into the outer address. This variable, read
    # when ray is imported and by every process that it starts, keeps a private Ray on the loopback interface.
    loopback = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    before = os.environ.get(loopback)
    if address is None:
        os.environ[loopback] = "0"
    try:
        with needs_extra("ray"):
            import ray
            from ray.util.joblib import register_ray
        register_ray()
        started = not ray.is_initialized()
        if started and address is None:
            ray.init(address="local", num_cpus=jobs, include_dashboard=False, log_to_driver=False)
        elif started:
            ray.init(address=address, log_to_driver=False)
        try:
            yield
        finally:
            if started:
                ray.shutdown()
    finally:
        os.environ.pop(loopback, None)
        if before is not None:
            os.environ[loopback] = before
