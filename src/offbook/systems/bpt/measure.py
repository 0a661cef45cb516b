"""How much memory and time one training step takes, measured in a process of its own."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from offbook.errors import OffbookError
from offbook.models.blockwise.backbone import Backbone
from offbook.models.blockwise.config import BackboneConfig
from offbook.models.blockwise.head import linear_cross_entropy
from offbook.models.blockwise.layer import Pass
from offbook.models.blockwise.masks import Causal
from offbook.models.blockwise.positions import rope_tables
from offbook.runs.config import from_json, to_json

_CURRENT_FUTURE_ON_FAULT = 7
Arm = Literal["vanilla", "sdpa", "blockwise"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """A training step: a backbone between an embedding and a head over a vocabulary, causal, on random tokens.

    Attributes:
        backbone: the transformer; for the arms other than `"blockwise"` its `remat` says nothing.
        arm: `"vanilla"` holds the matrix of attention of one layer at a time, `"sdpa"` is PyTorch's flash attention,
            both with `torch.utils.checkpoint` around each layer; or ours.
        tokens: of the sequence.
        batch: sequences.
        vocabulary: different tokens.
        head: ours, which never holds all logits; PyTorch's, which does not either; or all logits.
        threads: of the processor.
        repeats: steps whose time is taken, after the one whose memory is.
    """

    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig(dim=256, layers=4, heads=4))
    arm: Arm = "blockwise"
    tokens: int = 2048
    batch: int = 1
    vocabulary: int = 1024
    head: Literal["ours", "torch", "full"] = "ours"
    threads: int = 1
    repeats: int = 0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a step took.

    Attributes:
        bytes: by which the process grew at the peak, weights' gradients among them.
        cpu_seconds: of each of the steps that were timed, all threads together.
        loss: of the first step.
    """

    bytes: int
    cpu_seconds: tuple[float, ...]
    loss: float


def measure(step: Step) -> Measured:
    """Runs a step in a process of its own.

    Raises:
        OffbookError: the process did not come to its end, for lack of memory for instance.
    """
    # Freed memory goes back to the machine at once, so that the peak is what was held and not what once was.
    environment = {
        **os.environ,
        "MALLOC_TRIM_THRESHOLD_": "0",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": str(step.threads),
    }
    command = [sys.executable, "-m", "offbook.systems.bpt.measure", json.dumps(to_json(step))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        where, fix = f"a step of {step.tokens} tokens ({step.arm})", "measure fewer tokens"
        raise OffbookError(where, expected="to come to its end", got=last, fix=fix)
    return from_json(Measured, json.loads(done.stdout))


def _here(step: Step) -> Measured:
    torch.manual_seed(0)
    torch.set_num_threads(step.threads)
    backbone = Backbone(step.backbone)
    embedding = torch.nn.Embedding(step.vocabulary, step.backbone.dim)
    head = torch.nn.Linear(step.backbone.dim, step.vocabulary, bias=False)

    def forget() -> None:
        for module in (backbone, embedding, head):
            module.zero_grad()

    def run(tokens: int) -> float:
        forget()
        ids = torch.randint(step.vocabulary, (step.batch, tokens + 1))
        hidden = _ARMS[step.arm](backbone, embedding(ids[:, :-1]))
        loss = _loss(hidden, head.weight, ids[:, 1:], step.head)
        del hidden
        torch.autograd.backward(loss)
        return loss.item()

    # First what is loaded and made once.
    run(min(step.tokens, 64))
    forget()
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    # Pages that lie idle until the backward pass stay in memory, where a machine would put them aside; without the
    # right to ask for that, nothing happens.
    libc.mlockall(_CURRENT_FUTURE_ON_FAULT)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    loss = run(step.tokens)
    grown, seconds = _status("VmHWM") - before, []
    for _ in range(step.repeats):
        start = time.process_time()
        run(step.tokens)
        seconds.append(time.process_time() - start)
    return Measured(bytes=grown, cpu_seconds=tuple(seconds), loss=loss)


def _loss(hidden: Tensor, weight: Tensor, targets: Tensor, head: str) -> Tensor:
    if head == "ours":
        return linear_cross_entropy(hidden, weight, targets)
    if head == "torch":
        return functional.linear_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten())
    return functional.cross_entropy(functional.linear(hidden, weight).flatten(0, 1), targets.flatten())


def _checkpointed(backbone: Backbone, x: Tensor, attention: list[SDPBackend] | None = None) -> Tensor:
    """Every layer as PyTorch computes it, and once more in the backward pass."""
    shared, config = Pass(Causal(), "none"), backbone.config
    if config.positions == "rope":
        positions = torch.arange(x.shape[1])[None]
        shared.cos, shared.sin = rope_tables(positions, config.rotated, config.rope_base)

    def run(layer: torch.nn.Module, x: Tensor) -> Tensor:
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


def _blockwise(backbone: Backbone, x: Tensor) -> Tensor:
    out: Tensor = backbone(x, mask=Causal())
    return out


_ARMS: dict[Arm, Callable[[Backbone, Tensor], Tensor]] = {
    "vanilla": _vanilla,
    "sdpa": _checkpointed,
    "blockwise": _blockwise,
}


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


if __name__ == "__main__":
    json.dump(to_json(_here(from_json(Step, json.loads(sys.argv[1])))), sys.stdout)
