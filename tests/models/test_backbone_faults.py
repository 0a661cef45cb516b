"""What a backbone does with bad input and faults: the message, and the state afterwards."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from offbook.errors import ConfigError, DataError, ResourceError
from offbook.models.blockwise import Backbone, BackboneConfig, Causal, KeyPadding, Prefix, Where, Window

POLICIES = [
    {"remat": "none"},
    {"remat": "ffn"},
    {"remat": "attn"},
    {"remat": "layer"},
    {"remat": "layer", "segment": 2},
]
AGAIN = [*POLICIES[2:], {"remat": "attn", "offload": "disk"}]


def make(**settings) -> Backbone:
    torch.manual_seed(0)
    small = {"dim": 16, "layers": 3, "heads": 2, "block_q": 12, "block_k": 10, "block_ffn": 5}
    return Backbone(BackboneConfig(**{**small, **settings})).double()


def tokens(batch: int = 2, number: int = 30) -> Tensor:
    return torch.randn(batch, number, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: weight.grad.clone() for name, weight in net.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("policy", POLICIES)
def test_tokens_that_see_nothing_add_nothing_and_no_nan(policy: dict, dropout: float) -> None:
    """The first sample's last tokens see no key; the second sample is padding as a whole."""
    net, x = make(attention_dropout=dropout, **policy), tokens().requires_grad_()
    lengths = torch.tensor([20, 0])
    out = net(x, mask=Window(4) & KeyPadding(lengths))
    assert bool(out.isfinite().all())
    out.square().sum().backward()
    assert all(bool(g.isfinite().all()) for g in gradients(net).values())
    assert bool((x.grad[0, 20:] == 0).all())
    assert bool((x.grad[1] == 0).all())
    assert bool((x.grad[0, :20] != 0).any())
    # Without anything to see, attention is as if it were not there.
    alone = make(**policy)
    with torch.no_grad():
        for layer in alone.layers:
            layer.out.weight.zero_()
    torch.testing.assert_close(out[1], alone(torch.zeros_like(x), mask=Causal())[1], atol=1e-12, rtol=0)


@pytest.mark.parametrize("trash", [torch.nan, torch.inf])
@pytest.mark.parametrize("policy", POLICIES)
def test_what_stands_in_the_padding_reaches_no_token(policy: dict, trash: float) -> None:
    outs, grads = [], []
    real = torch.arange(30) < torch.tensor([[30], [17]])
    for fill in (0.0, trash):
        net = make(cond_dim=3, **policy)
        for layer in net.layers:
            nn.init.normal_(layer.modulation.weight, std=0.1)
        x, cond = tokens(), tokens()[..., :3].clone()
        x[1, 17:], cond[1, 17:] = fill, fill
        x.requires_grad_()
        out = net(x, mask=Causal() & KeyPadding(torch.tensor([30, 17])), cond=cond)
        (out * real[..., None]).square().sum().backward()
        outs.append(out)
        grads.append({**gradients(net), "x": x.grad})
    assert bool(outs[1].isfinite().all())
    assert torch.equal(outs[0], outs[1])
    assert all(torch.equal(g, grads[1][name]) for name, g in grads[0].items())


@pytest.mark.parametrize("policy", POLICIES)
def test_nan_in_a_token_propagates_and_is_named_when_anomalies_are_looked_for(policy: dict) -> None:
    net, x = make(**policy), tokens()
    x[1, 13] = torch.nan
    out = net(x, mask=Causal())
    assert bool(out[0].isfinite().all())
    # Not only from there on: in a block, 0 times no number is none either, as in PyTorch's own attention.
    assert bool(out[1, 13:].isnan().all())
    with torch.autograd.set_detect_anomaly(True):
        with pytest.raises(DataError, match="input: expected finite numbers, got nan at token 13 of sample 1"):
            net(x, mask=Causal())
        with torch.no_grad():
            net.layers[1].down.bias[2] = torch.inf
        first = "layers 0 to 1" if "segment" in policy else "layer 1"
        with pytest.raises(
            DataError, match=f"output of {first}: expected finite numbers, got inf at token 0 of sample 0"
        ):
            net(tokens(), mask=Causal())
        net.layers[1].down.bias.data[2] = 0
        net(tokens(), mask=Causal())


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda i, j: (j <= i).double(), "torch.float64"),
        (lambda i, j: torch.ones(1, 1, 7, dtype=torch.bool), r"\(1, 1, 7\)"),
        (lambda i, j: torch.ones(1, 1, 1, dtype=torch.bool, device="meta"), "on meta"),
    ],
)
@pytest.mark.parametrize("policy", POLICIES)
def test_masks_that_give_something_else_are_refused_at_the_call(policy: dict, function, got: str) -> None:
    net = make(**policy)
    for mask in (Where(function), Causal() & Where(function)):
        with pytest.raises(ConfigError, match=f"mask Where: expected booleans .*{got}"):
            net(tokens(), mask=mask)
    net(tokens(), mask=Causal())


