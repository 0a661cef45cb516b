"""Blockwise layers on a CUDA device: exact, in half precision, with offload and a cache."""

from dataclasses import replace

import pytest
import torch

from offbook.models.blockwise import Backbone, BackboneConfig, Causal, KeyPadding
from offbook.models.blockwise.audit import audit

pytestmark = pytest.mark.gpu
CONFIG = BackboneConfig(dim=128, layers=4, heads=4, kv_heads=2, remat="layer", block_q=256, block_k=512, block_ffn=128)


def gradients(net: Backbone, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    lengths = torch.tensor([x.shape[1], x.shape[1] // 2], device="cuda")
    out = net(x, mask=Causal() & KeyPadding(lengths))
    pull = torch.linspace(-1, 1, out.numel(), device="cuda", dtype=out.dtype).view_as(out)
    return out.detach(), list(torch.autograd.grad((out * pull).sum(), list(net.parameters())))


def twins(**settings) -> tuple[Backbone, Backbone]:
    """The same weights under two ways to spend memory."""
    torch.manual_seed(0)
    one = Backbone(CONFIG).cuda()
    other = Backbone(replace(CONFIG, **settings)).cuda()
    other.load_state_dict(one.state_dict())
    return one, other


def test_the_audit_holds_on_a_device() -> None:
    results = list(audit(40, device="cuda"))
    assert len(results) == 80
    assert [str(result) for result in results if not result.ok] == []


@pytest.mark.parametrize("remat", ["attn", "layer"])
def test_bfloat16_is_as_exact_as_all_kept(remat: str) -> None:
    exact, kept = twins(remat="none")
    _, blockwise = twins(remat=remat)
    x = torch.randn(2, 1000, 128, device="cuda")
    truth, plain = gradients(exact, x), gradients(kept.bfloat16(), x.bfloat16())
    ours = gradients(blockwise.bfloat16(), x.bfloat16())
    for right, theirs, mine in zip([truth[0], *truth[1]], [plain[0], *plain[1]], [ours[0], *ours[1]], strict=True):
        scale = float(right.abs().max())
        limit = 2 * float((theirs.float() - right).abs().max()) + 1e-3 * scale
        assert float((mine.float() - right).abs().max()) <= limit


def test_offload_changes_no_gradient_and_takes_less() -> None:
    here, away = twins(offload="cpu")
    x, peaks, found = torch.randn(2, 8000, 128, device="cuda"), [], []
    for net in (here, away):
        gradients(net, x)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found.append(gradients(net, x))
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    for one, other in zip([found[0][0], *found[0][1]], [found[1][0], *found[1][1]], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(one.abs().max()))
    assert peaks[1] < peaks[0] - x.nbytes


def test_a_cache_gives_what_the_forward_pass_gives() -> None:
    net, _ = twins()
    net.eval()
    x = torch.randn(2, 60, 128, device="cuda")
    with torch.no_grad():
        whole, cache = net(x, mask=Causal()), net.new_cache(2, 60)
        first, cache = net.prefill(x[:, :50], cache=cache)
        steps = [net.step(x[:, i : i + 1], cache) for i in range(50, 60)]
    torch.testing.assert_close(torch.cat([first, *steps], 1), whole, rtol=1e-4, atol=1e-4)
