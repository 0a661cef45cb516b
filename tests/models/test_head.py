"""The chunked vocabulary head against the plain formula on full logits."""

import itertools
import random
import re
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from offbook.errors import ConfigError
from offbook.models.blockwise.head import argmax, linear_cross_entropy, sample, token_logprobs


def plain(hidden, weight, targets, *, bias=None, ignore_index=-100, weights=None, reduction="mean", label_smoothing=0.0,
          z_loss=0.0, softcap=None):  # fmt: skip
    """The same by full logits, log_softmax and autograd."""
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logprobs = logits.log_softmax(-1)
    counted = targets != ignore_index
    nll = -logprobs.gather(-1, targets.where(counted, 0).unsqueeze(-1)).squeeze(-1)
    losses = (1 - label_smoothing) * nll - label_smoothing * logprobs.mean(-1) + z_loss * logits.logsumexp(-1) ** 2
    share = counted.to(losses) * (1 if weights is None else weights)
    losses = torch.where(counted, losses, 0.0) * share
    if reduction == "none":
        return losses
    return losses.sum() / share.sum() if reduction == "mean" else losses.sum()


def drawn_case(seed: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor, dict[str, Any], int]:
    """Tensors that want gradients, targets, settings and a chunk, all drawn from the seed."""
    draw, g = random.Random(seed), torch.Generator().manual_seed(seed)
    batch = draw.choice([(1,), (7,), (13,), (2, 9), (3, 1), (2, 3, 4)])
    # The only token has no gradient, of which float32 shows the rounding alone.
    width, vocabulary = draw.randint(1, 12), draw.randint(1 if dtype == torch.float64 else 2, 40)
    n = torch.Size(batch).numel()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    tensors = {"hidden": normal(*batch, width), "weight": normal(vocabulary, width)}
    if draw.random() < 0.5:
        tensors["bias"] = normal(vocabulary)
    ignore_index = draw.choice([-100, -1, 0]) if vocabulary > 1 else -100
    targets = torch.randint(vocabulary, batch, generator=g)
    # The ignored stand together, so that chunks are unevenly full, and some are empty.
    flat = targets.view(-1)
    flat[: draw.randint(0, n - 1)] = ignore_index
    flat[-1] = vocabulary - 1
    settings: dict[str, Any] = {
        "ignore_index": ignore_index,
        "reduction": draw.choice(["mean", "sum", "none"]),
        "label_smoothing": draw.choice([0.0, 0.0, 0.1]),
        "z_loss": draw.choice([0.0, 0.0, 1e-2]),
        "softcap": draw.choice([None, None, 1.5]),
    }
    if draw.random() < 0.5:
        settings["weights"] = torch.rand(batch, generator=g, dtype=torch.float64).to(dtype)
        settings["weights"].view(-1)[0] = 0.0 if n > 1 else 1.0
    return tensors, targets, settings, draw.randint(1, n + 3)


def worst(ours: Tensor, right: Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    assert ours.shape == right.shape
    ours, right = ours.detach().double(), right.detach().double()
    return float((ours - right).abs().max() / right.abs().max().clamp_min(1e-3))


def upstream(loss: Tensor) -> Tensor:
    return torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).view_as(loss)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-11), (torch.float32, 2e-6)])
