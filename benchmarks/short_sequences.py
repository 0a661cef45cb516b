"""What short sequences cost beside an ordinary transformer, in training and in cached decoding.

The ordinary one is what a good engineer writes in PyTorch: pre-norm layers with one projection to queries, keys and
values, rotary tables made beforehand, `scaled_dot_product_attention` with `is_causal`, and a feedforward with GELU in
its tanh form. It has the same weights. Before a training step is timed both must give the same output and gradients;
of decoding, every step that was timed must have given the same.

Both run by turns in a process, with one thread, and its processor time is counted: what else the machine does then
meets both alike. A training step is the forward and the backward pass to the gradients of all weights and of the
input; an optimiser would cost both the same. Memory is left to its own choice (`remat="auto"`, the default) or nothing
is computed again (`"none"`), which must come to the same.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from offbook.models.blockwise import Backbone, BackboneConfig, Causal
from offbook.models.blockwise.positions import rope_tables
from offbook.runs.benchmark import Options, median_metric, timed
from offbook.runs.ledger import Claim, Metric
from offbook.runs.progress import track

TRAINING, DECODING, TOLERANCE = 1.05, 1.1, 1e-5
# Tokens that are in the cache before a step is timed, and steps of each side in a round.
PROMPTS, STEPS = (12, 256, 1024), 16


@dataclass(frozen=True, kw_only=True)
class Size:
    """A transformer, and the input of a training step, which is taken `calls` times in a round."""

    dim: int
    layers: int
    batch: int
    tokens: int
    calls: int
    heads: int = 4

    def __str__(self) -> str:
        return f"d {self.dim}, {self.layers} layers, {self.batch} x {self.tokens} tokens"


SIZES = (
    Size(dim=256, layers=4, batch=16, tokens=12, calls=4),
    Size(dim=256, layers=4, batch=16, tokens=64, calls=1),
    Size(dim=256, layers=4, batch=4, tokens=256, calls=1),
    Size(dim=128, layers=2, batch=64, tokens=12, calls=4),
    Size(dim=128, layers=2, batch=64, tokens=64, calls=1),
    Size(dim=128, layers=2, batch=16, tokens=256, calls=1),
)
# Nothing but the cost of calls; no limit is set here.
SMALLEST = Size(dim=128, layers=2, batch=1, tokens=12, calls=32)


class PlainLayer(nn.Module):
    """An ordinary pre-norm layer."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        cos: Float[Tensor, "1 1 tokens size"],
        sin: Float[Tensor, "1 1 tokens size"],
        past: tuple[Tensor, Tensor, int] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """The layer's output; with a past, that of the next token, which joins the keys and values of the past."""
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        if past is not None:
            keys, values, n = past
            keys[:, :, n : n + tokens], values[:, :, n : n + tokens] = k, v
            k, v = keys[:, :, : n + tokens], values[:, :, : n + tokens]
        o = functional.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        x = x + self.out(o.transpose(1, 2).reshape(batch, tokens, dim))
        out: Tensor = x + self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh"))
        return out


