"""What a training of chains will take, before it begins: tokens, arithmetic, memory, and hours on this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch

from offbook.errors import ConfigError
from offbook.learning.hindsight import HindsightNetwork, hindsight_loss
from offbook.learning.hindsight_training import ChainData
from offbook.models.blockwise.plan import available, choose, plan

LIMIT_HOURS = 24.0
# Chains that are looked at, and steps that are timed.
_LOOKED, _TIMED = 256, 2


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a training takes.

    Attributes:
        tokens: of a chain, on average.
        longest: tokens of the longest of many chains.
        flops: floating-point operations of a step, without what layers compute again.
        memory: bytes of a step at its peak, for chains as long as the longest.
        seconds: of a step, measured.
        hours: of all steps at that rate.
    """

    tokens: float
    longest: int
    flops: float
    memory: int
    seconds: float
    hours: float

    def __str__(self) -> str:
        return (
            f"{self.tokens:.0f} tokens a chain, at most {self.longest}; {self.flops:.2g} operations and "
            f"{self.memory / 2**20:.0f} MiB a step; {self.seconds:.2g} s a step here, {self.hours:.2g} hours in all"
        )


def measure_cost(data: ChainData, network: HindsightNetwork) -> Cost:
    """Counts tokens, arithmetic and memory of a step, and times a few.

    Args:
        data: what is learnt from.
        network: what would be trained; its weights stay as they are.

    Raises:
        ConfigError: a step would not fit the memory.
    """
    fit, backbone, per = data.config.fit, network.backbone.config, network.stream.tokens
    lengths = data.sampler.sample(_LOOKED, 2**31 + 1).valid.sum(1) * per
    tokens, longest = float(lengths.mean()), int(lengths.max())
    d, up = backbone.dim, backbone.hidden
    dense = 2 * (4 * d * d + 2 * d * up) * backbone.layers
    # Causal: half of the pairs, and two products.
    attention = 2 * d * float((lengths.astype(float) ** 2).mean()) * backbone.layers
    flops = 3 * fit.batch_size * (dense * tokens + attention)
    # Where training will run.
    device = torch.device("cuda" if fit.device == "auto" and torch.cuda.is_available() else "cpu")
    memory = _memory(network.to(device), longest, fit.batch_size, device)
    began = 0.0
    for index in range(_TIMED + 1):
        if index == 1:  # the first one warms up
            began = time.perf_counter()
        batch = {name: of.to(device) for name, of in data.batch(index).items()}
        hindsight_loss(network, network(batch), batch, data.config.loss_trials).backward()  # type: ignore[no-untyped-call]
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / _TIMED
    network.cpu().zero_grad(set_to_none=True)
    hours = seconds * fit.steps * fit.accumulate / 3600
    return Cost(tokens=tokens, longest=longest, flops=flops, memory=memory, seconds=seconds, hours=hours)


def check_cost(cost: Cost) -> None:
    """Refuses a training that would take longer than a day.

    Raises:
        ConfigError: it would.
    """
    if cost.hours > LIMIT_HOURS:
        expected, fix = f"at most {LIMIT_HOURS:.0f} hours", "shrink the model or the chains, or add --yes"
        raise ConfigError("training", expected=expected, got=f"about {cost.hours:.0f} hours: {cost}", fix=fix)


def _memory(network: HindsightNetwork, tokens: int, batch: int, device: torch.device) -> int:
    """Of a step whose layers compute again as they are told to, or as little as the memory allows."""
    config = network.backbone.config
    if config.remat == "auto":
        remat = choose(config, tokens, batch, budget=available(device))
        config = replace(config, remat=remat)
    return plan(config, tokens, batch).total