def test_loss_and_gradients_are_those_of_full_logits(dtype: torch.dtype, bound: float) -> None:
    for seed in range(100):
        tensors, targets, settings, chunk = drawn_case(seed, dtype)
        names, leaves = list(tensors), list(tensors.values())
        loss = linear_cross_entropy(**tensors, targets=targets, chunk=chunk, **settings)
        assert loss.dtype == dtype
        gradients = torch.autograd.grad(loss, leaves, upstream(loss))
        narrow = plain(**tensors, targets=targets, **settings)
        narrow_gradients = torch.autograd.grad(narrow, leaves, upstream(narrow))
        if "weights" in settings:
            settings["weights"] = settings["weights"].double()
        exact = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
        right = plain(**exact, targets=targets, **settings)
        right_gradients = torch.autograd.grad(right, list(exact.values()), upstream(right))
        results = zip(
            ["loss", *names], (loss, *gradients), (narrow, *narrow_gradients), (right, *right_gradients), strict=True
        )
        for name, ours, formula, truth in results:
            assert ours.dtype == dtype
            # A saturated softcap cancels digits in the plain formula too; it is then the measure.
            capped = 1.5 * worst(formula, truth) if settings.get("softcap") else 0.0
            assert worst(ours, truth) <= max(bound, capped), (seed, name, settings)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_only_where_it_is_stored(half: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 16, generator=g).to(half).requires_grad_()
    weight = torch.randn(300, 16, generator=g).to(half).requires_grad_()
    targets = torch.randint(300, (40,), generator=g)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    right = plain(*exact, targets)
    right.backward()
    for reduction in ("mean", "none"):
        loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction, chunk=7).mean()
        assert loss.dtype == torch.float32
        assert worst(loss, right) <= 2e-6
        gradients = torch.autograd.grad(loss, (hidden, weight))
        for ours, leaf in zip(gradients, exact, strict=True):
            assert ours.dtype == half
            assert worst(ours, leaf.grad) <= torch.finfo(half).eps
    mixed = linear_cross_entropy(hidden, weight.detach().float(), targets)
    assert worst(mixed, right) <= 2e-6


def test_a_loss_scale_saves_the_small_gradients_of_float16() -> None:
    hidden = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).half().requires_grad_()
    weight, targets = torch.full((4096, 8), 1e-3).half(), torch.arange(64)
    weight[:, 0] += torch.linspace(-1e-3, 1e-3, 4096).half()
    scale = 65536.0
    (linear_cross_entropy(hidden, weight, targets) * scale).backward()
    exact = hidden.detach().double().requires_grad_()
    (plain(exact, weight.double(), targets) * scale).backward()
    assert worst(hidden.grad, exact.grad) <= 1e-3


def test_a_mean_counts_tokens_and_not_chunks() -> None:
    # Losses log 2 for four tokens of the first chunk and about 10 for the one of the second: their mean is over five.
    hidden = torch.tensor([[0.0]] * 4 + [[10.0]] + [[0.0]] * 3)
    targets = torch.tensor([0, 0, 0, 0, 1, -100, -100, -100])
    weight = torch.tensor([[1.0], [0.0]])
    loss = linear_cross_entropy(hidden, weight, targets, chunk=4)
    assert loss.item() == pytest.approx((4 * 0.6931472 + 10.0000454) / 5, rel=1e-6)
    per_token = linear_cross_entropy(hidden, weight, targets, chunk=4, reduction="none")
    assert per_token[5:].tolist() == [0, 0, 0]
    weights = torch.tensor([1.0, 0.0, 0.0, 0.0, 3.0, 5.0, 5.0, 5.0])
    assert linear_cross_entropy(hidden, weight, targets, chunk=4, weights=weights).item() == pytest.approx(
        (0.6931472 + 3 * 10.0000454) / 4, rel=1e-6
    )


def test_huge_logits_neither_overflow_nor_cancel() -> None:
    hidden = torch.tensor([[3e4], [-3e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [1.0001], [-1.0]])
    targets = torch.tensor([0, 2])
    loss = linear_cross_entropy(hidden, weight, targets, reduction="none")
    right = plain(hidden.detach().double(), weight.double(), targets, reduction="none")
    assert torch.allclose(loss.double(), right, atol=2e-3)  # float32 logits of 3e4 are 2e-3 apart
    loss.sum().backward()
    assert hidden.grad.isfinite().all()


def test_a_forbidden_token_has_no_part() -> None:
    hidden, weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.eye(4)
    bias, targets = torch.tensor([0.0, -torch.inf, 0.0, 0.0]), torch.tensor([0, 2, 3])
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets, bias=bias)
    loss.backward()
    assert loss.item() == pytest.approx(cross_entropy(hidden[:, [0, 2, 3]], torch.tensor([0, 1, 2])).item(), rel=1e-6)
    assert weight.grad[1].tolist() == [0, 0, 0, 0]


