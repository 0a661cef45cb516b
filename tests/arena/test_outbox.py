"""Frames wait for a peer that does not read, few and in order, and one that never reads is given up."""

from __future__ import annotations

import asyncio
import time

import pytest

from offbook.arena import outbox
from offbook.arena.outbox import FRAMES_PER_SECOND, GoneError, Outbox, Rate
from offbook.client.wire import WireError


class _DeafLine:
    """To a peer whose window is full until it reads."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.reads = asyncio.Event()

    def write_now(self, frame: bytes) -> bool:
        if self.reads.is_set():
            self.sent.append(frame)
        return self.reads.is_set()

    async def drained(self) -> None:
        await self.reads.wait()


def test_of_waiting_observations_the_newest_wins_and_nothing_else_is_dropped() -> None:
    async def scene() -> list[bytes]:
        line = _DeafLine()
        box = Outbox(line)
        task = asyncio.create_task(box.run())
        box.put("reset", b"reset")
        await asyncio.sleep(0.01)
        for i in range(1000):
            box.put("obs", b"%d" % i)
        box.put("end", b"end")
        line.reads.set()
        # It reads again, and yet nothing overtakes what waits.
        box.put("reset", b"again")
        await asyncio.sleep(0.05)
        box.put("obs", b"at once")
        task.cancel()
        return line.sent

    assert asyncio.run(scene()) == [b"reset", b"999", b"end", b"again", b"at once"]


def test_a_peer_that_never_reads_is_given_up(monkeypatch) -> None:
    async def scene() -> float:
        box = Outbox(_DeafLine())
        began = time.monotonic()
        box.put("obs", b"1")
        with pytest.raises(GoneError):
            await box.run()
        return time.monotonic() - began

    monkeypatch.setattr(outbox, "SEND_SECONDS", 0.2)
    assert asyncio.run(scene()) < 5
    box = Outbox(_DeafLine())
    for _ in range(outbox.WAITING_FRAMES):
        box.put("end", b"")
    with pytest.raises(GoneError):
        box.put("end", b"")


def test_so_many_frames_a_second_are_taken_and_no_more(monkeypatch) -> None:
    at, rate = 100.0, Rate()
    monkeypatch.setattr(outbox.time, "monotonic", lambda: at)
    for _ in range(3):
        for _ in range(FRAMES_PER_SECOND):
            rate.count()
        at += 1
    for _ in range(FRAMES_PER_SECOND):
        rate.count()
    with pytest.raises(WireError, match="at most 500 a second"):
        rate.count()
