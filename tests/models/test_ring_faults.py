"""What a ring does when processes do not fit one another, or are gone: all that live raise, soon, and say why."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_backbone import make, tokens
from test_ring import environment as environment  # of processes
from test_ring import run_case, spread
from torch import distributed

from offbook.errors import ConfigError, OffbookError
from offbook.models.blockwise import Causal, Full, Ring
from offbook.models.blockwise import backbone as backbone_module

pytestmark = pytest.mark.faults


def _outcome(run: Callable[[], object]) -> tuple[str, str, float]:
    """Of an error: its kind, its words, and the seconds that it took to come."""
    start = time.monotonic()
    try:
        run()
    except OffbookError as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "none", "", time.monotonic() - start


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _one_dies(when: str) -> tuple:
    ring, net, other = Ring(timeout=60), make(remat="layer"), make(remat="layer")
    x = ring.split(tokens())
    earlier = other(x, mask=Causal(), ring=ring)
    if ring.rank == 1 and when == "forward":
        net.layers[1].register_forward_pre_hook(_die)

    def step() -> None:
        out = net(x, mask=Causal(), ring=ring)
        if ring.rank == 1 and when == "backward":
            out.register_hook(_die)
        out.sum().backward()
        if ring.rank == 1:
            _die()
        ring.sum_gradients(net)

    first = _outcome(step)
    again = [lambda: net(x, mask=Causal(), ring=ring), lambda: ring.total(x), lambda: earlier.sum().backward()]
    # Without the ring all is as before.
    net.zero_grad()
    net(tokens(), mask=Causal()).sum().backward()
    return first, [_outcome(more) for more in again], net.norm.weight.grad is not None


@pytest.mark.parametrize("when", ["forward", "backward", "sum"])
def test_all_others_raise_when_a_process_is_killed(when: str, tmp_path: Path) -> None:
    every = spread(_one_dies, 4, tmp_path, when)
    assert every[1] is None
    for rank in (0, 2, 3):
        (kind, words, seconds), more, alone = every[rank]
        assert kind == "RingError"
        taker, giver = (rank + 1) % 4, (rank - 1) % 4
        awaited = "all to add up torch.int64 (" if when == "sum" else f"rank {taker} to take torch.float64 (2, 2, 2,"
        assert words.startswith(f"rank {rank} of the ring: expected {awaited}")
        assert f"{'' if when == 'sum' else f'from rank {giver}'}, within 60 s, got " in words
        assert "🏖" not in words
        assert words.endswith("look for the first error in the logs of all processes, and start them again.")
        # Long before the timeout: who gives up leaves, which its neighbours notice.
        assert seconds < 20
        for kind, words, seconds in more:
            assert kind == "RingError"
            assert "got a ring that broke before: " in words
            assert seconds < 1
        assert alone


def _one_stays_away() -> tuple:
    ring, net = Ring(timeout=2), make(remat="attn")
    x = ring.split(tokens())
    net(x, mask=Causal(), ring=ring)
    if ring.rank == 1:
        time.sleep(4)
    return _outcome(lambda: net(x, mask=Causal(), ring=ring))


def test_a_process_that_does_not_come_is_waited_for_no_longer_than_the_timeout(tmp_path: Path) -> None:
    waiting, late = spread(_one_stays_away, 2, tmp_path)
    assert waiting[0] == late[0] == "RingError"
    assert "rank 0 of the ring: expected what each comes with to a forward pass, within 2 s, got " in waiting[1]
    assert 1.5 < waiting[2] < 10
    assert late[2] < 10


def _one_never_begins() -> tuple[str, str, float]:
    if distributed.get_rank() == 1:
        time.sleep(5)
        return "none", "", 0.0
    return _outcome(lambda: Ring(timeout=2))


def test_a_ring_that_does_not_come_together_is_none(tmp_path: Path) -> None:
    kind, words, seconds = spread(_one_never_begins, 2, tmp_path)[0]
    assert kind == "RingError"
    assert words.startswith("rank 0 of the ring: expected all to make a group, within 2 s, got ")
    assert seconds < 10


def _not_finite() -> tuple[str, str, float]:
    ring, net, x = Ring(timeout=3), make(remat="attn"), tokens()
    x[1, 13] = torch.nan
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        return _outcome(lambda: net(ring.split(x), mask=Causal(), ring=ring))


def test_a_token_without_a_number_is_named_by_its_place_in_the_sequence(tmp_path: Path) -> None:
    other, holder = spread(_not_finite, 2, tmp_path)
    assert holder[0] == "DataError"
    assert holder[1].startswith("input: expected finite numbers, got nan at token 13 of sample 1;")
    assert other[0] == "RingError"
    assert other[2] < 10


MISFITS: dict[str, tuple[type[OffbookError], str]] = {
    "tokens": (ConfigError, "rank 0 of the ring: expected input (2, 23, 16), its share of 45 tokens, got (2, 25, 16) "
               "there, and on ranks 0 to 1 [(2, 25, 16), (2, 20, 16)]; cut each sequence with ring.split."),
    "samples": (ConfigError, "rank 1 of the ring: expected input (2, 25, 16), its share of 50 tokens, got (1, 25, 16)"),
    "numbers": (ConfigError, "rank 1 of the ring: expected numbers torch.float64, as rank 0, got torch.float32; give"),
    "layers": (ConfigError, "rank 1 of the ring: expected layers 2, as rank 0, got 3; give all processes the same."),
    "block_k": (ConfigError, "rank 1 of the ring: expected block_k 20, as rank 0, got 64; give"),
    "mask": (ConfigError, "rank 1 of the ring: expected mask Causal, as rank 0, got Full; give"),
    "training": (ConfigError, "rank 1 of the ring: expected training True, as rank 0, got False; give"),
    "gradients": (ConfigError, "rank 1 of the ring: expected gradients True, as rank 0, got False; give"),
    "dim": (ConfigError, "input: expected floats (batch, tokens, 16), got torch.float64 (2, 25, 8); change the input"),
    "axes": (ConfigError, "input: expected floats (batch, tokens, 16), got torch.float64 (25, 16); change the input"),
    "remat": (ConfigError, "remat: expected attn, layer or auto, which compute by blocks, as a ring does, got 'none'"),
    "memory": (OffbookError, "memory of a training step: expected at most 0 MiB, got "),
}  # fmt: skip


def _misfit(name: str, ring: Ring) -> tuple[str, str, float]:
    """A call in which the second process comes with something else."""
    odd = ring.rank == 1
    changed = {"layers": {"layers": 3}, "block_k": {"block_k": 64}, "remat": {"remat": "none"}}.get(name, {})
    settings = {"remat": "auto" if name == "memory" else "attn", **(changed if odd else {})}
    net, x, mask = make(**settings), ring.split(tokens()), Full() if odd and name == "mask" else Causal()
    if odd:
        cut = {"tokens": x[:, :20], "samples": x[:1], "numbers": x.float(), "dim": x[..., :8], "axes": x[0]}
        x = cut.get(name, x)
        net.train(name != "training")
    if odd and name == "numbers":
        net.float()
    room = backbone_module.available
    backbone_module.available = lambda device: 1000 if odd and name == "memory" else room(device)
    try:
        with torch.set_grad_enabled(not (odd and name == "gradients")):
            return _outcome(lambda: net(x, mask=mask, ring=ring))
    finally:
        backbone_module.available = room


def _misfits() -> tuple[dict, dict]:
    ring = Ring(timeout=60)
    outcomes = {name: _misfit(name, ring) for name in MISFITS}
    # The ring is as good as before.
    return outcomes, run_case("padding layer", ring)


def test_what_does_not_fit_is_refused_in_all_processes(tmp_path: Path) -> None:
    every = spread(_misfits, 2, tmp_path)
    for rank, (outcomes, found) in enumerate(every):
        for name, (kind, words) in MISFITS.items():
            got, said, seconds = outcomes[name]
            # What is wrong with one process's own input, the others say of that process.
            own = not words.startswith("rank") and rank == 0
            assert said.startswith(f"rank 1 of the ring, {words}" if own else words), name
            assert got == ("ContextTooLongError" if name == "memory" else kind.__name__)
            assert seconds < 20
        torch.testing.assert_close(found["loss"], run_case("padding layer", None)["loss"], atol=0, rtol=1e-12)


def test_a_ring_wants_processes() -> None:
    with pytest.raises(ConfigError, match=r"ring: expected a group of processes, got none; call torch\.distributed"):
        Ring()


def test_positions_and_masks_of_a_ring_go_by_the_whole_sequence() -> None:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        net = make(remat="attn", positions="learned", max_positions=49)
        with pytest.raises(ConfigError, match="expected 0 to 48, the rows of the learned table, got 0 to 49"):
            net(tokens(), mask=Causal(), ring=Ring())
    finally:
        distributed.destroy_process_group()
