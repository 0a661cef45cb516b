"""How much memory and time a training step takes, measured in a process of its own, and how long a context fits."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from offbook.errors import ConfigError
from offbook.models.blockwise import Backbone, BackboneConfig, Causal, LanguageModel, linear_cross_entropy
from offbook.models.blockwise.layer import Pass
from offbook.models.blockwise.masks import Kind, Mask
from offbook.models.blockwise.positions import rope_tables
from offbook.runs.config import from_json, to_json
from offbook.runs.memory import GIVE_BACK, Resident, run_alone

_FLASH = "_scaled_dot_product_flash_attention_for_cpu"
_ATEN = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]

Arm = Literal["vanilla", "sdpa", "compiled", "blockwise"]
Head = Literal["ours", "torch", "full"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """A training step: a backbone between an embedding and a head over a vocabulary, causal, on random tokens.

    Attributes:
        backbone: the transformer; for the arms other than `"blockwise"` its `remat` says nothing.
        arm: `"vanilla"` holds the matrix of attention of one layer at a time, `"sdpa"` is PyTorch's flash attention,
            `"compiled"` is that through `torch.compile`, all with `torch.utils.checkpoint` around each layer; or ours.
        tokens: of the sequence.
        batch: sequences.
        vocabulary: different tokens.
        head: ours, which never holds all logits; PyTorch's, which does not either; or all logits.
        attention: `"allocated"` leaves out the arithmetic of flash attention, forward and backward, but allocates and
            fills what it gives: so the memory of a step can be measured where its time is hours.
        goal: what is looked at. For `"memory"`, freed memory goes back to the machine at once, so that the peak is what
            was held and not what once was; for `"time"`, memory is managed as usual.
        device: where it runs.
        dtype: of weights and activations.
        threads: of the processor.
    """

    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig(dim=256, layers=4, heads=4))
    arm: Arm = "blockwise"
    tokens: int = 2048
    batch: int = 1
    vocabulary: int = 1024
    head: Head = "ours"
    attention: Literal["computed", "allocated"] = "computed"
    goal: Literal["memory", "time"] = "memory"
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: int = 1

    def __post_init__(self) -> None:
        if self.attention == "allocated" and (self.arm == "vanilla" or self.device != "cpu"):
            fix = "compute it"
            raise ConfigError("attention", expected="flash attention on the CPU", got=self.arm, fix=fix)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a step took.

    Attributes:
        bytes: by which the process, or what it holds of a device, grew at the peak, weights' gradients among them.
        seconds: on a CPU the processor's time, of all threads together; on a device what a clock on the wall shows.
        loss: of the step.
    """

    bytes: int
    seconds: float
    loss: float


@dataclass(frozen=True)
class Measurements:
    """Measures steps, and keeps what they took in a file, from which an interrupted study goes on.

    Attributes:
        path: a line for each measurement; several processes may add to it.
    """

    path: Path

    def __call__(self, step: Step, turn: int = 0) -> Measured:
        """What a step took when its turn came."""
        wanted = {"step": to_json(step), "turn": turn}
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            record = json.loads(line)
            if {"step": record["step"], "turn": record["turn"]} == wanted:
                return from_json(Measured, record["measured"])
        found = measure(step)
        with self.path.open("a") as file:
            file.write(json.dumps({**wanted, "measured": to_json(found)}) + "\n")
        return found


@dataclass(frozen=True, kw_only=True)
class Longest:
    """The longest context that fits, by measurement.

    Attributes:
        tokens: of it; 0 where not even the fewest that were tried fit.
        points: tokens and bytes of all steps that were measured, in order of tokens.
        growth: bytes by which each further token lets a step grow, between the first two lengths.
    """

    tokens: int
    points: tuple[tuple[int, int], ...]
    growth: float


def longest(
    step: Step, budget: int, starts: tuple[int, int], computed: int, tries: int, measured: Measurements
) -> Longest:
    """Measures longer and longer steps until one takes between 97 and 100 of 100 bytes of a budget.

    Args:
        step: what is measured; its number of tokens says nothing.
        budget: bytes by which the process may grow.
        starts: tokens of the first two, half of them for vanilla attention.
        computed: tokens beyond which flash attention is allocated only, see `Step`.
        tries: measurements after the first two.
        measured: what measures.
    """

    def at(tokens: int) -> int:
        left_out = tokens > computed and step.arm != "vanilla" and step.device == "cpu"
        return measured(replace(step, tokens=tokens, attention="allocated" if left_out else "computed")).bytes

    if step.arm == "vanilla":
        starts = starts[0] // 2, starts[1] // 2
    points = {tokens: at(tokens) for tokens in starts}
    growth = (points[starts[1]] - points[starts[0]]) / (starts[1] - starts[0])
    for _ in range(tries):
        if any(0.97 * budget <= size <= budget for size in points.values()):
            break
        order = sorted(points)
        place = sum(points[tokens] <= budget for tokens in order)
        low, high = order[max(0, min(place, len(order) - 1) - 1) :][:2]
        if place == len(order):  # all fit: along the line
            tokens = high + (0.985 * budget - points[high]) * (high - low) / (points[high] - points[low])
        else:  # between one that fits and one that does not, or below both: as a power law
            power = math.log(points[high] / points[low]) / math.log(high / low)
            tokens = low * (0.985 * budget / points[low]) ** (1 / power)
        tokens = int(tokens) // 64 * 64
        if tokens < 64 or tokens in points:
            break
        points[tokens] = at(tokens)
    most = max((tokens for tokens, size in points.items() if size <= budget), default=0)
    return Longest(tokens=most, points=tuple(sorted(points.items())), growth=growth)


