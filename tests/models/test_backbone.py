"""What a backbone computes, and that neither blocks nor what is kept change it."""

import gc
import itertools
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from offbook.models.blockwise import Backbone, BackboneConfig, Causal, Full, KeyPadding, Window
from offbook.models.blockwise.audit import reference

POLICIES = [
    {"remat": "none"},
    {"remat": "ffn"},
    {"remat": "attn"},
    {"remat": "layer"},
    {"remat": "layer", "segment": 2},
    {"remat": "attn", "offload": "disk"},
    {"remat": "layer", "segment": 2, "offload": "disk"},
]
KEPT = [{"remat": remat} for remat in ("none", "ffn", "attn", "layer")]


def make(dtype: torch.dtype = torch.float64, **settings) -> Backbone:
    torch.manual_seed(0)
    small = {"dim": 16, "layers": 2, "heads": 2, "block_q": 24, "block_k": 20, "block_ffn": 10}
    return Backbone(BackboneConfig(**{**small, **settings})).to(dtype)


def tokens(batch: int = 2, number: int = 50, dim: int = 16, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, number, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def gradients(net: nn.Module, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    net.zero_grad()
    run().backward()
    return {name: weight.grad.clone() for name, weight in net.named_parameters() if weight.grad is not None}


def weighted(out: Tensor) -> Tensor:
    """A loss that treats no two numbers alike."""
    return (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()


def assert_alike(one: dict[str, Tensor], other: dict[str, Tensor], share: float = 1e-11) -> None:
    assert one.keys() == other.keys()
    for name, want in other.items():
        assert float((one[name] - want).abs().max()) <= share * max(float(want.abs().max()), 1e-6), name


@pytest.mark.parametrize("number", [0, 1, 2, 23, 24, 25, 49])
@pytest.mark.parametrize("policy", POLICIES[:5])
def test_any_number_of_tokens_will_do(number: int, policy: dict) -> None:
    net, x = make(**policy), tokens(number=number).requires_grad_()
    out = net(x, mask=Causal())
    assert out.shape == x.shape
    assert out.requires_grad
    weighted(out).backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    visible = torch.ones(number, number, dtype=torch.bool).tril()[None]
    if number:
        want = reference(net.config, dict(net.named_parameters()), x, visible)
        torch.testing.assert_close(out, want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("policy", KEPT)
def test_no_sample_is_a_batch_too(policy: dict) -> None:
    net, x = make(**policy), tokens(batch=0).requires_grad_()
    out = net(x, mask=Causal())
    assert out.shape == (0, 50, 16)
    out.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("attention_dropout", [0.0, 0.1])
def test_the_loss_with_dropout_depends_on_no_block_size_and_on_nothing_kept(attention_dropout: float) -> None:
    losses, grads, x = [], [], tokens(number=520, dtype=torch.float32)
    for policy, size in itertools.product(POLICIES, (64, 512, 520)):
        blocks = {"block_q": size, "block_k": size, "block_ffn": size}
        net = make(torch.float32, dropout=0.1, attention_dropout=attention_dropout, **policy, **blocks)
        torch.manual_seed(5)
        loss = net(x, mask=Causal()).square().mul(torch.linspace(0, 1, 16)).mean()
        losses.append(loss.item())
        loss.backward()
        grads.append({name: weight.grad for name, weight in net.named_parameters()})
    assert max(losses) - min(losses) <= 1e-6 * abs(losses[0])
    for other in grads[1:]:
        assert_alike(other, grads[0], 1e-4)
    torch.manual_seed(6)
    assert abs(net(x, mask=Causal()).square().mul(torch.linspace(0, 1, 16)).mean().item() - losses[0]) > 1e-4


@pytest.mark.parametrize("policy", POLICIES)
def test_dropout_is_for_training_alone(policy: dict) -> None:
    net, x = make(dropout=0.3, attention_dropout=0.3, **policy), tokens()
    plain = make(**policy)(x, mask=Causal())
    torch.testing.assert_close(net.eval()(x, mask=Causal()), plain, atol=0, rtol=0)
    net.train()
    one, other = (net(x, mask=Causal()) for _ in range(2))
    assert not torch.equal(one, plain)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("policy", KEPT)
def test_mixed_precision_gives_the_gradients_of_plain_mixed_precision_in_float32(policy: dict) -> None:
    net, x, mask = (
        make(torch.float32, cond_dim=3, **policy),
        tokens(dtype=torch.float32),
        Causal() & KeyPadding(torch.tensor([50, 30])),
    )
    for layer in net.layers:
        nn.init.normal_(layer.modulation.weight, std=0.1)
    cond = torch.randn(2, 1, 3, requires_grad=True)

    def run(mixed: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            out = net(x, mask=mask, cond=cond)
        assert out.dtype == torch.float32
        return weighted(out)

    exact, mixed = gradients(net, lambda: run(False)), gradients(net, lambda: run(True))
    assert all(g.dtype == torch.float32 for g in mixed.values())
    # Three digits of bfloat16, through two layers.
    assert_alike(mixed, exact, 0.05)
    assert any(not torch.equal(mixed[name], exact[name]) for name in exact)


@pytest.mark.parametrize("remat", ["attn", "layer"])
def test_mixed_precision_in_the_backward_pass_is_that_of_the_forward_pass(remat: str) -> None:
    net, x = make(torch.float32, remat=remat), tokens(dtype=torch.float32)
    plain = gradients(net, lambda: weighted(net(x, mask=Causal())))
    net.zero_grad()
    loss = weighted(net(x, mask=Causal()))
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()
    assert_alike({name: weight.grad for name, weight in net.named_parameters()}, plain, 0)
    with torch.autocast("cpu", torch.bfloat16):
        inside, outside = (weighted(net(x, mask=Causal())) for _ in range(2))
        mixed = gradients(net, lambda: inside)
    assert_alike(gradients(net, lambda: outside), mixed, 0)


@pytest.mark.parametrize("policy", KEPT[2:])
def test_gradients_of_bfloat16_weights_are_summed_over_blocks_in_float32(policy: dict) -> None:
    x, found = tokens(1, 240, dtype=torch.bfloat16) + 1, []
    for block in (2, 240):
        net = make(
            torch.bfloat16, layers=1, **policy, block_q=block, block_k=240, block_ffn=block, cond_dim=3, bias="all"
        )
        cond = torch.ones(1, 1, 3, dtype=torch.bfloat16, requires_grad=True)
        with torch.no_grad():
            net.layers[0].modulation.weight.fill_(0.125)
        found.append(gradients(net, lambda net=net, cond=cond: net(x, mask=Full(), cond=cond)[..., :3].float().sum()))
        found[-1]["cond"] = cond.grad
    assert all(g.dtype == torch.bfloat16 for g in found[0].values())
    assert_alike(*({name: grads[name].float() for name in grads if "norm" not in name} for grads in found), 0.02)


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_of_several_batches_add_up(policy: dict) -> None:
    net, batches = make(**policy), [tokens(number=n) for n in (20, 45)]
    apart = [gradients(net, lambda x=x: weighted(net(x, mask=Causal()))) for x in batches]
    together = gradients(net, lambda: sum(weighted(net(x, mask=Causal())) for x in batches))
    assert_alike(together, {name: apart[0][name] + apart[1][name] for name in apart[0]})


@pytest.mark.parametrize("policy", POLICIES)
def test_frozen_weights_get_no_gradient_and_the_others_their_own(policy: dict) -> None:
    net, x = make(**policy), tokens()
    every = gradients(net, lambda: weighted(net(x, mask=Causal())))
    for name, weight in net.named_parameters():
        weight.requires_grad_(("layers.0" in name) == ("norm" in name))
    some = gradients(net, lambda: weighted(net(x, mask=Causal())))
    assert some.keys() == {name for name in every if ("layers.0" in name) == ("norm" in name)}
    assert_alike(some, {name: every[name] for name in some})


class LowRank(nn.Module):
    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, inner.in_features, dtype=torch.float64))
        self.up = nn.Parameter(torch.randn(inner.out_features, 2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x @ self.down.T @ self.up.T


class Sum(nn.Module):
    """A parametrization whose two parts have the very same gradient."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.more = nn.Parameter(torch.randn_like(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.more


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_adapters_inside_a_layer_get_their_gradients(policy: dict) -> None:
    def adapted(policy: dict) -> dict[str, Tensor]:
        net = make(**policy)
        net.requires_grad_(False)
        for layer in net.layers:
            layer.q, layer.kv = LowRank(layer.q), LowRank(layer.kv)
            nn.utils.parametrize.register_parametrization(layer.up, "weight", Sum(layer.up.weight))
            layer.up.parametrizations.weight.original.requires_grad_()
        return gradients(net, lambda: weighted(net(tokens(), mask=Causal())))

    found = adapted(policy)
    assert len(found) == 12
    assert_alike(found, adapted({"remat": "none"}))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_layer_that_stands_twice_gets_the_sum_of_both_gradients(policy: dict) -> None:
    net, x = make(**policy), tokens()
    net.layers[1] = net.layers[0]
    shared = gradients(net, lambda: weighted(net(x, mask=Causal())))
    apart = make(**policy)
    apart.layers[1].load_state_dict(net.layers[0].state_dict())
    apart.layers[0].load_state_dict(net.layers[0].state_dict())
    both = gradients(apart, lambda: weighted(apart(x, mask=Causal())))
    wanted = {
        name: g + both[name.replace("layers.0", "layers.1")] if "layers.0" in name else g for name, g in both.items()
    }
    assert_alike(shared, {name: g for name, g in wanted.items() if "layers.1" not in name})


@pytest.mark.parametrize("policy", POLICIES)
def test_conditioning_gets_its_gradient_for_samples_and_for_tokens(policy: dict) -> None:
    for number in (1, 50):
        found = []
        for own in (policy, {"remat": "none"}):
            net = make(cond_dim=3, **own)
            for layer in net.layers:
                nn.init.normal_(layer.modulation.weight, std=0.3)
            cond = tokens(2, number, 3).requires_grad_()
            weighted(net(tokens(), mask=Window(9), cond=cond)).backward()
            found.append({"cond": cond.grad})
        assert_alike(*found)


@pytest.mark.parametrize("policy", POLICIES)
def test_without_gradients_the_output_is_the_same_and_nothing_is_kept(
    policy: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x = make(**policy), tokens()
    want = net(x, mask=Causal()).detach()
    monkeypatch.setattr("tempfile.TemporaryFile", lambda *_, **__: pytest.fail("a scratch file for nothing"))
    for off in (torch.no_grad(), torch.inference_mode()):
        with off:
            torch.testing.assert_close(net(x, mask=Causal()), want, atol=1e-12, rtol=1e-12)


def test_less_is_saved_the_more_is_computed_again() -> None:
    saved = {}
    for remat in ("none", "ffn", "attn", "layer"):
        net, seen = make(torch.float32, dim=32, layers=4, remat=remat, block_q=64, block_ffn=64), {}
        weights = {weight.data_ptr() for weight in net.parameters()}

        def note(tensor: Tensor, seen: dict = seen, weights: set = weights) -> Tensor:
            if tensor.data_ptr() not in weights:
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = net(tokens(1, 256, 32, torch.float32), mask=Causal())
        saved[remat] = sum(seen.values())
        del out
    vector = 256 * 32 * 4
    assert saved["layer"] < saved["attn"] < saved["ffn"] < saved["none"]
    # Inputs of 4 layers and of the last norm, its mean and deviation; and attention's output and sums.
    assert saved["layer"] <= 5 * vector + 2 * 256 * 4
    assert saved["attn"] <= 9 * vector + 2 * 256 * 4 + 4 * 2 * 256 * 4


@pytest.mark.parametrize("policy", POLICIES)
def test_a_backward_pass_lets_go_of_what_was_kept(policy: dict) -> None:
    net, x = make(layers=4, **policy), tokens(number=77)
    loss = weighted(net(x, mask=Causal()))
    loss.backward()
    assert loss.grad_fn is not None  # With the graph alive, as it is until the next loss.
    left = [kept for kept in gc.get_objects() if type(kept) is Tensor and kept.shape == x.shape]
    assert [kept is x for kept in left] == [True]


@pytest.mark.parametrize("policy", [KEPT[0], KEPT[3]])
def test_compilation_breaks_the_graph_and_nothing_else(policy: dict) -> None:
    net, x = make(**policy), tokens()
    want = gradients(net, lambda: weighted(net(x, mask=Causal())))
    with warnings.catch_warnings():
        # Of a tensor's gradient, which the compiler looks at.
        warnings.simplefilter("ignore", UserWarning)
        compiled = torch.compile(net, backend="eager")
        assert_alike(gradients(net, lambda: weighted(compiled(x, mask=Causal()))), want)


def test_checkpoints_around_a_backbone_change_nothing() -> None:
    net, x = make(dropout=0.1, remat="layer"), tokens().requires_grad_()
    torch.manual_seed(3)
    want = gradients(net, lambda: weighted(net(x, mask=Causal())))
    for again in (False, True):
        torch.manual_seed(3)
        out = torch.utils.checkpoint.checkpoint(lambda y: net(y, mask=Causal()), x, use_reentrant=again)
        assert_alike(gradients(net, lambda out=out: weighted(out)), want)