@pytest.mark.parametrize(
    ("settings", "given", "words"),
    [
        ({}, {"positions": torch.arange(30)}, r"positions: expected int64 \(batch or 1, 30\) .*\(30,\)"),
        ({}, {"positions": torch.arange(30)[None].int()}, "positions: expected int64 .* got torch.int32"),
        ({}, {"positions": torch.arange(30.0)[None]}, "positions: expected int64 .* got torch.float32"),
        ({}, {"positions": torch.arange(29)[None]}, r"positions: .*\(1, 29\)"),
        ({}, {"positions": torch.arange(30)[None].expand(3, -1)}, r"positions: .*\(3, 30\)"),
        ({}, {"positions": torch.arange(30, device="meta")[None]}, "positions: expected .* on cpu, got .* on meta"),
        (
            {"positions": "learned", "max_positions": 29},
            {},
            "expected 0 to 28, the rows of the learned table, got 0 to 29",
        ),
        ({"positions": "learned"}, {"positions": torch.arange(30)[None] - 2}, "0 to 1023, .*, got -2 to 27"),
        ({"positions": "learned"}, {"positions": torch.arange(30)[None] + 1000}, "0 to 1023, .*, got 1000 to 1029"),
        ({}, {"x": torch.zeros(30)}, r"input: expected floats \(batch, tokens, 16\), got torch.float32 \(30,\)"),
        ({}, {"x": torch.zeros(2, 30, 8)}, r"input: expected floats .* \(2, 30, 8\)"),
        ({}, {"x": torch.zeros(2, 30, 16, dtype=torch.int64)}, "input: expected floats .* torch.int64"),
        ({}, {"cond": torch.zeros(2, 1, 3)}, "conditioning: expected none, got one"),
        ({"cond_dim": 3}, {}, "conditioning: expected one of size 3, got none"),
        ({"cond_dim": 3}, {"cond": torch.zeros(2, 1, 4)}, r"conditioning: expected \(2, 1 or 30, 3\), got \(2, 1, 4\)"),
        ({"cond_dim": 3}, {"cond": torch.zeros(2, 7, 3)}, r"conditioning: expected .* \(2, 7, 3\)"),
        ({"cond_dim": 3}, {"cond": torch.zeros(2, 3)}, r"conditioning: expected .* \(2, 3\)"),
        (
            {},
            {"mask": KeyPadding(torch.tensor([1, 2, 3]))},
            "mask KeyPadding: expected one for 2 samples, got one for 3",
        ),
        ({}, {"mask": KeyPadding(torch.ones(2, 9, dtype=torch.bool))}, "expected one for 30 tokens, got one for 9"),
    ],
)
def test_input_that_does_not_fit_is_refused_at_the_call(settings: dict, given: dict, words: str) -> None:
    net, right = make(**settings), {"x": tokens(), "mask": Causal()}
    if "cond_dim" in settings:
        right["cond"] = torch.zeros(2, 1, 3, dtype=torch.float64)
    if "positions" in settings:
        right["positions"] = torch.arange(29).repeat(2)[None, :30]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    wrong = {"x": tokens(), "mask": Causal(), **given}
    with pytest.raises(ConfigError, match=words) as caught:
        net(**wrong)
    assert caught.value.exit_code == 2
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert gradients(net) == {}
    assert net(**right).shape == (2, 30, 16)


