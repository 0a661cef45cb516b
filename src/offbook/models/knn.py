"""The nearest of many points: distances by one matrix product for each block of points."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from offbook.errors import ConfigError, DataError

_BLOCK = 65_536

# Of the joint search: queries at a time, and of how many distances at most, so that they stay in a processor's cache;
# columns that share a minimum; candidates beyond k; points that are searched without a product; and from how many on
# windows can pay.
_ROWS, _TILE, _GROUP, _MORE, _FEW, _MANY = 128, 2**21, 16, 4, 128, 2_048

# What a product of float32 is rounded like at each precision that PyTorch can be set to; TensorFloat-32 has the digits
# of float16.
_ROUNDED = {"highest": torch.float32, "high": torch.float16, "medium": torch.bfloat16}


@torch.no_grad()
def nearest(
    points: Float[Tensor, "points size"], queries: Float[Tensor, "queries size"], k: int
) -> tuple[Float[Tensor, "queries k"], Int64[Tensor, "queries k"]]:
    """The k nearest points of each query, the nearest first.

    In the tens of dimensions and more that features have, no search tree looks at fewer points than all. For queries
    among points that are centred, as standardised ones are: where they lie far from the origin beside their distances,
    rounding chooses; `joint_nearest` is exact anywhere, and takes several times as long for a single query.

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


class Neighbours(NamedTuple):
    """What `joint_nearest` finds, in the order of the queries, the nearest first.

    Attributes:
        distance: of the k nearest.
        which: their numbers among the points; of several that are as far as the k-th, which ones is left open.
    """

    distance: Float[Tensor, "queries k"]
    which: Int64[Tensor, "queries k"]


@torch.no_grad()
def joint_nearest(
    states: Float[Tensor, "queries size"],
    values: Float[Tensor, " queries"] | None,
    k: int,
    *,
    reference: tuple[Float[Tensor, "points size"], Float[Tensor, " points"] | None] | None = None,
    route: Literal["auto", "all", "window"] = "auto",
) -> Neighbours:
    r"""The k nearest of many points that have a state and a value, where a neighbour must be near in both.

    $$D_{ij} = \max(\lVert s_i - s_j \rVert_2,\ \lvert v_i - v_j \rvert)$$

    Exact: candidates come from one matrix product for each block of queries and are measured anew from their
    differences; a row for which rounding could have hidden a nearer point is searched again without the product.
    Duplicates of a point are its neighbours, at a distance of exactly 0; a point is none of its own. Memory is linear
    in the number of points.

    Args:
        states: of the queries; half precision is computed as float32.
        values: one number for each query, or None, for which only states count.
        k: how many neighbours, fewer than there are points to choose from.
        reference: the points, with their own values; by default the queries are the points.
        route: which points are looked at. "window" sorts by value and looks only where the values are near enough,
            which pays when states lie close together beside the spread of values; "auto" tries a few queries first.

    Raises:
        ConfigError: k or the route does not fit, shapes do not, or only one side has values.
        DataError: a number is not finite.

    Example:
        >>> near = joint_nearest(torch.tensor([[0.0], [0.1], [0.2]]), torch.tensor([0.0, 5.0, 1.0]), 1)
        >>> near.distance[:, 0].tolist(), near.which[:, 0].tolist()
        ([1.0, 4.0, 1.0], [2, 2, 0])

    Source: the distance, Kraskov et al., "Estimating mutual information" (2004), section II.
    """
    if route not in ("auto", "all", "window"):
        raise ConfigError("route", expected="auto, all or window", got=repr(route), fix="choose one of them")
    own = reference is None
    valued = values is not None
    if reference is not None and (reference[1] is not None) != valued:
        expected, got = "values on both sides or on none", "them on one"
        raise ConfigError("reference", expected=expected, got=got, fix="give its states with their own values")
    states, values = _checked("states", states, values)
    points, of_points = (states, values) if reference is None else _checked("reference", *reference)
    if states.shape[1] != points.shape[1]:
        expected, got = f"states of {states.shape[1]} numbers", f"{points.shape[1]}"
        raise ConfigError("reference", expected=expected, got=got, fix="encode both sides alike")
    most = len(points) - own
    if not 1 <= k <= most:
        expected = f"1 to {most} of {len(points)} points" if most > 0 else "2 points or more"
        raise ConfigError("k", expected=expected, got=f"k = {k} of {len(points)}",
                          fix="choose fewer neighbours or give more points")  # fmt: skip
    itself = torch.arange(len(states), device=states.device) if own else states.new_full((len(states),), -1).long()
    # Under autocast the product would be one of half precision.
    with torch.autocast(states.device.type, enabled=False):
        queries, search = _Queries(states, values, itself), _Search(points, of_points, k)
        windows = valued and (route == "window" or (route == "auto" and _is_narrow(queries, search)))
        return (_by_value if windows else _in_blocks)(queries, search)


