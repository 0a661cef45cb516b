"""Blockwise layers on a GPU: the longest context, the time of a step, the vocabulary head, and structured masks.

The transformer is the paper's 1b model (d 2048, 24 layers, 16 heads, vocabulary 50,432) in bfloat16; times of steps are
those of four of its layers. Without a GPU nothing is measured. All figures are recorded, none has a limit.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.nn import functional

from offbook.models.blockwise import TokenTypes, linear_cross_entropy
from offbook.models.blockwise.attention import Rule, attend, attend_backward
from offbook.models.blockwise.masks import blocks
from offbook.runs.benchmark import Options, median_metric, timed
from offbook.runs.ledger import Claim, Metric
from offbook.runs.progress import note, track
from offbook.systems.bpt.measure import Measurements, Step, longest
from offbook.systems.bpt.presets import paper
from offbook.systems.bpt.recipe import arms

BUDGET = 8 << 30
LENGTHS = (8_192, 32_768, 131_072)
ROUNDS = 3
ROWS, TOKENS = 16_384, 16_384


def contexts(step: Step, measured: Measurements) -> Claim:
    known = arms(step)
    layer = known["layer"]
    chosen = {
        "vanilla, chunked logits": known["vanilla"],
        "SDPA, all logits": replace(known["SDPA"], head="full"),
        "SDPA, chunked logits": known["SDPA"],
        "layer": layer,
        "layer, offload to the processor": replace(layer, backbone=replace(layer.backbone, offload="cpu")),
    }
    found = {
        name: longest(arm, BUDGET, (8_192, 16_384), 1 << 30, tries=6, measured=measured).tokens
        for name, arm in track(chosen.items(), "longest contexts", len(chosen))
    }
    metrics = [Metric(name=name, value=tokens, unit="tokens", higher_is_better=True) for name, tokens in found.items()]
    ratios = [
        Metric(name=f"{name} to {base}", value=found[name] / max(1, found[base]), higher_is_better=True)
        for name in list(chosen)[3:]
        for base in list(chosen)[:3]
    ]
    claim = f"the longest context of the 1b model in {BUDGET >> 30} GiB beside its weights, on a GPU"
    return _claim(claim, ratios, metrics)


def times(step: Step, measured: Measurements) -> Claim:
    four = replace(step, backbone=replace(step.backbone, layers=4), goal="time")
    known = arms(four)
    chosen = {"SDPA": known["SDPA"], "compiled SDPA": replace(known["SDPA"], arm="compiled")}
    chosen |= {name: known[name] for name in ("attn", "layer")}
    took: dict[tuple[str, int], list[float]] = {}
    for tokens, turn in track([(n, turn) for n in LENGTHS for turn in range(ROUNDS)], "times"):
        for name, arm in chosen.items():
            took.setdefault((name, tokens), []).append(measured(replace(arm, tokens=tokens), turn).seconds)
    metrics = [
        median_metric(
            f"{name} to {base}, {tokens} tokens", [a / b for a, b in zip(mine, took[base, tokens], strict=True)]
        )
        for (name, tokens), mine in took.items()
        if name in ("attn", "layer")
        for base in ("SDPA", "compiled SDPA")
    ]
    absolute = [
        median_metric(f"{name}, {tokens} tokens", seconds, unit="s") for (name, tokens), seconds in took.items()
    ]
    claim = "the time of a step of four layers of the 1b model on a GPU, against checkpointed SDPA, compiled and not"
    return Claim(
        system="blockwise_gpu", claim=claim, metrics=tuple(metrics), baseline_metrics=tuple(absolute), seeds=(0,)
    )


def heads(step: Step, repeats: int) -> Claim:
    kind = {"device": "cuda", "dtype": torch.bfloat16}
    hidden = torch.randn(ROWS, step.backbone.dim, **kind).requires_grad_()
    weight = (0.02 * torch.randn(step.vocabulary, step.backbone.dim, **kind)).requires_grad_()
    targets = torch.randint(step.vocabulary, (ROWS,), device="cuda")
    sides: dict[str, Callable[[], torch.Tensor]] = {
        "ours": lambda: linear_cross_entropy(hidden, weight, targets),
        "PyTorch, chunked": lambda: functional.linear_cross_entropy(
            hidden, weight, targets, options=torch.nn.LinearCrossEntropyOptions()
        ),
        "all logits": lambda: functional.cross_entropy(functional.linear(hidden, weight).float(), targets),
    }
    if find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss()
        sides["Liger"] = lambda: fused(weight, hidden, targets)
    return _sides("the vocabulary head on a GPU, V 50,432, 16,384 rows, forward and backward", sides, repeats)


def masks(step: Step, repeats: int) -> Claim:
    """Attention under a mask of token types, where no kernel has a switch for it: our blocks beside flex attention."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    heads, size = step.backbone.heads, step.backbone.head_size
    q, k, v = (torch.randn(1, heads, TOKENS, size, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in "qkv")
    types = (torch.arange(TOKENS, device="cuda") // 4) % 3
    allow = torch.tensor([[True, False, False], [True, True, False], [True, True, True]], device="cuda")
    compiled = torch.compile(flex_attention)
    block_mask = create_block_mask(lambda b, h, i, j: allow[types[i], types[j]], None, None, TOKENS, TOKENS)
    rule, whole = Rule(TokenTypes(types.cpu(), allow.cpu())), range(TOKENS)
    do = torch.randn_like(q)

    def ours() -> None:
        held = [x.detach() for x in (q, k, v)]
        dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in held[1:])
        for rows in blocks(whole, step.backbone.block_q):
            cut = slice(rows.start, rows.stop)
            block = held[0][:, :, cut]
            o, lse = attend(block, held[1], held[2], rule, rows, whole)
            attend_backward(do[:, :, cut], block, held[1], held[2], o, lse, rule, rows, whole, dk, dv)

    def theirs() -> None:
        torch.autograd.grad(compiled(q, k, v, block_mask=block_mask), (q, k, v), do)

    return _sides(f"attention under token types on a GPU, {TOKENS} tokens, forward and backward",
                  {"ours": ours, "flex attention": theirs}, repeats)  # fmt: skip


def _sides(claim: str, sides: dict[str, Callable[[], torch.Tensor | None]], repeats: int) -> Claim:
    """Times and memory of the sides by turns."""

    def whole(side: Callable[[], torch.Tensor | None]) -> Callable[[], None]:
        def call() -> None:
            loss = side()
            if loss is not None:
                loss.backward()
            torch.cuda.synchronize()

        return call

    calls = {name: whole(side) for name, side in sides.items()}
    seconds = timed(calls, repeats, warm_up=2)
    metrics = [
        median_metric(f"time, ours to {name}", _shares(seconds["ours"], seconds[name])) for name in list(sides)[1:]
    ]
    held = []
    for name, call in calls.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        grown = (torch.cuda.max_memory_allocated() - before) / 2**20
        held.append(Metric(name=f"memory, {name}", value=grown, unit="MiB", higher_is_better=False))
    absolute = [median_metric(f"time, {name}", values, unit="s") for name, values in seconds.items()]
    return Claim(
        system="blockwise_gpu", claim=claim, metrics=(*metrics, *held), baseline_metrics=tuple(absolute), seeds=(0,)
    )


def run(options: Options) -> list[Claim]:
    if not torch.cuda.is_available():
        note("offbook: blockwise_gpu wants a CUDA device; nothing is measured")
        return []
    step = paper().step
    with tempfile.TemporaryDirectory() as folder:
        measured = Measurements(Path(folder) / "measurements.jsonl")
        return [
            heads(step, options.repeats),
            masks(step, options.repeats),
            times(step, measured),
            contexts(step, measured),
        ]
