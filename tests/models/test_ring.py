"""A sequence spread over processes: what it gives is what one process gives, and a fault stops all of them."""

import ctypes
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_backbone import assert_alike, make, tokens
from torch import Tensor, distributed, nn

from offbook.models.blockwise import (
    Causal,
    FrameCausal,
    Full,
    KeyPadding,
    Mask,
    Prefix,
    Ring,
    Segments,
    TokenTypes,
    Where,
    Window,
    linear_cross_entropy,
    plan,
)
from offbook.models.blockwise.spread import fold

MASKS: dict[str, Callable[[int], Mask]] = {
    "causal": lambda n: Causal(),
    "full": lambda n: Full(),
    "window": lambda n: Causal() & Window(9),
    "prefix": lambda n: Causal() | Prefix(7),
    "frames": lambda n: FrameCausal(6),
    "segments": lambda n: Causal() & Segments(torch.arange(n) // 13),
    "padding": lambda n: Causal() & KeyPadding(torch.tensor([n, n // 3])),
    "holes": lambda n: KeyPadding(torch.arange(n) % 5 < torch.tensor([[4], [2]])),
    "types": lambda n: TokenTypes(torch.arange(n) % 3, torch.eye(3, dtype=torch.bool)),
    "nothing": lambda n: Full() & KeyPadding(torch.tensor([0, n])),
    "own": lambda n: Where(lambda i, j: (i - j) % 3 == 0),
}
CASES: dict[str, tuple[str, int, dict]] = {
    **{f"{mask} {remat}": (mask, 50, {"remat": remat}) for mask in MASKS for remat in ("attn", "layer")},
    **{
        f"{n} tokens, {remat}": ("causal", n, {"remat": remat}) for n in (1, 2, 3, 5, 53) for remat in ("attn", "layer")
    },
    "shared keys": ("causal", 51, {"remat": "attn", "heads": 4, "kv_heads": 2}),
    "small blocks": ("padding", 61, {"remat": "layer", "block_q": 5, "block_k": 4, "block_ffn": 3}),
    "large blocks": ("window", 61, {"remat": "attn", "block_q": 100, "block_k": 100, "block_ffn": 100}),
    "runs of layers": ("causal", 50, {"remat": "layer", "segment": 2, "layers": 3}),
    "on disk": ("causal", 50, {"remat": "attn", "offload": "disk"}),
    "learned table": ("causal", 50, {"remat": "attn", "positions": "learned", "max_positions": 50}),
    "swiglu, parallel": ("full", 47, {"remat": "layer", "ffn": "swiglu", "norm": "rms", "residual": "parallel"}),
    "auto": ("causal", 50, {"remat": "auto"}),
    "condition of samples": ("padding", 50, {"remat": "attn", "cond_dim": 3}),
    "condition of tokens": ("padding", 50, {"remat": "layer", "cond_dim": 3}),
    "dropout": ("causal", 50, {"remat": "layer", "dropout": 0.1}),
    "dropout of attention": ("window", 53, {"remat": "attn", "dropout": 0.1, "attention_dropout": 0.1}),
}
OF_THREE = ["causal layer", "padding attn", "1 tokens, attn", "5 tokens, layer", "53 tokens, attn", "small blocks",
            "dropout of attention"]  # fmt: skip


def run_case(name: str, ring: Ring | None) -> dict[str, Tensor]:
    """The loss, output and all gradients; in a ring, with what is of tokens as far as it is at hand."""
    mask, number, settings = CASES[name]
    net, x = make(**settings), tokens(2, number)
    here: Callable[[Tensor], Tensor] = ring.split if ring else lambda x: x
    inputs = {"x": here(x).requires_grad_()}
    if settings.get("cond_dim"):
        for layer in net.layers:
            nn.init.normal_(layer.modulation.weight, std=0.3)
        of_tokens = name == "condition of tokens"
        inputs["cond"] = (here(tokens(2, number, 3)) if of_tokens else tokens(2, 1, 3)).requires_grad_()
    torch.manual_seed(5 + 10 * (ring.rank if ring else 0))  # The first process's seed is all processes' one.
    out = net(inputs["x"], mask=MASKS[mask](number), cond=inputs.get("cond"), ring=ring)
    weights = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
    loss = (out * here(weights)).sum()
    loss.backward()
    if ring:
        ring.sum_gradients(net)
    found = {"loss": ring.total(loss) if ring else loss.detach(), "out": out.detach()}
    return {**found, **{f"d{k}": v.grad for k, v in inputs.items()}, **{k: w.grad for k, w in net.named_parameters()}}


def spread(task: Callable, processes: int, folder: Path, *arguments: object, timeout: float = 120) -> list:
    """What a function returns in each of several processes; None where one did not come to its end."""
    # From a process that has imported everything, and does nothing else.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_ring_faults"])
    every = [
        context.Process(target=_process, args=(task, rank, processes, str(folder), *arguments))
        for rank in range(processes)
    ]
    for process in every:
        process.start()
    deadline = time.monotonic() + timeout
    for process in every:
        process.join(max(0, deadline - time.monotonic()))
    late = [process for process in every if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    assert not late, "processes hang"
    files = [folder / f"{rank}" for rank in range(processes)]
    return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


def _process(task: Callable, rank: int, processes: int, folder: str, *arguments: object) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = distributed.FileStore(f"{folder}/store", processes)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    torch.save(task(*arguments), f"{folder}/{rank}")
    distributed.destroy_process_group()


@pytest.fixture(scope="module", autouse=True)
def environment():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        # What is freed goes back, so that peaks are those of tensors, as in `offbook.systems.bpt.measure`.
        patch.setenv("MALLOC_TRIM_THRESHOLD_", "0")
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
        yield


def _cases(names: list[str]) -> dict[str, dict[str, Tensor]]:
    ring = Ring(timeout=60)
    return {name: run_case(name, ring) for name in names}


@pytest.fixture(scope="module")
def of_two(tmp_path_factory) -> list[dict]:
    return spread(_cases, 2, tmp_path_factory.mktemp("two"), list(CASES))


@pytest.fixture(scope="module")
def of_three(tmp_path_factory) -> list[dict]:
    return spread(_cases, 3, tmp_path_factory.mktemp("three"), OF_THREE)


@pytest.mark.parametrize(("processes", "name"), [*((2, name) for name in CASES), *((3, name) for name in OF_THREE)])
def test_processes_find_what_one_finds(processes: int, name: str, request: pytest.FixtureRequest) -> None:
    every = request.getfixturevalue("of_two" if processes == 2 else "of_three")
    want, number = run_case(name, None), CASES[name][1]
    for rank, ranks in enumerate(every):
        found, own = ranks[name], [i for span in fold(number, processes, rank) for i in span]
        of_tokens = {key for key in ("out", "dx", "dcond") if key in want and want[key].shape[1] == number}
        wanted = {key: value[:, own] if key in of_tokens else value for key, value in want.items()}
        if "dcond" in want and "dcond" not in of_tokens:
            found = {**found, "dcond": sum(other[name]["dcond"] for other in every)}
        present = {key for key, value in wanted.items() if value.numel()}
        assert {key for key, value in found.items() if value is not None} >= present
        assert_alike({key: found[key] for key in present}, {key: wanted[key] for key in present})


def test_a_process_on_its_own_is_a_ring(tmp_path: Path) -> None:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        ring = Ring()
        for name in ("padding layer", "dropout of attention", "1 tokens, attn"):
            assert_alike(run_case(name, ring), run_case(name, None))
        with torch.no_grad():
            out = make(remat="auto")(tokens(2, 0), mask=Causal(), ring=ring)
        assert out.shape == (2, 0, 16)
    finally:
        distributed.destroy_process_group()


def _inference() -> list[Tensor]:
    ring, net, x = Ring(timeout=60), make(remat="auto", dropout=0.5).eval(), tokens()
    with torch.no_grad():
        plain = net(ring.split(x), mask=MASKS["padding"](50), ring=ring)
    with torch.inference_mode():
        return [plain, net(ring.split(x), mask=MASKS["padding"](50), ring=ring).clone()]


def test_without_gradients_the_output_is_the_same(tmp_path: Path) -> None:
    want = make(remat="none").eval()(tokens(), mask=MASKS["padding"](50)).detach()
    for rank, found in enumerate(spread(_inference, 2, tmp_path)):
        own = [i for span in fold(50, 2, rank) for i in span]
        for out in found:
            torch.testing.assert_close(out, want[:, own], atol=1e-12, rtol=1e-12)


def _two_rings() -> dict[str, Tensor]:
    rank = distributed.get_rank()
    groups = [distributed.new_group([0, 2]), distributed.new_group([1, 3])]
    ring = Ring(groups[rank % 2], timeout=60)
    assert (ring.rank, ring.size) == (rank // 2, 2)
    return run_case("causal attn" if rank % 2 else "dropout of attention", ring)


def test_a_ring_can_be_some_of_the_processes(tmp_path: Path) -> None:
    for rank, found in enumerate(spread(_two_rings, 4, tmp_path)):
        want = run_case("causal attn" if rank % 2 else "dropout of attention", None)
        assert_alike({"loss": found["loss"]}, {"loss": want["loss"]})


def _mixed(number: int, ring: bool, enabled: bool = True) -> dict[str, Tensor]:
    net, x = make(torch.float32, remat="attn"), tokens(2, number, dtype=torch.float32)
    around = Ring(timeout=60) if ring else None
    here: Callable[[Tensor], Tensor] = around.split if around else lambda x: x
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        out = net(here(x), mask=Causal(), ring=around)
    (out * here(torch.linspace(-1, 1, x.numel()).view_as(x))).sum().backward()
    if around:
        around.sum_gradients(net)
    return {name: weight.grad for name, weight in net.named_parameters()}


@pytest.mark.parametrize("number", [50, 1])
def test_mixed_precision_in_a_ring_is_as_exact_as_in_one_process(number: int, tmp_path: Path) -> None:
    exact = _mixed(number, False, enabled=False)
    for found in [*spread(_mixed, 2, tmp_path, number, True), _mixed(number, False)]:
        # Three digits of bfloat16, through two layers.
        assert_alike(found, exact, 0.05)


def _unused() -> list[float | None]:
    ring, net = Ring(timeout=60), nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in "abcd"})
    net["b"].weight.requires_grad_(False)
    for name in ("a", "c" if ring.rank else "a"):
        net[name](torch.ones(1, 2)).sum().backward()
    ring.sum_gradients(net, net["a"])
    return [None if layer.weight.grad is None else layer.weight.grad.sum().item() for layer in net.values()]


def test_gradients_add_up_once_and_nobody_gets_one_that_no_process_has(tmp_path: Path) -> None:
    assert spread(_unused, 2, tmp_path) == [[12, None, 4, None]] * 2


def test_every_token_has_one_place_and_all_places_are_as_large() -> None:
    for size in (1, 2, 3, 5):
        for number in range(40):
            shares = [[i for span in fold(number, size, rank) for i in span] for rank in range(size)]
            assert sorted(i for share in shares for i in share) == list(range(number))
            assert max(map(len, shares)) - min(map(len, shares)) <= 2
            # Causal pairs, which are the work: of long sequences all have the same.
            pairs = [sum(i + 1 for i in share) for share in shares]
            assert max(pairs) - min(pairs) <= 2 * number


def _train(ring: bool) -> list[float]:
    torch.manual_seed(0)
    blocks = {"block_q": 40, "block_k": 40, "block_ffn": 40}
    net = make(torch.float32, remat="attn", dropout=0.1, attention_dropout=0.1, **blocks)
    table = nn.Embedding(11, 16)
    ids = torch.randint(11, (2, 71), generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW([*net.parameters(), *table.parameters()], lr=1e-2)
    around, losses = Ring(timeout=60) if ring else None, []
    for _ in range(20):
        optimizer.zero_grad()
        inputs, targets = (around.split(some) if around else some for some in (ids[:, :-1], ids[:, 1:]))
        hidden = net(table(inputs), mask=Causal(), ring=around)
        loss = linear_cross_entropy(hidden, table.weight, targets, reduction="sum") / ids[:, 1:].numel()
        loss.backward()
        if around:
            around.sum_gradients(net, table)
        optimizer.step()
        losses.append((around.total(loss) if around else loss.detach()).item())
    return losses


def test_processes_learn_what_one_learns(tmp_path: Path) -> None:
    every, alone = spread(_train, 2, tmp_path, True), _train(False)
    assert every[0] == every[1]
    # The first loss, with dropout, is that of the same weights.
    assert every[0][0] == pytest.approx(alone[0], rel=1e-6)
    assert every[0] == pytest.approx(alone, rel=1e-5)
    assert alone[-1] < 0.9 * alone[0]


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def _peak(batch: int, number: int, settings: dict) -> int:
    """Bytes by which a process grows in a step, without the gradients of weights."""
    ring = Ring() if distributed.get_world_size() > 1 else None
    net = make(torch.float32, **settings)

    def step(number: int) -> None:
        # Every process makes its own part only.
        share = len(ring.indices(number)) if ring else number
        net(torch.randn(batch, share, net.config.dim), mask=Causal(), ring=ring).square().mean().backward()

    step(256)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step(number)
    return _status("VmHWM") - before


def _assert_peak(number: int, settings: dict, folder: Path, batch: int = 1) -> None:
    (folder / "one").mkdir()
    (folder / "two").mkdir()
    (one,) = spread(_peak, 1, folder / "one", batch, number, settings)
    two = spread(_peak, 2, folder / "two", batch, number, settings)
    print(f"{number} tokens: {one / 2**20:.1f} MiB in one process, {[f'{size / 2**20:.1f}' for size in two]} in two")
    assert max(two) <= 0.6 * one
    share = plan(make(torch.float32, **settings).config, number // 2, batch, ring=True)
    assert share.total == pytest.approx(max(two), rel=0.1)


SMALL = {"dim": 64, "heads": 2, "layers": 8, "block_q": 256, "block_k": 256, "block_ffn": 128}


def test_a_process_of_two_takes_little_more_than_half_the_memory(tmp_path: Path) -> None:
    blocks = {"block_q": 128, "block_k": 128, "block_ffn": 64}
    _assert_peak(1536, {**SMALL, **blocks, "remat": "attn", "layers": 16}, tmp_path, batch=2)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "remat", "layers"), [(8192, "attn", 12), (3072, "layer", 32)])
def test_a_process_of_two_takes_little_more_than_half_the_memory_of_long_sequences(
    number: int, remat: str, layers: int, tmp_path: Path
) -> None:
    _assert_peak(number, {**SMALL, "remat": remat, "layers": layers}, tmp_path)