@pytest.mark.parametrize("policy", AGAIN)
def test_second_derivatives_are_refused_with_the_switch_that_allows_them(policy: dict) -> None:
    net, x = make(**policy), tokens().requires_grad_()
    out = net(x, mask=Causal())
    with pytest.raises(RuntimeError, match="for a second derivative, set remat='none'"):
        torch.autograd.grad(out.square().sum(), x, create_graph=True)
    assert x.grad is None
    assert gradients(net) == {}


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
@pytest.mark.parametrize("policy", AGAIN)
def test_function_transforms_are_refused_with_the_switch_that_allows_them(policy: dict) -> None:
    net, weights = make(**policy), {k: v.detach() for k, v in make().named_parameters()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(net, weights, (tokens(),), {"mask": Causal()}).square().sum()

    with pytest.raises(RuntimeError, match=r"for torch.func, set remat='none'"):
        torch.func.grad(loss)(weights)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tokens(), tokens())
        with pytest.raises(RuntimeError, match="for forward-mode derivatives, set remat='none'"):
            net(dual, mask=Causal())
    # The weights of a functional call are gone when the backward pass would compute with them again.
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    with pytest.raises(RuntimeError, match="functional_call, set remat='none'"):
        loss(leaves).backward()
    assert all(leaf.grad is None for leaf in leaves.values() if leaf.shape != (16,))


