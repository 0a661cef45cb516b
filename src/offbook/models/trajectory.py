"""The steps of a trajectory as tokens of a causal transformer: one token for each value, or one for all of a step's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

Layout = Literal["split", "fused"]


class TokenStream(nn.Module):
    """Embeds the values of steps as tokens, in which what a step tells stands before what comes of it.

    Each step has some values when it is to tell something, such as a state, and others only afterwards, such as a
    reward. Split, a step has a token for each value, and tells at the last of those that it has. Fused, a step has one
    token, for the values that it has and for those that came of the step before; a chain of n values is n times
    shorter so, and attention n squared times cheaper.

    Args:
        now: numbers of each value that a step has when it tells, by name, in order.
        after: of each value that is known afterwards.
        dim: size of a token.
        layout: a token for each value, or one for a step.

    Attributes:
        tokens: of a step.
        ready: tokens of the last step that stand there when it tells.

    Example:
        >>> stream = TokenStream({"target": 1, "state": 3}, {"action": 2}, dim=8, layout="split")
        >>> values = {"target": torch.zeros(4, 5, 1), "state": torch.zeros(4, 5, 3), "action": torch.zeros(4, 5, 2)}
        >>> stream(values, torch.zeros(4, 5, 8)).shape, stream.telling(torch.zeros(4, 15, 8)).shape
        (torch.Size([4, 15, 8]), torch.Size([4, 5, 8]))

    Source: split, Chen et al., "Decision Transformer" (2021), whose order is return, state, action.
    """

    def __init__(self, now: Mapping[str, int], after: Mapping[str, int], dim: int, layout: Layout = "split") -> None:
        super().__init__()
        self.now, self.after, self.layout = tuple(now), tuple(after), layout
        self.embed = nn.ModuleDict({name: nn.Linear(size, dim) for name, size in {**now, **after}.items()})
        self.tokens = len(self.embed) if layout == "split" else 1
        self.ready = len(self.now) if layout == "split" else 1

    def forward(
        self, values: Mapping[str, Float[Tensor, "batch time f"]], marks: Float[Tensor, "batch time dim"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """The tokens of some steps, in order; fused, what came of a step before the first is read as zeros.

        Args:
            values: by name, shape (batch, time, numbers); others are not looked at.
            marks: added to each token of a step, such as an embedding of its time.
        """
        if self.layout == "split":
            found = [self.embed[name](values[name]) + marks for name in (*self.now, *self.after)]
            return torch.stack(found, 2).flatten(1, 2)
        read = {name: values[name] for name in self.now}
        read |= {name: functional.pad(values[name][:, :-1], (0, 0, 1, 0)) for name in self.after}
        # All of them as one: the sum of their tokens, without a token for each.
        weights = torch.cat([self.embed.get_parameter(f"{name}.weight") for name in read], 1)
        bias = torch.stack([self.embed.get_parameter(f"{name}.bias") for name in read]).sum(0)
        return functional.linear(torch.cat([*read.values()], -1), weights, bias) + marks

    def telling(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch time dim"]:
        """Of the tokens of whole steps, those at which steps tell."""
        return x[:, self.ready - 1 :: self.tokens]
