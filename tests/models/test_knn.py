"""The nearest points, beside brute force."""

import numpy as np
import pytest
import torch
from scipy.spatial import KDTree

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