def test_with_everything_kept_second_derivatives_and_transforms_work() -> None:
    net, x = make(remat="none", layers=1), tokens(1, 5).requires_grad_()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (first,) = torch.autograd.grad(net(x, mask=Causal()).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        assert bool((second != 0).any())
        found = torch.func.grad(lambda x: net(x, mask=Causal()).square().sum())(x.detach())
    torch.testing.assert_close(found, first.detach(), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("policy", AGAIN)
def test_a_second_backward_pass_needs_the_graph(policy: dict) -> None:
    net = make(**policy)
    loss = net(tokens(), mask=Causal()).square().sum()
    loss.backward(retain_graph=True)
    once = gradients(net)
    loss.backward()
    torch.testing.assert_close(gradients(net), {name: 2 * g for name, g in once.items()}, atol=0, rtol=1e-12)
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        loss.backward()
    torch.testing.assert_close(gradients(net), {name: 2 * g for name, g in once.items()}, atol=0, rtol=1e-12)


@pytest.mark.parametrize("name", ["layers.1.q.weight", "layers.0.norm1.weight", "layers.2.down.bias"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("policy", AGAIN)
def test_a_weight_that_is_changed_before_the_backward_pass_is_noticed(policy: dict, frozen: bool, name: str) -> None:
    net = make(**policy)
    weight = net.get_parameter(name).requires_grad_(not frozen)
    loss = net(tokens(), mask=Causal()).square().sum()
    with torch.no_grad():
        weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert net.layers[0].kv.weight.grad is None
    net(tokens(), mask=Causal()).square().sum().backward()
    assert net.layers[0].kv.weight.grad is not None


@pytest.mark.parametrize("policy", AGAIN)
def test_parts_that_would_compute_something_else_the_second_time_are_refused(policy: dict) -> None:
    net = make(**policy)
    net.layers[1].out = nn.Sequential(net.layers[1].out, nn.Dropout(0.1))
    with pytest.raises(
        RuntimeError, match=r"out\.1 would drop other numbers in the backward pass: set its p=0, or remat"
    ):
        net(tokens(), mask=Causal())
    net.eval()(tokens(), mask=Causal()).sum().backward()


@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward_pre", "full_backward"])
def test_hooks_that_would_not_be_called_are_refused(kind: str) -> None:
    called: list[str] = []
    for segment in (2, 1):
        net = make(remat="layer", segment=segment)
        handle = getattr(net.layers[1], f"register_{kind}_hook")(lambda *_: called.append(kind))
        if segment == 1:
            net(tokens().requires_grad_(), mask=Causal()).sum().backward()
            assert called == [kind]
            continue
        with pytest.raises(RuntimeError, match=r"hooks of layers that are computed as one would not .*: set segment=1"):
            net(tokens().requires_grad_(), mask=Causal())
        assert called == []
        handle.remove()
        assert net(tokens(), mask=Causal()).requires_grad


class Captured(nn.Module):
    def __init__(self, inner: nn.Linear, scale: Tensor) -> None:
        super().__init__()
        self.inner, self.scale = inner, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale


@pytest.mark.parametrize("where", ["q", "kv", "up"])
@pytest.mark.parametrize("policy", AGAIN)
def test_a_tensor_that_would_be_left_without_its_gradient_is_refused(policy: dict, where: str) -> None:
    net, scale = make(**policy), torch.ones(1, dtype=torch.float64, requires_grad=True)
    for captured in (scale, scale * 2):
        changed = make(**policy)
        layer = changed.layers[1]
        setattr(layer, where, Captured(getattr(layer, where), captured))
        with pytest.raises(
            RuntimeError, match=r"a tensor of shape \(1,\) that wants a gradient, but is none of its par"
        ):
            changed(tokens(), mask=Causal()).square().sum().backward()
        # Layers above it have theirs by then, as always when a backward pass breaks off; it and those below have none.
        assert not any(name.startswith(("layers.0", "layers.1")) for name in gradients(changed))
    assert scale.grad is None
    setattr(net.layers[1], where, Captured(getattr(net.layers[1], where), scale.detach()))
    net(tokens(), mask=Causal()).square().sum().backward()


@pytest.mark.faults
def test_a_full_disk_says_so_and_leaves_the_backbone_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = make(remat="layer", offload="disk")
    with monkeypatch.context() as patch:
        # A file of the system into which nothing can be written.
        patch.setattr(tempfile, "TemporaryFile", lambda **_: Path("/dev/full").open("w+b"))  # noqa: SIM115
        with pytest.raises(
            ResourceError, match=r"offload='disk': expected room for 7680 bytes, got a full disk at .*TMPDIR"
        ):
            net(tokens(), mask=Causal())
    loss = net(tokens(), mask=Causal()).square().sum()
    loss.backward()
    again = make(remat="layer")
    again(tokens(), mask=Causal()).square().sum().backward()
    assert all(torch.equal(g, gradients(again)[name]) for name, g in gradients(net).items())


CHILD = """
import sys, time, torch
torch.set_num_threads(1)
from offbook.models.blockwise import Backbone, BackboneConfig, Causal
net = Backbone(BackboneConfig(dim=16, layers=3, heads=2, remat="attn", offload="disk"))
out = net(torch.randn(1, 300, 16), mask=Causal())
print("kept", flush=True)
sys.stdin.read()
"""


@pytest.mark.faults
def test_nothing_is_left_of_a_process_that_is_killed(tmp_path: Path) -> None:
    command, env = [sys.executable, "-c", CHILD], {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True) as child:
        assert child.stdout.readline() == "kept\n"
        files = [
            path for path in Path(f"/proc/{child.pid}/fd").iterdir() if str(path.readlink()).startswith(str(tmp_path))
        ]
        sizes = sorted(path.stat().st_size for path in files)
        child.send_signal(signal.SIGKILL)
    # Input and attention's output of three layers, and the sums.
    assert sizes == [300 * 2 * 4] * 3 + [300 * 16 * 4] * 6
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("policy", AGAIN)
def test_half_precision_stays_finite_where_scores_do_not_fit_it(policy: dict, dtype: torch.dtype) -> None:
    net = make(positions="none", layers=1, **{**policy, "segment": 1}).to(dtype)
    with torch.no_grad():
        net.layers[0].q.weight.fill_(16)
        net.layers[0].kv.weight[:16].copy_(net.layers[0].q.weight)
        net.layers[0].norm1.weight.fill_(4)
        net.layers[0].norm1.bias.fill_(1)
    x = tokens().to(dtype).requires_grad_()
    net(x, mask=Causal() | Prefix(3)).float().sum().mul(1e-3).backward()
    q = net.layers[0].q(net.layers[0].norm1(x)).detach().double()
    assert float(q.square().sum(-1).max()) > 65504
    assert bool(x.grad.isfinite().all())
    assert all(bool(g.isfinite().all()) for g in gradients(net).values())