def test_a_table_that_embeds_and_reads_out_gets_both_gradients() -> None:
    ids = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(1))
    table = torch.randn(11, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()

    def twice(head: Any) -> Tensor:
        hidden = table[ids].cumsum(1).tanh()
        return head(hidden[:, :-1], table, ids[:, 1:]) + head(hidden[:, :-2], table, ids[:, 2:], reduction="sum")

    ours, right = (torch.autograd.grad(twice(head), table)[0] for head in (linear_cross_entropy, plain))
    assert worst(ours, right) <= 1e-11


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_frozen_tensor_gets_no_gradient_and_leaves_the_others_right(reduction: str) -> None:
    g = torch.Generator().manual_seed(3)
    values = [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((9, 4), (12, 4), (12,))]
    targets = torch.randint(12, (9,), generator=g)
    for wanted in itertools.product([False, True], repeat=3):
        hidden, weight, bias = (value.clone().requires_grad_(on) for value, on in zip(values, wanted, strict=True))
        loss = linear_cross_entropy(hidden, weight, targets, bias=bias, reduction=reduction, chunk=4).sum()
        assert loss.requires_grad == any(wanted)
        right = plain(hidden, weight, targets, bias=bias, reduction=reduction).sum()
        leaves = [leaf for leaf in (hidden, weight, bias) if leaf.requires_grad]
        if leaves:
            for ours, theirs in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(right, leaves), strict=True):
                assert worst(ours, theirs) <= 1e-11


