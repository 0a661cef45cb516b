"""What a worker and an arena without PyTorch say to a checkpoint, and what becomes of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from arena_server import Walker, network, running
from sqlalchemy import select

from offbook.arena.tables import Attempt
from offbook.arena.worker import run_worker
from offbook.client.submit import ArenaRefusalError
from offbook.errors import MissingExtraError

pytestmark = pytest.mark.service


@contextmanager
def without_torch() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "offbook.learning.policies")
        patch.setitem(sys.modules, "torch", None)
        yield


def test_a_checkpoint_goes_back_unharmed_from_a_worker_that_cannot_load_it(tmp_path) -> None:
    network(tmp_path / "net.safetensors")
    with running(tmp_path, watchdog_seconds=10.0) as arena:
        work = {"robot": Walker(), "idle_exit": 20.0, "max_trials": 1}
        with arena.client() as client:
            entry = client.submit("reach", "net", checkpoint=tmp_path / "net.safetensors", trials=1)["id"]
            with without_torch(), pytest.raises(MissingExtraError, match=r"pip install 'offbook\[models\]'"):
                run_worker(arena.url, arena.tokens["lab"], "arm", name="arm-1", **work)
            with arena.database.read() as session:
                attempt = session.scalars(select(Attempt)).one()
            assert (attempt.outcome, "offbook[models]" in attempt.reason) == ("released", True)
            # A policy that dials in, or one that needs nothing, is played there all the same.
            arena.submit("root", kind="anchor", anchor="random", name="random")
            assert client.request("POST", f"/v1/submissions/{entry}/cancel")["state"] == "cancelled"
            with without_torch():
                report = run_worker(arena.url, arena.tokens["lab"], "arm", name="arm-1", **work)
            assert report.trials == {"done": 1}


def test_an_arena_that_cannot_load_checkpoints_says_so(tmp_path) -> None:
    network(tmp_path / "net.safetensors")
    with running(tmp_path) as arena, arena.client() as client:
        with without_torch(), pytest.raises(ArenaRefusalError, match="Let the policy dial in") as caught:
            client.submit("reach", "net", checkpoint=tmp_path / "net.safetensors", trials=1)
        assert caught.value.status == 422
        assert client.submit("reach", "net", checkpoint=tmp_path / "net.safetensors", trials=1)["state"] == "open"
