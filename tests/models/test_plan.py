"""The planner: what it counts is what a process takes, and what does not fit is refused before the first step."""

from dataclasses import replace

import pytest
import torch

from offbook.errors import ResourceError
from offbook.models.blockwise import Backbone, BackboneConfig, Causal
from offbook.models.blockwise import backbone as backbone_module
from offbook.models.blockwise.plan import ContextTooLongError, available, choose, longest, plan
from offbook.systems.bpt.measure import Step, measure

SMALL = BackboneConfig(dim=128, layers=3, heads=4, block_q=256, block_k=512, block_ffn=128)


@pytest.mark.parametrize(
    "how",
    [
        {"remat": "none"},
        {"remat": "attn"},
        {"remat": "layer"},
        {"remat": "layer", "offload": "disk"},
        {"remat": "layer", "segment": 3},
        {"remat": "layer", "kv_heads": 1, "ffn": "swiglu"},
    ],
)
def test_a_step_takes_what_is_planned(how):
    config = replace(SMALL, **how)
    measured = measure(Step(backbone=config, tokens=6144, vocabulary=64)).bytes
    assert plan(config, 6144).total == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("tokens", [100, 200, 400])
@pytest.mark.parametrize("remat", ["none", "ffn", "attn", "layer"])
def test_so_does_one_of_a_few_blocks(remat, tokens):
    config = replace(SMALL, remat=remat, dim=256, layers=6)
    measured = measure(Step(backbone=config, tokens=tokens, vocabulary=64)).bytes
    assert plan(config, tokens).total == pytest.approx(measured, rel=0.1)


def test_the_longest_context_fits_and_one_token_more_does_not():
    for remat in ("none", "ffn", "attn", "layer"):
        config, budget = replace(SMALL, remat=remat), 200 << 20
        tokens = longest(config, budget)
        assert plan(config, tokens).total <= budget < plan(config, tokens + 1).total
    assert longest(SMALL, 1 << 10) == 0


def test_less_is_kept_the_less_there_is():
    sizes = [plan(replace(SMALL, remat=remat), 8192).total for remat in ("none", "ffn", "attn", "layer")]
    assert sizes == sorted(sizes, reverse=True)
    for remat, size in zip(("none", "ffn", "attn", "layer"), sizes, strict=True):
        assert choose(SMALL, 8192, budget=size) == remat
    with pytest.raises(ContextTooLongError, match=r"8192 tokens; the longest here is [1-9]\d*; or try segment"):
        choose(SMALL, 8192, budget=sizes[-1] - 1)


def test_a_context_above_the_budget_is_refused_before_the_step(monkeypatch):
    net, x = Backbone(SMALL), torch.zeros(1, 2000, 128, requires_grad=True)
    monkeypatch.setattr(backbone_module, "available", lambda device: 8 << 20)
    known = [replace(SMALL, remat=remat) for remat in ("none", "ffn", "attn", "layer")]
    need, most = min(plan(one, 2000).total for one in known), max(longest(one, 8 << 20) for one in known)
    with pytest.raises(ContextTooLongError) as caught:
        net(x, mask=Causal())
    assert str(caught.value) == (
        f"memory of a training step: expected at most 8 MiB, got {need / 2**20:.0f} MiB for 2000 tokens; "
        f"the longest here is {most}; or try segment or offload='disk'."
    )
    assert isinstance(caught.value, ResourceError)
    assert caught.value.exit_code == 1
    assert x.grad is None
    assert all(weight.grad is None for weight in net.parameters())
    # What it names fits, one token more does not, and nothing is remembered of what did not.
    net(x[:, :most], mask=Causal()).sum().backward()
    with pytest.raises(ContextTooLongError, match=f"{most + 1} tokens"):
        net(x[:, : most + 1], mask=Causal())
    with torch.no_grad():
        assert net(x, mask=Causal()).shape == x.shape
    monkeypatch.setattr(backbone_module, "available", lambda device: 1 << 30)
    assert net(x, mask=Causal()).requires_grad


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    whole = available(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert available(torch.device("cpu")) == pytest.approx(whole / 4, rel=0.2)


def test_a_process_of_a_ring_holds_more_for_its_tokens_and_always_computes_again():
    for remat, vectors in (("attn", 3), ("layer", 4)):
        config = replace(SMALL, remat=remat)
        more = plan(config, 8192, ring=True).total - plan(config, 8192).total
        # Queries and attention's output, if it is not kept anyway, and the gradients of both; and what is on its way.
        vector = 8192 * SMALL.dim * 4
        assert vectors * vector < more < (vectors + 0.6) * vector
        assert longest(config, 200 << 20, ring=True) < longest(config, 200 << 20)
    assert choose(SMALL, 100, budget=1 << 30) == "none"
    assert choose(SMALL, 100, budget=1 << 30, ring=True) == "attn"
    with pytest.raises(ContextTooLongError, match="8192 tokens; the longest here is"):
        choose(SMALL, 8192, budget=plan(replace(SMALL, remat="layer"), 8192).total, ring=True)


def test_what_is_in_the_memory_already_saves_none_of_it(monkeypatch):
    config = replace(SMALL, remat="auto")
    x = torch.zeros(1, 2000, 128)
    budget = plan(replace(config, remat="layer", offload="disk"), 2000).total
    monkeypatch.setattr(backbone_module, "available", lambda device: budget)
    assert Backbone(replace(config, offload="disk"))(x, mask=Causal()).requires_grad
    with pytest.raises(ContextTooLongError):
        Backbone(replace(config, offload="cpu"))(x, mask=Causal())
    sizes = [plan(replace(config, remat="layer", offload=place), 8192) for place in ("none", "cpu", "disk")]
    assert sizes[0].kept - sizes[1].kept == sizes[1].kept - sizes[2].kept == 8192 * 128 * 4