class Language(nn.Module):
    """A language model that trains as an arm does.

    Args:
        backbone: see `Step`, like the others.
        vocabulary: different tokens.
        arm: how layers compute.
        head: how the loss does.
    """

    def __init__(self, backbone: BackboneConfig, vocabulary: int, arm: Arm, head: Head) -> None:
        super().__init__()
        self.model, self.arm, self.head = LanguageModel(backbone, vocabulary), arm, head

    def forward(self, ids: Tensor) -> Tensor:
        """The mean loss of all tokens but the first, shape (batch, tokens + 1), each from those before it."""
        hidden = _ARMS[self.arm](self.model.backbone, self.model.embedding(ids[:, :-1]))
        weight, targets = self.model.weight, ids[:, 1:]
        if self.head == "ours":
            return linear_cross_entropy(hidden, weight, targets)
        if self.head == "torch":
            # Without options it would hold all logits.
            options = nn.LinearCrossEntropyOptions()
            return functional.linear_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten(), options=options)
        return functional.cross_entropy(functional.linear(hidden, weight).flatten(0, 1), targets.flatten())


def measure(step: Step) -> Measured:
    """Runs a step in a process of its own.

    Raises:
        OffbookError: the process did not come to its end, for lack of memory for instance.
    """
    environment = {"OMP_NUM_THREADS": str(step.threads)} | (GIVE_BACK if step.goal == "memory" else {})
    where = f"a step of {step.tokens} tokens ({step.arm})"
    return run_alone("offbook.systems.bpt.measure", step, Measured, environment, where=where)


def _here(step: Step) -> Measured:
    torch.manual_seed(0)
    torch.set_num_threads(step.threads)
    model = Language(step.backbone, step.vocabulary, step.arm, step.head).to(step.device, getattr(torch, step.dtype))

    def run(tokens: int) -> float:
        model.zero_grad()
        loss = model(torch.randint(step.vocabulary, (step.batch, tokens + 1), device=step.device))
        torch.autograd.backward(loss)
        return float(loss)

    # First what is loaded and made once; a device also chooses among its kernels by the shapes.
    run(step.tokens if (step.goal, step.device) == ("time", "cuda") else min(step.tokens, 64))
    model.zero_grad()
    if step.attention == "allocated":
        _leave_attention_out()
    meter, clock = (_Cuda(), _wall) if step.device == "cuda" else (Resident(), time.process_time)
    start = clock()
    loss = run(step.tokens)
    seconds = clock() - start
    return Measured(bytes=meter.grown(), seconds=seconds, loss=loss)


class _Cuda:
    """By how much what PyTorch holds of the device grew at its peak, from now on."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def grown(self) -> int:
        return torch.cuda.max_memory_allocated() - self._before


def _wall() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def _leave_attention_out() -> None:
    """From now on, flash attention gives zeros of the sizes and strides that it had, without its arithmetic."""

    # Memory that nobody writes to is not taken, so all is filled.
    def forward(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        sums = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32).fill_(0)
        return torch.empty_like(q).fill_(0), sums.transpose(1, 2)

    def backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        sizes = [(x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in (q, k, v)]
        return tuple(q.new_empty(size).fill_(0).transpose(1, 2) for size in sizes)

    _ARMS["blockwise"] = functools.partial(_blockwise, mask=_Near())
    for name, kernel in ((_FLASH, forward), (f"{_FLASH}_backward", backward)):
        _ATEN.impl(name, kernel, "CPU", allow_override=True)  # type: ignore[no-untyped-call]


def _checkpointed(backbone: Backbone, x: Tensor, attention: list[SDPBackend] | None = None) -> Tensor:
    """Every layer as PyTorch computes it, and once more in the backward pass."""
    shared, config = Pass(Causal(), "none"), backbone.config
    if config.positions == "rope":
        positions = torch.arange(x.shape[1], device=x.device)[None]
        shared.cos, shared.sin = rope_tables(positions, config.rotated, config.rope_base)

    def run(layer: nn.Module, x: Tensor) -> Tensor:
        # Inside, so that it holds in the backward pass too.
        with sdpa_kernel(attention) if attention else contextlib.nullcontext():
            out: Tensor = layer(x, shared)
        return out

    for layer in backbone.layers:
        x = checkpoint(run, layer, x, use_reentrant=False)
    out: Tensor = backbone.norm(x)
    return out


def _vanilla(backbone: Backbone, x: Tensor) -> Tensor:
    return _checkpointed(backbone, x, [SDPBackend.MATH])


def _compiled(backbone: Backbone, x: Tensor) -> Tensor:
    out: Tensor = torch.compile(_checkpointed)(backbone, x)
    return out


def _blockwise(backbone: Backbone, x: Tensor, mask: Mask | None = None) -> Tensor:
    out: Tensor = backbone(x, mask=mask or Causal())
    return out


class _Near(Causal):
    """For attention that is only allocated: one piece far back is like another, and all of them take long to fill."""

    def _kind(self, queries: range, keys: range) -> Kind:
        far = keys.stop <= queries.start - 8_192
        return Kind.EMPTY if far else super()._kind(queries, keys)


_ARMS: dict[Arm, Callable[[Backbone, Tensor], Tensor]] = {
    "vanilla": _vanilla,
    "sdpa": _checkpointed,
    "compiled": _compiled,
    "blockwise": _blockwise,
}


if __name__ == "__main__":
    json.dump(to_json(_here(from_json(Step, json.loads(sys.argv[1])))), sys.stdout)
