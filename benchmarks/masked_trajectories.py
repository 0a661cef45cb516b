"""What a training step and an evaluation of a masked trajectory model cost beside the way of its authors.

Their way to train, in plain PyTorch at the same size: one mask for the whole batch, so that the encoder simply gets the
visible tokens; layers with one projection to queries, keys and values, `scaled_dot_product_attention`, dropout on both
residual branches. Ours draws a mask for each sample, and shows states and returns with their changes, which the second
figure leaves out. Both draw by the same rule, and a step is everything from the
masks to the optimiser's. Since the cost of a step with one mask goes with what that shows, each round takes steps with
masks evenly chosen out of many, from the one that shows least to the one that shows most; ours takes as many.

Their way to evaluate: one environment at a time, one forward pass for each of its steps. Ours answers all environments
in one pass. Policy time alone is counted; both must give the same actions.

Both sides run by turns in a process, with one thread, and its processor time is counted.
"""

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from offbook.client.protocol import ActionSpec, Observation, ObservationSpec, PolicyMeta
from offbook.learning.masked_model import masked_loss
from offbook.runs.benchmark import Options, median_metric, timed
from offbook.runs.ledger import Claim
from offbook.systems.mtm import MaskedTrajectoryModel, Modality, RolePolicy, Shape, Sizes, draw

TRAINING, EVALUATION = 1.0, 5.0
WIDTHS: Mapping[str, int] = {"state": 39, "return": 1, "action": 28}
BATCH, STEPS, MASKS, ENVIRONMENTS = 256, 8, 32, 20


class PlainLayer(nn.Module):
    """An ordinary pre-norm layer."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Float[Tensor, "batch n dim"]) -> Float[Tensor, "batch n dim"]:
        """The layer's output."""
        q, k, v = self.qkv(self.norm1(x)).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        o = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.out(o))
        out: Tensor = x + self.dropout(self.down(functional.gelu(self.up(self.norm2(x)))))
        return out


class Plain(nn.Module):
    """The model of the authors' way: one visibility for all samples, shape (time,) by modality."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        dim, names = sizes.dim, list(WIDTHS)
        self.embed = nn.ModuleDict({name: nn.Linear(WIDTHS[name], dim) for name in names})
        self.marks = nn.ParameterDict({name: torch.randn(2, dim) * 0.02 for name in names})
        self.hidden = nn.ParameterDict({name: torch.randn(dim) * 0.02 for name in names})
        self.positions = nn.Parameter(torch.randn(sizes.length, dim) * 0.02, requires_grad=False)
        self.input = nn.Dropout(sizes.dropout)
        self.encoder, self.decoder = (
            nn.Sequential(*(PlainLayer(dim, sizes.heads, sizes.dropout) for _ in range(layers)), nn.LayerNorm(dim))
            for layers in (sizes.encoder, sizes.decoder)
        )
        self.heads = nn.ModuleDict({
            name: nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, WIDTHS[name]))
            for name in names
        })  # fmt: skip

    def forward(self, data: Mapping[str, Tensor], visible: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What it tells of every step."""
        batch, length = next(iter(data.values())).shape[:2]
        seen = torch.cat([visible[name] for name in WIDTHS]).nonzero()[:, 0]
        tokens = [self.embed[name](data[name]) + self.marks[name][0] + self.positions for name in WIDTHS]
        found = torch.cat([self.hidden[name].expand(batch, length, -1) for name in WIDTHS], 1)
        if len(seen):
            encoded = self.encoder(self.input(torch.cat(tokens, 1)[:, seen]))
            found = found.index_copy(1, seen, encoded)
        marks = torch.cat([self.marks[name][1] + self.positions for name in WIDTHS])
        decoded = self.decoder(self.input(found + marks))
        parts = torch.split(decoded, length, 1)
        return {name: self.heads[name](part) for name, part in zip(WIDTHS, parts, strict=True)}