def test_finite_differences_agree() -> None:
    g = torch.Generator().manual_seed(4)
    leaves = [
        torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_() for shape in ((5, 3), (4, 3), (4,))
    ]
    targets = torch.tensor([0, 3, -100, 1, 1])

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor, reduction: str = "none") -> Tensor:
        settings: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 2.0, "chunk": 2}
        return linear_cross_entropy(hidden, weight, targets, bias=bias, reduction=reduction, **settings)

    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradcheck(lambda h, w, b: token_logprobs(h, w, targets.abs() % 4, bias=b, chunk=2), leaves)
    for reduction in ("mean", "sum"):  # which gradcheck would differentiate twice
        ways = [torch.randn(leaf.shape, generator=g, dtype=torch.float64) for leaf in leaves]
        with torch.no_grad():
            ahead, behind = (
                loss(*(leaf + h * way for leaf, way in zip(leaves, ways, strict=True)), reduction)
                for h in (1e-6, -1e-6)
            )
        gradients = torch.autograd.grad(loss(*leaves, reduction), leaves)
        slope = sum((gradient * way).sum() for gradient, way in zip(gradients, ways, strict=True))
        assert ((ahead - behind) / 2e-6).item() == pytest.approx(slope.item(), rel=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("how", ["ignored", "weightless"])
def test_what_does_not_count_leaks_nothing(reduction: str, how: str) -> None:
    hidden = torch.tensor([[1.0, 2.0], [torch.nan, torch.inf], [0.5, 0.0]], requires_grad=True)
    weight = torch.eye(2, requires_grad=True)
    targets = torch.tensor([0, -100 if how == "ignored" else 1, 1])
    weights = torch.tensor([1.0, 0.0, 1.0]) if how == "weightless" else None
    loss = linear_cross_entropy(hidden, weight, targets, weights=weights, reduction=reduction)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert hidden.grad[1].tolist() == [0, 0]
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()
    assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_no_target_that_counts_is_a_loss_of_zero_and_a_warning(reduction: str, n: int) -> None:
    hidden, weight = torch.randn(2, n, 3).requires_grad_(), torch.randn(7, 3).requires_grad_()
    with pytest.warns(UserWarning, match=r"^linear_cross_entropy: no target counts, the loss is 0$") as seen:
        loss = linear_cross_entropy(hidden, weight, torch.full((2, n), -100), reduction=reduction)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.shape == hidden.shape
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_no_tokens_are_no_losses() -> None:
    hidden, weight, targets = torch.zeros(2, 0, 3, requires_grad=True), torch.zeros(7, 3), torch.zeros(2, 0).long()
    for losses in (
        linear_cross_entropy(hidden, weight, targets, reduction="none"),
        token_logprobs(hidden, weight, targets),
    ):
        assert losses.shape == (2, 0)
        losses.sum().backward()
    assert argmax(hidden, weight).shape == sample(hidden, weight).shape == (2, 0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_refused(reduction: str) -> None:
    hidden, weight, targets = torch.randn(4, 3).requires_grad_(), torch.randn(5, 3), torch.arange(4)
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum()
    with pytest.raises(RuntimeError, match=r"no second derivative: call backward without create_graph=True, or use"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda h: linear_cross_entropy(h, weight, targets, reduction=reduction).sum())(hidden)


def test_a_second_backward_is_refused_by_a_total_and_allowed_by_the_losses() -> None:
    hidden, weight, targets = torch.randn(4, 3).requires_grad_(), torch.randn(5, 3), torch.arange(4)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    first = hidden.grad.clone()
    with pytest.raises(RuntimeError, match=r"took the gradients with it; call it once, or use reduction='none'"):
        loss.backward()
    assert torch.equal(hidden.grad, first)
    losses = linear_cross_entropy(hidden, weight, targets, reduction="none")
    again = [torch.autograd.grad(losses.mean(), hidden, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*again)
    assert torch.allclose(again[0], first, atol=1e-7)


def test_a_weight_changed_before_backward_is_noticed() -> None:
    hidden, weight = torch.randn(4, 3), torch.randn(5, 3).requires_grad_()
    losses = linear_cross_entropy(hidden, weight, torch.arange(4), reduction="none")
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


def test_autocast_changes_nothing_on_a_cpu() -> None:
    hidden, weight, targets = torch.randn(6, 8).requires_grad_(), torch.randn(9, 8).requires_grad_(), torch.arange(6)

    def everything() -> list[Tensor]:
        total = linear_cross_entropy(hidden, weight, targets)
        losses = linear_cross_entropy(hidden, weight, targets, reduction="none").sum()
        gradients = [torch.autograd.grad(loss, (hidden, weight)) for loss in (total, losses)]
        drawn = sample(hidden, weight, generator=torch.Generator().manual_seed(0))
        return [total, losses, *itertools.chain(*gradients), argmax(hidden, weight), drawn]

    outside = everything()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = everything()
    assert all(torch.equal(*pair) for pair in zip(inside, outside, strict=True))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that live at once, of those made inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        return out

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def test_full_logits_never_exist() -> None:
    n, width, vocabulary, chunk = 400, 8, 1000, 10
    hidden, weight = torch.randn(n, width).requires_grad_(), torch.randn(vocabulary, width).requires_grad_()
    targets = torch.randint(vocabulary, (n,))
    logits, of_chunk, gradients = 4 * n * vocabulary, 4 * chunk * vocabulary, 4 * width * (n + vocabulary)
    small = 24 * 8 * n  # targets, rows, scales, losses and the like

    def peak(head: Any, **settings: Any) -> int:
        hidden.grad = weight.grad = None
        with LiveBytes() as live:
            loss = head(hidden, weight, targets, **settings)
            if loss.requires_grad:
                loss.sum().backward()
        return live.peak

    assert peak(plain) >= 2 * logits  # what the bounds below would catch
    for softcap, copies in ((None, 1), (5.0, 2)):
        bound = copies * of_chunk + gradients + small
        assert bound < logits / 4
        for head, reduction in ((linear_cross_entropy, "mean"), (linear_cross_entropy, "none"), (token_logprobs, None)):
            settings = {"reduction": reduction} if reduction else {}
            assert peak(head, chunk=chunk, softcap=softcap, **settings) <= bound, (head, reduction, softcap)
    with torch.no_grad():  # and no gradients, where there is no backward to come
        assert peak(linear_cross_entropy, chunk=chunk) <= of_chunk + small
        assert peak(lambda h, w, _, **settings: argmax(h, w, **settings), chunk=chunk) <= of_chunk + small
    weight.requires_grad_(False)
    assert peak(linear_cross_entropy, chunk=chunk) <= of_chunk + 4 * width * n + small


def test_the_default_chunk_bounds_the_logits() -> None:
    rows, width, vocabulary = 300, 2, 1 << 16
    hidden, weight = torch.zeros(rows, width), torch.zeros(vocabulary, width)
    with LiveBytes() as live, torch.no_grad():
        linear_cross_entropy(hidden, weight, torch.zeros(rows).long())
    assert 16 << 20 <= live.peak < 40 << 20  # 64 rows are 16 MiB, all would be 75


GOOD: dict[str, Any] = {
    "hidden": torch.zeros(2, 3, 4),
    "weight": torch.zeros(5, 4),
    "targets": torch.zeros(2, 3).long(),
}
BAD = torch.tensor([[0, 1, 2], [3, -100, 40000]])
TABLE = "floats [vocabulary, 4] with at least one row on cpu"
MESSAGES = [
    ({"targets": BAD}, "targets[1, 2]: expected an id in 0..4, or -100 to ignore, got 40000; compare the vocabulary"),
    ({"targets": BAD.where(BAD < 5, -7)}, "targets[1, 2]: expected an id in 0..4, or -100 to ignore, got -7;"),
    (
        {"targets": BAD.where(BAD < 5, 0), "ignore_index": 1},
        "targets[1, 1]: expected an id in 0..4, or 1 to ignore, got",
    ),
    ({"targets": torch.zeros(6).long()}, "targets: expected int64 [2, 3] on cpu, got int64 [6] on cpu; reshape, cast"),
    ({"targets": torch.zeros(2, 3)}, "targets: expected int64 [2, 3] on cpu, got float32 [2, 3] on cpu;"),
    ({"hidden": torch.zeros(4)}, "hidden: expected floats [..., width] on cpu, got float32 [4] on cpu;"),
    ({"hidden": torch.zeros(2, 4).long()}, "hidden: expected floats [..., width] on cpu, got int64 [2, 4] on cpu;"),
    ({"weight": torch.zeros(4, 5)}, f"weight: expected {TABLE}, got float32 [4, 5] on cpu;"),
    ({"weight": torch.zeros(0, 4)}, f"weight: expected {TABLE}, got float32 [0, 4] on cpu;"),
    ({"weight": torch.zeros(5, 4, device="meta")}, f"weight: expected {TABLE}, got float32 [5, 4] on meta;"),
    ({"bias": torch.zeros(4)}, "bias: expected floats [5] on cpu, got float32 [4] on cpu;"),
    ({"weights": torch.ones(3)}, "weights: expected floats [2, 3] on cpu, got float32 [3] on cpu;"),
    ({"weights": torch.ones(2, 3).requires_grad_()}, "weights.requires_grad: expected False, got True; detach them"),
    ({"weights": torch.full((2, 3), torch.nan)}, "weights[0, 0]: expected a finite number of at least 0 (only"),
    (
        {"weights": -torch.ones(2, 3)},
        "weights[0, 0]: expected a finite number of at least 0 (only reduction='sum' or 'none' take signed ones), "
        "got -1.0; mend the weights.",
    ),
    (
        {"weights": torch.full((2, 3), torch.inf), "reduction": "sum"},
        "weights[0, 0]: expected a finite number, got inf",
    ),
    ({"reduction": "avg"}, "reduction: expected mean, sum or none, got 'avg'; change it."),
    ({"label_smoothing": 1.0}, "label_smoothing: expected a number in [0, 1), got 1.0;"),
    ({"z_loss": float("nan")}, "z_loss: expected a number of at least 0, got nan;"),
    ({"softcap": 0.0}, "softcap: expected a number above 0, or None, got 0.0;"),
    ({"chunk": 0}, "chunk: expected an integer of at least 1, got 0;"),
]


@pytest.mark.parametrize(("change", "message"), MESSAGES)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    hidden = torch.ones(2, 3, 4, requires_grad=True)
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        linear_cross_entropy(**(GOOD | {"hidden": hidden} | change))
    assert hidden.grad is None
    assert torch.equal(hidden, torch.ones(2, 3, 4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature: expected a number above 0, got 0.0; use argmax for 0."),
        ({"top_k": 0}, "top_k: expected an integer of at least 1, got 0;"),
        ({"top_p": 0.0}, "top_p: expected a number in (0, 1], got 0.0;"),
        ({"top_p": 1.1}, "top_p: expected a number in (0, 1], got 1.1;"),
    ],
)
def test_settings_of_sampling_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        sample(GOOD["hidden"], GOOD["weight"], **settings)


def test_token_logprobs_ignore_nothing() -> None:
    with pytest.raises(ConfigError, match=r"^targets\[1, 1\]: expected an id in 0\.\.4, got -100; compare"):
        token_logprobs(GOOD["hidden"], GOOD["weight"], BAD.where(BAD < 5, 0))


def test_signed_weights_are_welcome_in_a_sum() -> None:
    hidden = torch.randn(4, 3, dtype=torch.float64).requires_grad_()
    weight, targets = torch.randn(5, 3, dtype=torch.float64), torch.arange(4)
    weights = torch.tensor([1.0, -2.0, 0.5, -0.5], dtype=torch.float64)
    with warnings.catch_warnings(action="error"):
        ours, right = (
            f(hidden, weight, targets, weights=weights, reduction="sum") for f in (linear_cross_entropy, plain)
        )
    assert worst(*(torch.autograd.grad(x, hidden)[0] for x in (ours, right))) <= 1e-11


@pytest.mark.gpu
def test_bfloat16_on_a_gpu_is_multiplied_as_it_is_and_summed_in_float32() -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*s, generator=g).cuda().requires_grad_() for s in ((200, 64), (3000, 64)))
    targets = torch.randint(3000, (200,), generator=g).cuda()
    right = plain(hidden, weight, targets)
    expected = torch.autograd.grad(right, (hidden, weight))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        losses = [linear_cross_entropy(hidden, weight, targets, reduction=r, chunk=64).mean() for r in ("mean", "none")]
    for loss in losses:
        assert loss.dtype == torch.float32
        assert worst(loss, right) <= 1e-2
        for ours, theirs in zip(torch.autograd.grad(loss, (hidden, weight)), expected, strict=True):
            assert worst(ours, theirs) <= 3e-2


def test_token_logprobs_are_those_of_log_softmax() -> None:
    g = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_() for s in ((2, 5, 4), (6, 4)))
    bias, targets = torch.randn(6, generator=g, dtype=torch.float64), torch.randint(6, (2, 5), generator=g)
    ours = token_logprobs(hidden, weight, targets, bias=bias, softcap=3.0, chunk=3)
    right = -plain(hidden, weight, targets, bias=bias, softcap=3.0, reduction="none")
    assert ours.shape == (2, 5)
    assert worst(ours, right) <= 1e-11
    pairs = zip(*(torch.autograd.grad(x, (hidden, weight), upstream(x)) for x in (ours, right)), strict=True)
    assert all(worst(*pair) <= 1e-11 for pair in pairs)
    every = [token_logprobs(hidden, weight, torch.full((2, 5), y)).exp() for y in range(6)]
    assert torch.allclose(sum(every), torch.ones(2, 5, dtype=torch.float64))
