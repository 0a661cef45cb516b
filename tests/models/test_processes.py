"""A backbone spread over two processes finds the gradients that one process finds."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from offbook.models.blockwise import Backbone, BackboneConfig, Causal, Prefix

MASK = Causal() | Prefix(5)
# How the weights are spread, and what is kept.
SPREAD = {
    "copied": {"remat": "attn"},
    "sharded": {"remat": "attn"},
    "sharded in segments": {"remat": "layer", "segment": 2},
    "sharded layer by layer, none": {"remat": "none"},
    "sharded layer by layer, ffn": {"remat": "ffn"},
    "sharded layer by layer, attn": {"remat": "attn"},
    "sharded layer by layer, layer": {"remat": "layer", "offload": "disk"},
}
TWICE = "sharded layer by layer, layer"


def make(**settings) -> Backbone:
    torch.manual_seed(0)
    small = {"dim": 16, "layers": 2, "heads": 2, "block_q": 24, "block_k": 20, "block_ffn": 10}
    return Backbone(BackboneConfig(**{**small, **settings})).double()


def loss(net: nn.Module, sample: int) -> Tensor:
    """Of one of two samples; no two numbers are treated alike."""
    x = torch.randn(2, 50, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[sample : sample + 1]
    out = net(x, mask=MASK)
    return (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()


def spread(net: Backbone, way: str) -> nn.Module:
    if way == "copied":
        return nn.parallel.DistributedDataParallel(net)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for module in [*(net.layers if "layer by layer" in way else []), net]:
        torch.distributed.fsdp.fully_shard(module, mesh=mesh)
    return net


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    found: dict[str, dict[str, Tensor]] = {}
    for way, policy in SPREAD.items():
        net = make(**policy)
        whole = spread(net, way)
        for _ in range(2 if way == TWICE else 1):
            loss(whole, rank).backward()
        grads = {name: weight.grad for name, weight in net.named_parameters()}
        found[way] = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items()}
    net = spread(make(remat="layer", segment=2), "layer by layer")
    with pytest.raises(RuntimeError, match=r"hooks of layers that are computed as one .*: set segment=1"):
        loss(net, rank)
    assert all(weight.grad is None for weight in net.parameters())
    if not rank:
        torch.save(found, f"{folder}/gradients")
    torch.distributed.barrier()
    # Taking the group down can wait for good: it holds the interpreter while it joins a thread that wants it too.
    os._exit(0)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """The gradients of two processes, by the way the weights were spread; all in one go, since processes start slowly.

    A backbone whose layers are sharded one by one and computed in segments is refused by both processes.
    """
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        context = torch.multiprocessing.spawn(process, (str(folder),), nprocs=2, join=False)
        while not context.join(timeout=120):
            pass
    return torch.load(folder / "gradients", weights_only=True)


@pytest.mark.parametrize("way", SPREAD)
def test_two_processes_find_the_gradients_of_one(way: str, found: dict[str, dict[str, Tensor]]) -> None:
    net = make(remat="none")
    (loss(net, 0) + loss(net, 1)).backward()
    times = (2 if way == TWICE else 1) / 2  # processes take the mean
    assert found[way].keys() == {name for name, _ in net.named_parameters()}
    for name, weight in net.named_parameters():
        want = weight.grad * times
        assert float((found[way][name] - want).abs().max()) <= 1e-11 * float(want.abs().max()), name