def even_masks(shape: Shape, rng: torch.Generator) -> list[dict[str, Tensor]]:
    """Masks of one sample, shape (time,) by modality, out of those of many: ordered by what they show, every n-th."""
    visible = draw("auto", shape, rng)
    order = torch.stack([seen.sum((1, 2)) for seen in visible.values()]).sum(0).argsort()
    step = shape.batch // MASKS
    return [{name: seen[i, :, 0] for name, seen in visible.items()} for i in order[step // 2 :: step].tolist()]


def training_step(module: nn.Module, work: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        work().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def train(options: Options) -> Claim:
    """A step of each way."""
    torch.manual_seed(options.seed)
    sizes, rng = Sizes(), torch.Generator().manual_seed(options.seed)
    data = {name: torch.randn(BATCH, sizes.length, width) for name, width in WIDTHS.items()}
    modalities = [Modality(name=name, size=width, residual=name != "action") for name, width in WIDTHS.items()]
    bare = [replace(modality, residual=False) for modality in modalities]
    model, same, plain = MaskedTrajectoryModel(modalities, sizes), MaskedTrajectoryModel(bare, sizes), Plain(sizes)
    counts = [sum(p.numel() for p in module.parameters() if p.requires_grad) for module in (same, plain)]
    if counts[0] != counts[1]:
        raise RuntimeError(f"the two differ in size: {counts}")
    every = {name: torch.ones(BATCH, sizes.length, 1, dtype=torch.bool) for name in WIDTHS}

    def ours(model: MaskedTrajectoryModel) -> Tensor:
        visible = draw("auto", Shape(tokens=model.tokens, length=sizes.length, batch=BATCH), rng)
        return masked_loss(model, model(data, visible), model.targets(data), every)[0]

    masks = itertools.cycle(even_masks(Shape(tokens=model.tokens, length=sizes.length, batch=64 * MASKS), rng))

    def theirs() -> Tensor:
        draw("auto", Shape(tokens=model.tokens, length=sizes.length, batch=1), rng)  # what that costs
        told = plain(data, next(masks))
        return torch.stack([(told[name] - data[name]).square().mean() for name in WIDTHS]).sum()

    sides = {
        "ours": training_step(model, partial(ours, model)),
        "same": training_step(same, partial(ours, same)),
        "plain": training_step(plain, theirs),
    }
    calls = dict.fromkeys(sides, MASKS)
    seconds = timed(sides, options.repeats, calls=calls, clock=time.process_time)
    each = {name: [spent / calls[name] for spent in of] for name, of in seconds.items()}
    ratio, without = (
        median_metric(name, [a / b for a, b in zip(each[side], each["plain"], strict=True)])
        for name, side in (("ratio, training step", "ours"), ("the same, without changes", "same"))
    )
    return Claim(
        system="masked_trajectories",
        claim="a training step with a mask for each sample costs no more than one with a mask for the whole batch",
        metrics=(ratio, without),
        baseline_metrics=(median_metric("plain, training step", each["plain"], unit="s"),),
        seeds=(options.seed,),
        verdict="met" if ratio.value <= TRAINING else "missed",
        note=f"d {sizes.dim}, {sizes.encoder} + {sizes.decoder} layers, {BATCH} windows of {sizes.length} steps; "
        "judged by the median ratio of processor time, with one thread.",
    )


def evaluate(options: Options) -> Claim:
    """The steps of some environments, all at once and one at a time."""
    torch.manual_seed(options.seed)
    modalities = [Modality(name=name, size=width, residual=name != "action") for name, width in WIDTHS.items()]
    bounds = (10.0,) * WIDTHS["action"]
    action = ActionSpec(size=WIDTHS["action"], low=tuple(-x for x in bounds), high=bounds)
    meta = PolicyMeta(name="m", observation=ObservationSpec(state=(("state", WIDTHS["state"]),)), action=action)
    facts = {"role": "rcbc", "target": 1.0, "return_range": (0.0, 1.0)}
    policy = RolePolicy(MaskedTrajectoryModel(modalities, Sizes()), meta, facts)
    names = tuple(map(str, range(ENVIRONMENTS)))
    states = np.random.default_rng(options.seed).standard_normal((STEPS, ENVIRONMENTS, WIDTHS["state"]), np.float32)
    answers: dict[str, np.ndarray] = {}

    def play(side: str, groups: list[tuple[int, ...]]) -> Callable[[], None]:
        def run() -> None:
            found = np.zeros((STEPS, ENVIRONMENTS, WIDTHS["action"]), np.float32)
            for group in groups:
                rows = list(group)
                sessions = tuple(names[i] for i in rows)
                policy.reset(sessions, [""] * len(rows))
                for step in range(STEPS):
                    seen = Observation(sessions=sessions, state=states[step, rows], images={}, time=np.zeros(len(rows)))
                    found[step, rows] = policy.infer(seen)[:, 0]
            answers[side] = found

        return run

    together = play("together", [tuple(range(ENVIRONMENTS))])
    alone = play("alone", [(i,) for i in range(ENVIRONMENTS)])
    seconds = timed({"together": together, "alone": alone}, options.repeats, clock=time.process_time)
    np.testing.assert_allclose(answers["together"], answers["alone"], atol=1e-5)
    pairs = [b / a for a, b in zip(seconds["together"], seconds["alone"], strict=True)]
    ratio = median_metric(f"ratio, {ENVIRONMENTS} environments", pairs, higher_is_better=True)
    each = [spent / STEPS / ENVIRONMENTS for spent in seconds["alone"]]
    return Claim(
        system="masked_trajectories",
        claim=f"{ENVIRONMENTS} environments at once take {EVALUATION:g} times less of a policy's time than one by one",
        metrics=(ratio,),
        baseline_metrics=(median_metric("one by one, an action", each, unit="s"),),
        seeds=(options.seed,),
        verdict="met" if ratio.value >= EVALUATION else "missed",
        note="The return-conditioned role; judged by the median ratio of processor time, with one thread.",
    )


def run(options: Options) -> list[Claim]:
    """Trains, then evaluates, in both ways."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [train(options), evaluate(options)]
    finally:
        torch.set_num_threads(threads)