class Plain(nn.Module):
    """An ordinary transformer with the weights of one of ours."""

    cos: Tensor
    sin: Tensor

    def __init__(self, net: Backbone, max_tokens: int) -> None:
        super().__init__()
        config = net.config
        self.layers = nn.ModuleList(PlainLayer(config.dim, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)
        tables = rope_tables(torch.arange(max_tokens)[None], config.rotated)
        for name, table in zip(("cos", "sin"), tables, strict=True):
            self.register_buffer(name, torch.cat([table, table], -1)[:, None], persistent=False)
        self.load_state_dict(fused(net.state_dict()))

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """The output for whole sequences."""
        cos, sin = self.cos[:, :, : x.shape[1]], self.sin[:, :, : x.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        out: Tensor = self.norm(x)
        return out

    @torch.no_grad()
    def step(self, x: Tensor, keys: list[Tensor], values: list[Tensor], n: int) -> Tensor:
        """The output for token n, whose keys and values join those of earlier ones."""
        cos, sin = self.cos[:, :, n : n + 1], self.sin[:, :, n : n + 1]
        for layer, k, v in zip(self.layers, keys, values, strict=True):
            x = layer(x, cos, sin, (k, v, n))
        out: Tensor = self.norm(x)
        return out


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def fused(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights, or their gradients, of ours under the names of the ordinary one."""
    plain = {name: weight for name, weight in weights.items() if ".q." not in name and ".kv." not in name}
    for name in (name for name in weights if ".q." in name):
        plain[name.replace(".q.", ".qkv.")] = torch.cat([weights[name], weights[name.replace(".q.", ".kv.")]])
    return plain


def training_step(net: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], None]:
    weights = list(net.parameters())

    def step() -> None:
        for tensor in (x, *weights):
            tensor.grad = None
        torch.autograd.backward(forward(x), grad)

    return step


def forward_of(net: Backbone) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        out: Tensor = net(x, mask=Causal())
        return out

    return forward


def results(net: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """The output and all gradients, under the ordinary one's names."""
    training_step(net, forward, x, grad)()
    found = {name: weight.grad for name, weight in net.named_parameters() if weight.grad is not None}
    given = {"input": x.grad} if x.grad is not None else {}
    return {**fused(found), **given, "output": forward(x).detach()}


def check_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raises an AssertionError unless all agree, in units of the largest number of each."""
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    for name, want in wanted.items():
        scale = want.abs().max()
        torch.testing.assert_close(found[name] / scale, want / scale, atol=TOLERANCE, rtol=TOLERANCE)


def processor_times(sides: Mapping[str, Callable[[], object]], options: Options, calls: int) -> dict[str, list[float]]:
    """Seconds of the processor for each call, in each round."""
    seconds = timed(sides, options.repeats, calls=dict.fromkeys(sides, calls), clock=time.process_time)
    return {name: [spent / calls for spent in of] for name, of in seconds.items()}


def train(size: Size, options: Options) -> tuple[list[Metric], Metric]:
    """The ratio with each setting of memory, and what the ordinary one takes."""
    torch.manual_seed(options.seed)
    nets = {
        remat: Backbone(BackboneConfig(dim=size.dim, layers=size.layers, heads=size.heads, remat=remat))
        for remat in ("auto", "none")
    }
    nets["none"].load_state_dict(nets["auto"].state_dict())
    plain = Plain(nets["auto"], size.tokens)
    x = torch.randn(size.batch, size.tokens, size.dim, requires_grad=True)
    grad = torch.randn_like(x)
    for net in nets.values():
        check_equal(results(net, forward_of(net), x, grad), results(plain, plain, x, grad))
    sides = {remat: training_step(net, forward_of(net), x, grad) for remat, net in nets.items()}
    sides["plain"] = training_step(plain, plain, x, grad)
    seconds = processor_times(sides, options, size.calls)
    ratios = [ratio(f"ratio, {size}, {remat}", seconds[remat], seconds["plain"]) for remat in nets]
    return ratios, median_metric(f"plain, {size}", seconds["plain"], unit="s")


def decode(prompt: int, options: Options) -> tuple[Metric, Metric]:
    """The ratio of steps after a prompt, and what the ordinary one takes."""
    torch.manual_seed(options.seed)
    net = Backbone(BackboneConfig(dim=256, layers=4, heads=4)).eval()
    room = prompt + (options.repeats + 1) * STEPS
    plain, cache = Plain(net, room).eval(), net.new_cache(1, room)
    net.prefill(torch.randn(1, prompt, 256), cache=cache)
    keys, values = [tensor.clone() for tensor in cache.keys], [tensor.clone() for tensor in cache.values]
    x = torch.randn(1, 1, 256)
    mine: list[Tensor] = []
    theirs: list[Tensor] = []
    sides: dict[str, Callable[[], object]] = {
        "plain": lambda: theirs.append(plain.step(x, keys, values, prompt + len(theirs))),
        "ours": lambda: mine.append(net.step(x, cache)),
    }
    seconds = processor_times(sides, options, STEPS)
    torch.testing.assert_close(torch.cat(mine), torch.cat(theirs), atol=TOLERANCE, rtol=TOLERANCE)
    return (
        ratio(f"ratio, step after {prompt} tokens", seconds["ours"], seconds["plain"]),
        median_metric(f"plain, step after {prompt} tokens", seconds["plain"], unit="s"),
    )


def ratio(name: str, ours: list[float], plain: list[float]) -> Metric:
    pairs = [mine / other for mine, other in zip(ours, plain, strict=True)]
    return median_metric(name, pairs, higher_is_better=False)


def run(options: Options) -> list[Claim]:
    """Trains at each size, and decodes after each prompt."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        *trained, smallest = [train(size, options) for size in track((*SIZES, SMALLEST), "sizes")]
        decoded = [decode(prompt, options) for prompt in track(PROMPTS, "prompts")]
    finally:
        torch.set_num_threads(threads)
    ratios, steps = [metric for of, _ in trained for metric in of], [metric for metric, _ in decoded]
    how = "Judged by each median ratio of processor time, pair by pair, with one thread; intervals say how sure it is."
    return [
        Claim(
            system="short_sequences",
            claim=f"at 12 to 256 tokens a training step costs at most {TRAINING:g} times an ordinary transformer's",
            metrics=(*ratios,),
            baseline_metrics=tuple(metric for _, metric in trained),
            seeds=(options.seed,),
            verdict="met" if all(metric.value <= TRAINING for metric in ratios) else "missed",
            note=how,
        ),
        Claim(
            system="short_sequences",
            claim="what calls by themselves cost, seen in a training step of a single short sequence",
            metrics=(*smallest[0],),
            baseline_metrics=(smallest[1],),
            seeds=(options.seed,),
            note="Ours projects to queries apart from keys and values, and makes its rotary tables in each pass.",
        ),
        Claim(
            system="short_sequences",
            claim=f"a cached decoding step costs at most {DECODING:g} times an ordinary transformer's",
            metrics=(*steps,),
            baseline_metrics=tuple(metric for _, metric in decoded),
            seeds=(options.seed,),
            verdict="met" if all(metric.value <= DECODING for metric in steps) else "missed",
            note=how,
        ),
    ]
