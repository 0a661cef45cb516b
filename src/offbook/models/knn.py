"""The nearest of many points, exactly: distances by one matrix product for each block of points."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

_BLOCK = 65_536


@torch.no_grad()
def nearest(
    points: Float[Tensor, "points size"], queries: Float[Tensor, "queries size"], k: int
) -> tuple[Float[Tensor, "queries k"], Int64[Tensor, "queries k"]]:
    """The k nearest points of each query, the nearest first.

    In the tens of dimensions and more that features have, no search tree looks at fewer points than all.

    Args:
        points: what is searched, at least k of them.
        queries: whose neighbours are wanted.
        k: how many.

    Returns:
        Euclidean distances, and numbers of the points.

    Example:
        >>> points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
        >>> distance, which = nearest(points, torch.zeros(1, 2), 2)
        >>> distance.tolist(), which.tolist()
        ([[0.0, 1.0]], [[0, 2]])
    """
    found, numbers = [], []
    for start in range(0, len(points), _BLOCK):
        block = points[start : start + _BLOCK]
        # |p|^2 - 2 p q orders points like the distance does.
        order = block.square().sum(1) - 2 * queries @ block.T
        values, which = order.topk(min(k, len(block)), dim=1, largest=False)
        found.append(values)
        numbers.append(which + start)
    best = torch.cat(found, 1).topk(k, dim=1, largest=False).indices
    which = torch.cat(numbers, 1).gather(1, best)
    # Anew from the differences, for near neighbours cancel badly in the products.
    distance = (points[which] - queries[:, None]).norm(dim=2)
    distance, order = distance.sort(dim=1, stable=True)
    return distance, which.gather(1, order)
