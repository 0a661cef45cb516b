"""How much memory a training step on one long chain takes, with plain attention and ours, in a process of its own."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from offbook.client.protocol import ActionSpec
from offbook.learning.hindsight import HindsightNetwork, HindsightSizes, hindsight_loss
from offbook.runs.config import from_json, to_json
from offbook.runs.memory import GIVE_BACK, Resident, run_alone

_STATE = 2


@dataclass(frozen=True, kw_only=True)
class LongStep:
    """A training step on one chain of random numbers.

    Attributes:
        trials: of the chain.
        steps: of each trial.
        sizes: of the network.
        plain: attention that holds a number for each pair of tokens, in all layers, as it is without blocks.
    """

    trials: int
    steps: int
    sizes: HindsightSizes = field(default_factory=HindsightSizes)
    plain: bool = False


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What it took.

    Attributes:
        bytes: by which the process grew at its peak.
        loss: of the step.
        gradient: norm of all gradients.
    """

    bytes: int
    loss: float
    gradient: float


def measure(step: LongStep) -> Taken:
    """Runs a step in a process of its own.

    Raises:
        OffbookError: the process did not come to its end, for lack of memory for instance.
    """
    environment = {**GIVE_BACK, "OMP_NUM_THREADS": "1"}
    where = f"a chain of {step.trials} trials of {step.steps} steps"
    return run_alone("offbook.systems.agentic_transformer.lengths", step, Taken, environment, where=where)


def _here(step: LongStep) -> Taken:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = replace(step.sizes, remat="none") if step.plain else step.sizes
    action = ActionSpec(size=2, low=(-1.0, -1.0), high=(1.0, 1.0))
    network = HindsightNetwork(_STATE, action, step.trials, step.steps, sizes)

    def run(trials: int) -> float:
        network.zero_grad()
        with sdpa_kernel([SDPBackend.MATH]) if step.plain else nullcontext():
            chains = _chains(trials, step.steps)
            loss = hindsight_loss(network, network(chains), chains, "all")
            torch.autograd.backward(loss)
        return loss.item()

    run(1)
    network.zero_grad()
    meter = Resident()
    loss = run(step.trials)
    squares = [p.grad.double().square().sum() for p in network.parameters() if p.grad is not None]
    return Taken(bytes=meter.grown(), loss=loss, gradient=float(torch.stack(squares).sum().sqrt()))


def _chains(trials: int, steps: int) -> dict[str, torch.Tensor]:
    rng, time = torch.Generator().manual_seed(0), trials * steps
    sizes = {"target": 1, "state": _STATE, "reward": 1}
    numbers = {name: torch.randn(1, time, size, generator=rng) for name, size in sizes.items()}
    place = torch.arange(time)[None]
    return {
        **numbers,
        "action": torch.rand(1, time, 2, generator=rng) * 2 - 1,
        "done": torch.zeros(1, time, 1),
        "valid": torch.ones(1, time, dtype=torch.bool),
        "trial": place // steps,
        "time": place % steps,
    }


if __name__ == "__main__":
    json.dump(to_json(_here(from_json(LongStep, json.loads(sys.argv[1])))), sys.stdout)
