"""The nearest points, beside brute force."""

import numpy as np
import pytest
import torch
from scipy.spatial import KDTree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from offbook.errors import ConfigError, DataError
from offbook.models import knn


@pytest.mark.parametrize("block", [7, 1000])
def test_they_are_those_of_a_search_tree(monkeypatch, block):
    monkeypatch.setattr(knn, "_BLOCK", block)
    rng = torch.Generator().manual_seed(0)
    # Far from the origin and close together, where products of single precision say little.
    points, queries = torch.randn(200, 6, generator=rng) + 30, torch.randn(9, 6, generator=rng) + 30
    distance, which = knn.nearest(points, queries, 12)
    wanted, numbers = KDTree(points.double().numpy()).query(queries.double().numpy(), 12)
    np.testing.assert_allclose(distance, wanted, rtol=1e-4)
    assert (which.numpy() == numbers).mean() > 0.97  # but for the order of those that are as near
    assert (distance.diff(dim=1) >= 0).all()


def clouds():
    """States and values of every kind that has gone wrong somewhere, as float32."""
    rng = np.random.default_rng(0)
    prototypes = rng.normal(size=(40, 16))
    clusters = rng.normal(size=(9, 16)) * 1_000
    far = rng.normal(size=(600, 16))
    far[:5] *= 1e5
    made = {
        "two": (rng.normal(size=(2, 3)), rng.normal(size=2)),
        "few": (rng.normal(size=(40, 7)), rng.normal(size=40)),
        "line": (rng.normal(size=(700, 1)), rng.normal(size=700)),
        "many": (rng.normal(size=(1_500, 24)) * 0.3, rng.normal(size=1_500)),
        "duplicates": (prototypes[rng.integers(40, size=700)], rng.integers(3, size=700)),
        "clusters": (clusters[rng.integers(9, size=700)] + 1e-2 * rng.normal(size=(700, 16)), rng.normal(size=700)),
        "outliers": (far, rng.normal(size=600)),
        "away": (rng.normal(size=(600, 16)) + 3e4, rng.normal(size=600)),
        "tight": (rng.normal(size=(4_096, 8)) * 0.02, rng.normal(size=4_096)),
        "same value": (rng.normal(size=(500, 5)), np.ones(500)),
    }
    return {name: (torch.tensor(s, dtype=torch.float32), torch.tensor(v).float()) for name, (s, v) in made.items()}


def oracle(states, values, k):
    """Distances of the k nearest others, from all differences in float64."""
    s, v = states.double().numpy(), values.double().numpy()
    apart = np.stack([np.sqrt(np.square(s - one).sum(1)) for one in s])
    apart = np.maximum(apart, np.abs(v[:, None] - v))
    np.fill_diagonal(apart, np.inf)
    return np.sort(apart, axis=1)[:, :k], apart


@pytest.mark.parametrize("route", ["all", "window"])
@pytest.mark.parametrize("name", clouds())
def test_joint_distances_are_those_of_all_pairs(name, route):
    states, values = clouds()[name]
    k = min(5, len(states) - 1)
    wanted, apart = oracle(states, values, k)
    found = knn.joint_nearest(states, values, k, route=route)
    np.testing.assert_allclose(found.distance, wanted, rtol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(apart, found.which.numpy(), 1), wanted, rtol=1e-6)
    assert all(len(set(row)) == k for row in found.which.tolist())


def test_a_product_that_rounds_too_much_hides_nothing(monkeypatch):
    """Close together and far apart at once, the product alone gets many of the neighbours wrong."""
    states, values = clouds()["clusters"]
    wanted, _ = oracle(states, values, 5)
    asked = []
    plainly = knn._Search._plainly
    monkeypatch.setattr(knn._Search, "_plainly", lambda *given: asked.append(len(given[1].states)) or plainly(*given))
    np.testing.assert_allclose(knn.joint_nearest(states, values, 5, route="all").distance, wanted, rtol=1e-6)
    assert sum(asked) > 350
    s = states - states.mean(0)
    product = (s.square().sum(1)[:, None] - 2 * s @ s.T + s.square().sum(1)).clamp(min=0).sqrt()
    wrong = torch.maximum(product, (values[:, None] - values).abs()).fill_diagonal_(torch.inf).topk(5, largest=False)
    assert (~np.isclose(wrong.values, wanted, rtol=1e-3)).mean() > 0.3


def test_duplicates_are_at_no_distance_at_all():
    rng = torch.Generator().manual_seed(0)
    states = torch.randn(40, 64, generator=rng)[torch.arange(512) % 40] * 10
    found = knn.joint_nearest(states, torch.zeros(512), 3)
    assert (found.distance == 0).all()
    assert (found.which != torch.arange(512)[:, None]).all()


def test_without_values_and_with_other_points():
    rng = torch.Generator().manual_seed(0)
    points, queries = torch.randn(900, 6, generator=rng), torch.randn(70, 6, generator=rng)
    wanted, numbers = KDTree(points.double().numpy()).query(queries.double().numpy(), 4)
    found = knn.joint_nearest(queries, None, 4, reference=(points, None))
    np.testing.assert_allclose(found.distance, wanted, rtol=1e-6)
    assert (found.which.numpy() == numbers).all()
    valued = knn.joint_nearest(queries, torch.zeros(70, 1), 4, reference=(points, torch.full((900,), 9.0)))
    assert (valued.distance == 9).all()
    half = knn.joint_nearest(points.half(), None, 2).distance
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, knn.joint_nearest(points.half().float(), None, 2).distance)


