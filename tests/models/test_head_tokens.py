"""The likeliest token and samples of the chunked vocabulary head, without its logits."""

from typing import Any

import pytest
import torch
from torch import Tensor

from offbook.errors import OffbookError
from offbook.models.blockwise.head import argmax, sample


def test_argmax_is_that_of_full_logits() -> None:
    g = torch.Generator().manual_seed(6)
    hidden, weight, bias = (torch.randn(*shape, generator=g) for shape in ((3, 7, 5), (40, 5), (40,)))
    right = (hidden @ weight.T + bias).argmax(-1)
    assert all(torch.equal(argmax(hidden, weight, bias=bias, chunk=chunk), right) for chunk in (1, 4, 100, None))
    assert not torch.equal(argmax(hidden, weight), right)


def test_samples_have_the_probabilities_asked_for() -> None:
    n = 20_000
    weight = torch.tensor([0.5, 0.25, 0.15, 0.1, 0.0]).log().unsqueeze(1)
    weight[4] = -1e30  # never
    hidden = torch.ones(n, 1)

    def shares(**settings: Any) -> list[float]:
        drawn = sample(hidden, weight, generator=torch.Generator().manual_seed(7), **settings)
        return (torch.bincount(drawn, minlength=5) / n).tolist()

    def near(*right: float) -> Any:
        return pytest.approx(right, abs=0.015)  # four standard deviations

    assert shares() == near(0.5, 0.25, 0.15, 0.1, 0.0)
    assert shares()[4] == shares(top_p=1.0)[4] == 0
    assert shares(top_k=2) == near(2 / 3, 1 / 3, 0, 0, 0)
    assert shares(top_k=1) == [1, 0, 0, 0, 0]
    assert shares(top_k=99) == shares(top_k=5) == near(0.5, 0.25, 0.15, 0.1, 0.0)
    assert shares(top_p=0.7) == near(2 / 3, 1 / 3, 0, 0, 0)
    assert shares(top_p=0.8) == near(0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0, 0)
    assert shares(top_p=1e-6) == [1, 0, 0, 0, 0]
    assert shares(top_k=2, top_p=0.6) == [1, 0, 0, 0, 0]  # two thirds is enough, after the others are gone
    squares = 0.25 + 0.0625 + 0.0225 + 0.01
    assert shares(temperature=0.5) == near(0.25 / squares, 0.0625 / squares, 0.0225 / squares, 0.01 / squares, 0)
    assert shares(temperature=1e-4) == [1, 0, 0, 0, 0]
    cap = (0.5 * torch.tanh(weight[:, 0] / 0.5)).softmax(0).tolist()
    assert shares(softcap=0.5) == near(*cap)


def test_samples_depend_on_the_generator_and_not_on_the_chunk() -> None:
    hidden, weight = torch.randn(4, 9, 6), torch.randn(50, 6)

    def drawn(seed: int, chunk: int | None) -> Tensor:
        return sample(hidden, weight, top_p=0.9, generator=torch.Generator().manual_seed(seed), chunk=chunk)

    assert drawn(0, None).shape == (4, 9)
    assert all(torch.equal(drawn(0, None), drawn(0, chunk)) for chunk in (1, 5, 36))
    assert not torch.equal(drawn(0, None), drawn(1, None))


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 1.0}])
def test_a_draw_rounded_to_one_is_still_a_possible_token(monkeypatch: pytest.MonkeyPatch, settings: Any) -> None:
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.ones(shape))
    weight = torch.tensor([[0.0], [0.0], [-1e30]])
    assert sample(torch.ones(2, 1), weight, **settings).tolist() == [1, 1]


def test_a_row_of_nan_cannot_be_sampled() -> None:
    hidden = torch.zeros(5, 2)
    hidden[3, 1] = torch.nan
    with pytest.raises(OffbookError, match=r"^row 3 of hidden: expected finite logits, got NaN or infinity; look for"):
        sample(hidden, torch.ones(4, 2), chunk=2)
