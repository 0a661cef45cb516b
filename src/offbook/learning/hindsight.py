"""Policies that read their own earlier trials: a causal transformer over chains of trials, each told what to aim at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from offbook.client.protocol import ActionSpec
from offbook.data.chains import DONE, REWARD, TARGET
from offbook.errors import check_settings
from offbook.learning.networks import INPUT_LIMIT, standard
from offbook.models.blockwise import Backbone, BackboneConfig, Causal
from offbook.models.trajectory import Layout, TokenStream

STATE, ACTION = "state", "action"
VALUES = (TARGET, STATE, ACTION, REWARD, DONE)
"""The values of a step: what is left of the return that is aimed at, the state, and, afterwards, the action, its reward
and whether that ended a trial which reached its aim."""

Head = Literal["bins", "gaussian", "mse"]

# Parts of a batch of chains of unequal lengths.
_GROUPS = 8
# The narrowest and widest deviation of a Gaussian, in deviations of the recorded actions, as logarithms.
_LOG_STD = (-5.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class HindsightSizes:
    """The size of a network.

    Attributes:
        width: size of a token.
        layers: of the transformer.
        heads: of attention.
        dropout: share of the numbers dropped while training.
        tokens: split, five for a step as in the paper; or fused, one.
        values: which of a step's values are read; target and state always are.
        head: what tells a continuous action: bins, of each entry the chance of each of `bins` values, from which one is
            drawn; gaussian, from which one is drawn; or mse, the mean.
        bins: values of an entry, evenly from its least to its largest recorded one.
        remat: whether layers compute again in the backward pass, see `BackboneConfig`; auto goes by the memory.
        offload: where layers keep their inputs meanwhile, see `BackboneConfig`.
    """

    width: int = 64
    layers: int = 2
    heads: int = 4
    dropout: float = 0.0
    tokens: Layout = "fused"
    values: tuple[str, ...] = VALUES
    head: Head = "bins"
    bins: int = 11
    remat: Literal["none", "attn", "layer", "auto"] = "auto"
    offload: Literal["none", "cpu", "disk"] = "none"

    def __post_init__(self) -> None:
        known = set(self.values) <= set(VALUES) and {TARGET, STATE} <= set(self.values)
        checks = {
            "width": (1 <= self.width <= 65_536 and self.width % max(1, self.heads) == 0, "a multiple of the heads"),
            "layers": (1 <= self.layers <= 256, "1 to 256"),
            "heads": (1 <= self.heads <= 256, "1 to 256"),
            "dropout": (0 <= self.dropout < 1, "a share in [0, 1)"),
            "tokens": (self.tokens in get_args(Layout), " or ".join(get_args(Layout))),
            "values": (known, f"target, state and any of {', '.join(VALUES[2:])}"),
            "head": (self.head in get_args(Head), " or ".join(get_args(Head))),
            "bins": (2 <= self.bins <= 65_536, "2 to 65536"),
        }
        check_settings(self, checks, "--model.")


class HindsightNetwork(nn.Module):
    """A causal transformer that tells, at each step of a chain of trials, the action.

    Values go in as recorded and are scaled inside, by statistics that are part of the module.

    Args:
        state_size: numbers of a state.
        action: what it gives.
        trials: of the longest chain that it learns from.
        steps: of the longest trial.
        sizes: of the network.

    Source: Liu and Abbeel, "Emergent Agentic Transformer from Chain of Hindsight Experience" (2023). Within a trial the
    time begins at 0, and trials are numbered; with one trial in a chain, its own return as the target and the values
    target, state and action, it is that of Chen et al., "Decision Transformer" (2021).
    """

    undecayed = ("time.", "number.")

    state_mean: Tensor
    state_std: Tensor
    action_mean: Tensor
    action_std: Tensor
    action_low: Tensor
    action_high: Tensor
    scale: Tensor

    def __init__(self, state_size: int, action: ActionSpec, trials: int, steps: int, sizes: HindsightSizes) -> None:
        super().__init__()
        self.action, self.sizes, self.trials, self.steps = action, sizes, trials, steps
        read = {TARGET: 1, STATE: state_size, ACTION: action.choices or action.size, REWARD: 1, DONE: 1}
        now = {name: read[name] for name in VALUES[:2]}
        after = {name: read[name] for name in VALUES[2:] if name in sizes.values}
        self.stream = TokenStream(now, after, sizes.width, sizes.tokens)
        self.time, self.number = nn.Embedding(steps, sizes.width), nn.Embedding(trials, sizes.width)
        self.backbone = Backbone(
            BackboneConfig(
                dim=sizes.width, layers=sizes.layers, heads=sizes.heads, dropout=sizes.dropout, positions="none",
                remat=sizes.remat, offload=sizes.offload,
            )
        )  # fmt: skip
        each = action.choices or {"bins": sizes.bins, "gaussian": 2, "mse": 1}[sizes.head]
        self.output = nn.Linear(sizes.width, each if action.choices else each * action.size)
        for name, size in (("state", state_size), ("action", action.size)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))
        self.register_buffer("action_low", torch.tensor(action.low))
        self.register_buffer("action_high", torch.tensor(action.high))
        # Of returns and of rewards: their largest magnitude in the recordings.
        self.register_buffer("scale", torch.ones(2))

    def record(self) -> dict[str, Any]:
        """What `from_record` builds the like from, beside state and action, as JSON types."""
        return {"trials": self.trials, "steps": self.steps, "sizes": asdict(self.sizes)}

    def forward(self, chains: Mapping[str, Tensor]) -> Float[Tensor, "batch time entries classes"]:
        """What is told of the action at each step, from everything before it.

        Args:
            chains: by name the `VALUES`, shape (batch, time, numbers); and of shape (batch, time) `"trial"`, `"time"`
                within the trial, and `"valid"`, false for padding.

        Returns:
            Where valid, logits of the bins of each entry; mean and logarithm of the deviation, or the mean, in
            deviations of the recorded actions; or logits of discrete actions, of one entry.
        """
        batch, time = chains["valid"].shape
        lengths = chains["valid"].sum(1)
        if 10 * int(lengths.sum()) >= 9 * batch * time:
            return self._along(chains)
        # Chains of like lengths together, so that little is computed for padding, where attention counts it twice.
        order = lengths.argsort(stable=True)
        told = []
        for rows in order.tensor_split(_GROUPS):
            if len(rows):
                stop = int(lengths[rows].max())
                part = self._along({name: of[rows, :stop] for name, of in chains.items()})
                told.append(functional.pad(part, (0, 0, 0, 0, 0, time - stop)))
        return torch.cat(told)[order.argsort()]

    def _along(self, chains: Mapping[str, Tensor]) -> Float[Tensor, "batch time entries classes"]:
        """What is told of chains, of padding too."""
        x: Tensor = self.backbone(self.embed(chains), mask=Causal())
        return self.tell(self.stream.telling(x))

    def embed(self, chains: Mapping[str, Tensor]) -> Float[Tensor, "batch tokens dim"]:
        """The tokens of some steps of a chain; what is not valid is read as zeros."""
        marks = self.time(chains["time"].clamp(max=self.steps - 1)) + self.number(chains["trial"])
        there = chains["valid"][..., None]
        out: Tensor = self.stream({name: of * there for name, of in self._scaled(chains).items()}, marks)
        return out

    def tell(self, x: Float[Tensor, "batch time dim"]) -> Float[Tensor, "batch time entries classes"]:
        """What `forward` gives, from the transformer's output where steps tell."""
        entries = 1 if self.action.choices else self.action.size
        out: Tensor = self.output(x).unflatten(-1, (entries, -1))
        return out

    def errors(
        self, told: Float[Tensor, "batch time entries classes"], action: Float[Tensor, "batch time action"]
    ) -> Float[Tensor, "batch time"]:
        """Of each step: negative log-likelihood of the action (of a density in deviations), or squared error."""
        if self.action.choices is not None or self.sizes.head == "bins":
            wanted = action.long() if self.action.choices else self._bins(action)
            # What `cross_entropy` gives, which takes several times as long over a few classes.
            told = told.float()
            return (told.logsumexp(-1) - told.gather(-1, wanted[..., None])[..., 0]).mean(-1)
        x = standard(action, self.action_mean, self.action_std)
        if self.sizes.head == "mse":
            return (told[..., 0] - x).square().mean(-1)
        log_std = told[..., 1].clamp(*_LOG_STD)
        return (((x - told[..., 0]) / log_std.exp()).square() / 2 + log_std).mean(-1)

    def draw(
        self, told: Float[Tensor, "batch entries classes"], uniform: Float[Tensor, "batch entries"]
    ) -> Float[Tensor, "batch action"]:
        """An action in the recordings' units, at a place between 0 and 1 of what is likely; `mse` has only one."""
        if self.action.choices is not None or self.sizes.head == "bins":
            place = torch.softmax(told.double(), -1).cumsum(-1)
            chosen = (place < uniform[..., None] * place[..., -1:]).sum(-1).clamp(max=told.shape[-1] - 1).float()
            if self.action.choices is not None:
                return chosen
            return self.action_low + chosen / (self.sizes.bins - 1) * (self.action_high - self.action_low)
        x = told[..., 0]
        if self.sizes.head == "gaussian":
            x = x + told[..., 1].clamp(*_LOG_STD).exp() * torch.special.ndtri(uniform.double()).float()
        return x * self.action_std + self.action_mean

    def _bins(self, action: Float[Tensor, "batch time action"]) -> Int64[Tensor, "batch time action"]:
        """The nearest of the values that an entry may have."""
        share = (action - self.action_low) / (self.action_high - self.action_low).clamp(min=1e-12)
        return (share * (self.sizes.bins - 1)).round().long().clamp(0, self.sizes.bins - 1)

    def _scaled(self, chains: Mapping[str, Tensor]) -> dict[str, Tensor]:
        state = standard(chains[STATE], self.state_mean, self.state_std).clamp(-INPUT_LIMIT, INPUT_LIMIT)
        action = chains[ACTION]
        if self.action.choices is not None:
            action = functional.one_hot(action[..., 0].long(), self.action.choices).float()
        else:
            action = standard(action, self.action_mean, self.action_std).clamp(-INPUT_LIMIT, INPUT_LIMIT)
        returns, reward = (chains[name] / of for name, of in zip((TARGET, REWARD), self.scale, strict=True))
        return {TARGET: returns, STATE: state, ACTION: action, REWARD: reward, DONE: chains[DONE].float()}


def hindsight_loss(
    network: HindsightNetwork,
    told: Float[Tensor, "batch time entries classes"],
    chains: Mapping[str, Tensor],
    trials: Literal["all", "last"],
) -> Tensor:
    """The mean over steps, of all trials or of each chain's last one, of `HindsightNetwork.errors`.

    Args:
        network: what told it.
        told: what `forward` gives.
        chains: what it was told of.
        trials: whose steps count.
    """
    counted: Bool[Tensor, "batch time"] = chains["valid"]
    if trials == "last":
        last = chains["trial"].masked_fill(~counted, -1).amax(1, keepdim=True)
        counted = counted & (chains["trial"] == last)
    weight = counted.float()
    return (network.errors(told, chains[ACTION]) * weight).sum() / weight.sum()