@pytest.mark.parametrize("route", ["all", "window"])
def test_other_points_with_values_by_either_route(route):
    rng = torch.Generator().manual_seed(0)
    points, queries = 0.1 * torch.randn(900, 6, generator=rng), 0.1 * torch.randn(70, 6, generator=rng)
    of_points, of_queries = torch.randn(900, generator=rng), torch.randn(70, generator=rng)
    apart = np.linalg.norm(queries.double().numpy()[:, None] - points.double().numpy(), axis=2)
    apart = np.maximum(apart, abs(of_queries.double().numpy()[:, None] - of_points.double().numpy()))
    found = knn.joint_nearest(queries, of_queries, 4, reference=(points, of_points), route=route)
    np.testing.assert_allclose(found.distance, np.sort(apart, 1)[:, :4], rtol=1e-6)
    np.testing.assert_array_equal(found.which, np.argsort(apart, 1)[:, :4])


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(one.numel() for one in tree_leaves(made) if isinstance(one, torch.Tensor))])
        return made


@pytest.mark.parametrize("route", ["all", "window"])
def test_memory_is_linear_in_the_points(route):
    rng = torch.Generator().manual_seed(0)
    states, values = 0.02 * torch.randn(8_192, 16, generator=rng), torch.randn(8_192, generator=rng)
    with Largest() as seen:
        knn.joint_nearest(states, values, 5, route=route)
    assert seen.numbers <= max(knn._TILE, 32 * 8_192) < 8_192**2 / 8


@pytest.mark.gpu
@pytest.mark.parametrize("route", ["all", "window"])
def test_a_gpu_finds_the_same(route):
    rng = torch.Generator().manual_seed(0)
    states, values = 0.1 * torch.randn(5_000, 32, generator=rng), torch.randn(5_000, generator=rng)
    wanted = knn.joint_nearest(states, values, 5, route=route)
    found = knn.joint_nearest(states.cuda(), values.cuda(), 5, route=route)
    torch.testing.assert_close(found.distance.cpu(), wanted.distance, rtol=1e-5, atol=1e-6)


def test_windows_are_chosen_where_they_pay(monkeypatch):
    chosen = []
    by_value = knn._by_value
    monkeypatch.setattr(knn, "_by_value", lambda *given: chosen.append(len(given[0].states)) or by_value(*given))
    rng = torch.Generator().manual_seed(0)
    states, values = torch.randn(3_000, 16, generator=rng), torch.randn(3_000, generator=rng)
    for scale, count in ((0.02, 3_000), (1.0, 3_000), (0.02, 500)):
        knn.joint_nearest(states[:count] * scale, values[:count], 5)
    knn.joint_nearest(states * 0.02, None, 5)
    assert chosen == [3_000]


@pytest.mark.parametrize("name", clouds())
def test_counts_are_strict(name):
    states, values = clouds()[name]
    radius = knn.joint_nearest(states, values, 1).distance[:, 0]
    s, v, reach = states.double(), values.double(), radius.double()[:, None] * (1 - 1e-6)
    apart = (v[:, None] - v).abs().fill_diagonal_(torch.inf)
    assert (knn.count_values_within(values, radius) == (apart < reach).sum(1)).all()
    apart = torch.stack([(s - one).norm(dim=1) for one in s]).fill_diagonal_(torch.inf)
    assert (knn.count_states_within(states, radius) == (apart < reach).sum(1)).all()


def test_a_radius_that_is_nothing_beside_the_values_holds_those_that_are_equal():
    values = torch.tensor([1.0, 1.0, 1.0, 2.0, 0.0, 1e-18])
    assert knn.count_values_within(values, torch.full((6,), 1e-18)).tolist() == [2, 2, 2, 0, 0, 0]
    assert knn.count_values_within(values, torch.zeros(6)).tolist() == [0] * 6
    assert knn.count_values_within(values[2:4], torch.full((2,), 1e-18), reference=values).tolist() == [3, 1]


def test_it_is_exact_where_products_are_rounded_more():
    rng = torch.Generator().manual_seed(0)
    states = torch.randn(3_000, 64, generator=rng) * 20 * torch.rand(3_000, 1, generator=rng)
    wanted = knn.joint_nearest(states, None, 5).distance
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(knn.joint_nearest(states, None, 5).distance, wanted)
    assert knn._rounding(states) == 2.0**-23
    try:
        for precision, digits in (("high", 10), ("medium", 7)):
            torch.set_float32_matmul_precision(precision)
            assert knn._rounding(states) == 2.0**-digits
            assert knn._rounding(states.double()) == 2.0**-52
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"k": 9}, ConfigError, "k: expected 1 to 8 of 9 points, got k = 9"),
        ({"k": 0}, ConfigError, "got k = 0"),
        ({"route": "windows"}, ConfigError, "route: expected auto, all or window, got 'windows'"),
        ({"states": torch.zeros(1, 2), "values": torch.zeros(1)}, ConfigError, "expected 2 points or more"),
        ({"states": torch.zeros(9)}, ConfigError, r"states: expected shape \(points, size\)"),
        ({"values": torch.zeros(9, 9)}, ConfigError, r"values of states: expected shape \(9,\), got shape \(9, 9\)"),
        ({"states": torch.tensor([[0.0], [torch.nan]] * 9)[:9]}, DataError, "4 that are not, first at row 1"),
        ({"values": torch.full((9,), torch.inf)}, DataError, "values of states: expected finite"),
        ({"reference": (torch.zeros(9, 2), None)}, ConfigError, "with their own values"),
        ({"reference": (torch.zeros(9, 3), torch.zeros(9))}, ConfigError, "states of 2 numbers, got 3"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(change, kind, words):
    given = {"states": torch.zeros(9, 2), "values": torch.zeros(9), "k": 3, **change}
    with pytest.raises(kind, match=words):
        knn.joint_nearest(given.pop("states"), given.pop("values"), given.pop("k"), **given)
