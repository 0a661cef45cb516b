"""Does a transformer that computes by blocks train on longer sequences, in no more time, and is it the same model?

Source: Liu and Abbeel, "Blockwise Parallel Transformer for Large Context Models" (2023).
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from offbook.errors import ConfigError
from offbook.learning.fit import fit
from offbook.models.blockwise.audit import LIMITS, Result, audit
from offbook.models.blockwise.plan import plan, ways
from offbook.runs.directory import RunDirectory
from offbook.runs.ledger import Claim
from offbook.runs.parallel import run_parallel
from offbook.runs.progress import track
from offbook.runs.seeding import generator
from offbook.systems.bpt import claims
from offbook.systems.bpt.measure import Head, Language, Longest, Measurements, Step, longest
from offbook.systems.bpt.presets import BptConfig


def run(config: BptConfig, out: RunDirectory) -> list[Claim]:
    """Measures all of it; interrupted, it goes on from what the folder holds.

    Raises:
        ConfigError: it wants a device that is not there.
    """
    if config.step.device == "cuda" and not torch.cuda.is_available():
        fix = "run it on a machine with one, or choose the preset tiny"
        raise ConfigError("step.device", expected="a CUDA device", got="a machine without one", fix=fix)
    # Data: a text that lies on every machine; random tokens where only sizes matter.
    text = inspect.getsource(argparse).encode()

    # Model: one transformer, and the ways to train it.
    ways_to_train = arms(config.step)

    # Learn: a few steps in each way, from the same weights on the same text.
    losses = {name: [_losses(config, name, arm, text, seed, out) for seed in config.seeds]
              for name, arm in ways_to_train.items()}  # fmt: skip

    # Test: which context fits a memory, whether the planner knew, how long a step takes, and whether all is exact.
    # Absolute, for processes that were started in another folder.
    measured = Measurements(out.path.resolve() / "measurements.jsonl")
    seconds, audited = _seconds(config, measured), _audited(config)
    found, planned = _longest_contexts(config, measured), _planned(config, measured)

    # Record: each claim beside its limits, and a picture.
    claims.draw_contexts(out.path / "contexts.png", {name: found[name] for name in ways_to_train}, config.budget)
    return [
        claims.contexts(config, {name: found[name] for name in ways_to_train}),
        *(
            claims.depth(config, {n: f for n, f in found.items() if n.endswith(f"{d} layers")}, d)
            for d in config.depths
        ),
        claims.vocabulary(config, {name: f for name, f in found.items() if " V " in name}),
        claims.time(config, seconds),
        claims.planner(config, planned),
        claims.gradients(config, audited),
        claims.losses(config, losses, text),
    ]


def arms(step: Step) -> dict[str, Step]:
    """The ordinary ways to train, with checkpointed layers and PyTorch's chunked head, and ours."""
    ours = list(ways(step.backbone).values())[2:]
    named = zip(("attn", "layer", "segments", "offload"), ours, strict=True)
    return {
        "vanilla": replace(step, arm="vanilla", head="torch"),
        "SDPA": replace(step, arm="sdpa", head="torch"),
        **{name: replace(step, backbone=way) for name, way in named},
    }


def _losses(config: BptConfig, name: str, arm: Step, text: bytes, seed: int, out: RunDirectory) -> list[float]:
    """The loss of each step of a short training."""

    def batch(index: int) -> Mapping[str, Tensor]:
        start = int(generator(seed, "text", index).integers(len(text) - config.fit_tokens))
        return {"ids": torch.tensor(list(text[start : start + config.fit_tokens + 1]))[None]}

    def loss(model: nn.Module, batch: Mapping[str, Tensor], _: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return model(batch["ids"]), {}

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Language(arm.backbone, 256, arm.arm, arm.head)
    setting = replace(config.fit, seed=seed)
    folder = RunDirectory.create(out.path / f"fit/{name}-{seed}", setting, resume=True)
    fit(model, batch, loss, setting, folder, resume=True)
    return [row["loss"] for row in folder.metrics()]


def _longest_contexts(config: BptConfig, measured: Measurements) -> dict[str, Longest]:
    """The longest context of each arm: for the transformer, for deeper ones, and with a large vocabulary."""
    every = arms(config.step)
    for depth in config.depths:
        deep = arms(replace(config.step, backbone=replace(config.step.backbone, layers=depth)))
        every |= {f"{name}, {depth} layers": arm for name, arm in deep.items() if name not in ("vanilla", "attn")}
    heads: dict[str, tuple[str, Head]] = {
        "SDPA, all logits": ("SDPA", "full"),
        "SDPA": ("SDPA", "torch"),
        "layer": ("layer", "ours"),
    }
    for name, (arm, head) in heads.items():
        large = replace(every[arm], vocabulary=config.large_vocabulary, head=head)
        every[f"{name}, V {config.large_vocabulary}"] = large
    search = partial(
        longest,
        budget=config.budget,
        starts=config.starts,
        computed=config.computed,
        tries=config.tries,
        measured=measured,
    )
    results = run_parallel(search, list(every.values()), jobs=config.jobs, label="longest contexts")
    return dict(zip(every, results, strict=True))


def _planned(config: BptConfig, measured: Measurements) -> dict[str, float]:
    """For each way to spend memory, by which share of the measured memory the planner is off at worst."""
    step = replace(config.step, vocabulary=64, attention="allocated", device="cpu", dtype="float32")
    points = [
        (name.partition(" of ")[0], replace(step, backbone=way, tokens=tokens))
        for tokens, layers in config.grid
        for name, way in ways(replace(step.backbone, layers=layers)).items()
    ]
    sizes = run_parallel(measured, [point for _, point in points], jobs=config.jobs, label="planner")
    worst: dict[str, float] = {}
    for (name, point), size in zip(points, sizes, strict=True):
        off = abs(plan(point.backbone, point.tokens).total / size.bytes - 1)
        worst[name] = max(off, worst.get(name, 0.0))
    return worst


def _seconds(config: BptConfig, measured: Measurements) -> dict[tuple[str, int], list[float]]:
    """Seconds of an arm at a length, by turns with the other arms."""
    seconds: dict[tuple[str, int], list[float]] = {}
    rounds = [(*where, turn) for where in config.timed for turn in range(config.repeats)]
    for tokens, layers, turn in track(rounds, "timing"):
        known = arms(replace(config.step, backbone=replace(config.step.backbone, layers=layers), goal="time"))
        for name in ("SDPA", "attn", "layer"):
            took = measured(replace(known[name], tokens=tokens), turn).seconds
            seconds.setdefault((name, tokens), []).append(took)
    return seconds


def _audited(config: BptConfig) -> dict[int, list[Result]]:
    """What the audit finds, by seed."""
    total = len(LIMITS) * config.shapes
    return {seed: list(track(audit(config.shapes, seed), f"audit, seed {seed}", total)) for seed in config.seeds}