def _checked(name: str, states: Tensor, values: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both in the numbers of the computation; values of shape (n, 1) are accepted, and none are all alike."""
    if states.ndim != 2 or not states.shape[1]:
        got, fix = f"shape {tuple(states.shape)}", "flatten each state to one row"
        raise ConfigError(name, expected="shape (points, size)", got=got, fix=fix)
    if values is not None and values.shape not in ((len(states),), (len(states), 1)):
        got, fix = f"shape {tuple(values.shape)}", "give one value for each state"
        raise ConfigError(f"values of {name}", expected=f"shape ({len(states)},)", got=got, fix=fix)
    states = states.to(torch.float64 if states.dtype == torch.float64 else torch.float32).contiguous()
    values = states.new_zeros(len(states)) if values is None else values.reshape(-1).to(states).contiguous()
    for what, tensor in ((name, states), (f"values of {name}", values)):
        finite = tensor.isfinite()
        if not finite.all():
            wrong = (~finite).nonzero()
            got = f"{len(wrong)} that are not, first at row {int(wrong[0, 0])}"
            raise DataError(what, expected="finite numbers", got=got, fix="look for what diverged before this step")
    return states, values


class _Queries(NamedTuple):
    """Whose neighbours are wanted; `itself` is a query's number among the points, -1 where it is none of them."""

    states: Tensor
    values: Tensor
    itself: Tensor

    def take(self, rows: slice | Tensor) -> _Queries:
        return _Queries(self.states[rows], self.values[rows], self.itself[rows])


class _Search:
    """Points in a form in which a slice of them is measured against a block of queries by one product.

    Columns of a slice are taken in groups of `_GROUP`, whose minima are searched first: the k smallest numbers lie in
    the k groups with the smallest minima. For this the points are padded to whole groups.
    """

    def __init__(self, points: Tensor, values: Tensor, k: int) -> None:
        self.points, self.values, self.k = points, values, k
        # About their mean, coordinates are small, and so is what the product rounds off.
        self.mean = points.mean(0)
        p = points - self.mean
        # Rows (p, 1, |p|^2), so that (-2q, |q|^2, 1) times one is |q - p|^2; padding is infinitely far.
        self.right = p.new_zeros(-(-len(p) // _GROUP) * _GROUP, p.shape[1] + 2)
        self.right[:, -2], self.right[:, -1] = 1, torch.inf
        self.right[: len(p), :-2], self.right[: len(p), -1] = p, p.square().sum(1)

    def nearest(self, queries: _Queries, low: int = 0, high: int | None = None) -> Neighbours:
        """The nearest of a block of queries among the points from `low` to `high`, or a few more."""
        low = max(0, low) // _GROUP * _GROUP
        high = min(len(self.right), -(-(len(self.points) if high is None else high) // _GROUP) * _GROUP)
        points = slice(low, min(high, len(self.points)))
        count, size = points.stop - points.start, self.points.shape[1]
        if size <= 2 or count <= max(_FEW, self.k + _MORE):
            return self._plainly(queries, points)
        states, values, itself = queries
        q = states - self.mean
        norm = q.square().sum(1, keepdim=True)
        tile = torch.cat([-2 * q, norm, torch.ones_like(norm)], 1) @ self.right[low:high].T
        apart = values[:, None] - self.values[points]
        torch.maximum(tile[:, :count], apart.square_(), out=tile[:, :count])
        _leave_out(tile, itself, low)
        square, which = _smallest(tile, self.k + _MORE)
        distance = self._measured(queries, points, which.clamp(max=count - 1)).masked_fill(
            square == torch.inf, torch.inf
        )
        distance, best = distance.topk(self.k, dim=1, largest=False)
        index = which.gather(1, best) + low
        # A point that is no candidate is nearer than the k-th only if the product was wrong by more than the rounding
        # of |q - p|^2 allows; of a p beyond |q| + r it need not be asked, for its distance exceeds r.
        radius = distance[:, -1]
        slack = (size + 8) * _rounding(states) * (2 * norm[:, 0].sqrt() + radius).square()
        doubtful = ((radius > 0) & (radius.square() > square[:, -1] - slack)).nonzero()[:, 0]
        if len(doubtful):
            distance[doubtful], index[doubtful] = self._plainly(queries.take(doubtful), points)
        return Neighbours(distance, index)

    def _measured(self, queries: _Queries, points: slice, which: Tensor) -> Tensor:
        """Distances from the differences."""
        apart = (self.points[points][which] - queries.states[:, None]).square().sum(2).sqrt()
        return torch.maximum(apart, (self.values[points][which] - queries.values[:, None]).abs())

    def _plainly(self, queries: _Queries, points: slice) -> Neighbours:
        """The nearest from the differences of all pairs."""
        tile = torch.cdist(queries.states, self.points[points], compute_mode="donot_use_mm_for_euclid_dist")
        tile = torch.maximum(tile, (queries.values[:, None] - self.values[points]).abs_())
        _leave_out(tile, queries.itself, points.start)
        distance, index = _smallest(tile, self.k)
        return Neighbours(distance, index + points.start)


def _rounding(states: Tensor) -> float:
    """By how much a product of such numbers may be off, relative to its terms."""
    kind = states.dtype
    if kind == torch.float32:
        try:
            kind = _ROUNDED[torch.get_float32_matmul_precision()]
        except RuntimeError:  # PyTorch does not tell what was set for one kind of device alone
            kind = _ROUNDED["medium"]
    return float(torch.finfo(kind).eps)


def _in_blocks(queries: _Queries, search: _Search) -> Neighbours:
    """Among all points."""
    shape = len(queries.states), search.k
    found = Neighbours(queries.states.new_empty(shape), queries.itself.new_empty(shape))
    for rows in _rows(len(queries.states), len(search.points)):
        # Nothing of a block is kept, for small tensors between large ones that come and go would scatter the memory.
        found.distance[rows], found.which[rows] = search.nearest(queries.take(rows))
    return found


def _by_value(queries: _Queries, search: _Search) -> Neighbours:
    """Queries and points in the order of their values: a first look around, then as far as its radii reach."""
    order, turn = search.values.argsort(), queries.values.argsort()
    ordered = _Search(search.points[order], search.values[order], search.k)
    # Where each point has gone; the last entry is for queries that are none of the points.
    place = order.new_full((len(order) + 1,), -1)
    place[order] = torch.arange(len(order), device=order.device)
    found = Neighbours(queries.states.new_empty(len(turn), search.k), order.new_empty(len(turn), search.k))
    around = 2 * _ROWS + search.k
    for rows in _rows(len(turn), len(order)):
        block = queries.take(turn[rows])
        block = block._replace(itself=place[block.itself])
        low, high = torch.searchsorted(ordered.values, block.values[[0, -1]]).tolist()
        reach = ordered.nearest(block, low - around, high + around).distance[:, -1]
        # A hair more than the radius, against rounding.
        edges = torch.stack([(block.values - reach).min(), (block.values + reach).max()])
        hair = 4 * torch.finfo(edges.dtype).eps * (edges.abs().max() + 1)
        low = int(torch.searchsorted(ordered.values, edges[0] - hair))
        high = int(torch.searchsorted(ordered.values, edges[1] + hair, right=True))
        near = ordered.nearest(block, low, high)
        found.distance[turn[rows]], found.which[turn[rows]] = near.distance, order[near.which]
    return found


def _is_narrow(queries: _Queries, search: _Search) -> bool:
    """Whether windows of values would hold less than half of the points, judged by some of the queries."""
    count = len(search.points)
    if min(count, len(queries.states)) < _MANY:
        return False
    some = queries.take(torch.linspace(0, len(queries.states) - 1, _ROWS, device=search.mean.device).long())
    # A window is as wide as the widest radius of a block, of which the larger ones of a few tell.
    radius = search.nearest(some).distance[:, -1].quantile(0.98).expand(_ROWS)
    inside = count_values_within(some.values, radius, reference=search.values)
    return float(inside.double().mean()) + 5 * _ROWS < 0.5 * count


def _rows(count: int, points: int) -> list[slice]:
    """Blocks of queries, each to be measured against so many points."""
    size = max(1, min(_ROWS, _TILE // points))
    return [slice(start, start + size) for start in range(0, count, size)]


def _leave_out(tile: Tensor, itself: Tensor, low: int) -> None:
    """No point is its own neighbour."""
    inside = ((itself >= low) & (itself < low + tile.shape[1])).nonzero()[:, 0]
    tile[inside, itself[inside] - low] = torch.inf


def _smallest(tile: Float[Tensor, "rows columns"], k: int) -> tuple[Tensor, Tensor]:
    """The k smallest numbers of each row in order, and their columns."""
    groups = tile.shape[1] // _GROUP
    if tile.shape[1] % _GROUP or groups < 4 * k:
        smallest = tile.topk(k, dim=1, largest=False)
        return smallest.values, smallest.indices
    # A group's columns are a stride apart, for then its minimum is taken along whole rows of the memory.
    least = tile.view(len(tile), _GROUP, groups).amin(1).topk(k, dim=1, largest=False, sorted=False).indices
    offsets = torch.arange(0, tile.shape[1], groups, device=tile.device)
    columns = (least[:, None] + offsets[:, None]).flatten(1)
    smallest = tile.gather(1, columns).topk(k, dim=1, largest=False)
    return smallest.values, columns.gather(1, smallest.indices)


@torch.no_grad()
def count_values_within(
    values: Float[Tensor, " queries"],
    radius: Float[Tensor, " queries"],
    *,
    reference: Float[Tensor, " points"] | None = None,
) -> Int64[Tensor, " queries"]:
    """How many other values lie nearer than a radius, strictly, by one sort.

    A distance that equals the radius but for rounding is not nearer.

    Args:
        values: of the queries.
        radius: of each, 0 or more.
        reference: the values that are counted; by default the others of the queries.

    Example:
        >>> count_values_within(torch.tensor([0.0, 1.0, 3.0]), torch.tensor([1.0, 2.5, 2.0])).tolist()
        [0, 2, 0]
    """
    v, reach = values.double(), _strictly(radius).double()
    ordered = (values if reference is None else reference).double().sort().values
    # In float64 a float32 and its distance add up without rounding, unless the distance is nothing beside the value:
    # then equal values, and those alone, lie within.
    up, down = (torch.nextafter(v, torch.full_like(v, end)) for end in (torch.inf, -torch.inf))
    high, low = torch.maximum(v + reach, up), torch.minimum(v - reach, down)
    inside = torch.searchsorted(ordered, high) - torch.searchsorted(ordered, low, right=True)
    return (inside - int(reference is None)) * (reach > 0)


@torch.no_grad()
def count_states_within(
    states: Float[Tensor, "queries size"], radius: Float[Tensor, " queries"]
) -> Int64[Tensor, " queries"]:
    """How many other states lie nearer than a radius, strictly, in Euclidean distance, block by block.

    Example:
        >>> count_states_within(torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([1.0, 2.5, 2.0])).tolist()
        [0, 2, 0]
    """
    counts = []
    for rows in _rows(len(states), len(states)):
        apart = torch.cdist(states[rows], states, compute_mode="donot_use_mm_for_euclid_dist")
        reach = _strictly(radius[rows])
        counts.append((apart < reach[:, None]).sum(1) - (reach > 0).long())
    return torch.cat(counts)


def _strictly(radius: Tensor) -> Tensor:
    """A little less, so that the neighbour that gave a radius is not counted within it for its last digit."""
    return radius * (1 - 8 * torch.finfo(radius.dtype).eps)
