"""`offbook context`: what fits a memory, and whether blockwise layers compute what they should on this machine."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Annotated

import tyro

from offbook.cli.report import Report, table
from offbook.errors import ConfigError, needs_extra
from offbook.runs.progress import track

with needs_extra("models"):
    import torch

    from offbook.models.blockwise.audit import LIMITS, audit
    from offbook.models.blockwise.config import BackboneConfig
    from offbook.models.blockwise.plan import available, longest, ways, work
    from offbook.models.blockwise.plan import plan as planned
    from offbook.systems.bpt.measure import Step, measure

_SMALL = BackboneConfig(dim=256, layers=4, heads=4)
# By which share a plan may be off what is measured.
_OFF = 0.1
_UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_ELEMENTS = {"float32": 4, "bfloat16": 2, "float64": 8}


def plan(
    *,
    budget: str = "",
    tokens: int = 0,
    batch: int = 1,
    dtype: str = "float32",
    config: Annotated[BackboneConfig, tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands] = _SMALL,
) -> Report:
    """Says before a training run which context fits: the longest one for each way to spend memory, and what it costs.

    It counts the transformer alone: its activations, and the gradients of its weights. "work" is the arithmetic of a
    step at that length, as a multiple of one that computes nothing again.

    Args:
        budget: memory for a training step, such as 2GiB; by default what is free here.
        tokens: also the memory that so many tokens take; by default those of the longest context.
        batch: sequences at a time.
        dtype: of the activations: float32, bfloat16 or float64.
        config: the transformer.

    Examples:
        offbook context plan --budget 2GiB
        offbook context plan --budget 40GiB --dim 2048 --layers 24 --heads 16 --dtype bfloat16 --tokens 65536
    """
    if dtype not in _ELEMENTS:
        raise ConfigError("--dtype", expected=" or ".join(_ELEMENTS), got=repr(dtype), fix="choose one of them")
    for name, number in (("--tokens", tokens + 1), ("--batch", batch)):
        if number < 1:
            raise ConfigError(name, expected="a positive number", got=str(number), fix="choose one")
    room, element = _size(budget) if budget else available(torch.device("cpu")), _ELEMENTS[dtype]
    rows, data = [], []
    for name, way in ways(config).items():
        most = longest(way, room, batch, element)
        memory = planned(way, tokens or max(most, 1), batch, element)
        fits = memory.total <= room
        rows.append([name, f"{most:,}", f"{memory.total / 2**20:,.0f} MiB{'' if fits else ' (too much)'}",
                     memory.dominant, f"{work(way, tokens or most):.2f}"])  # fmt: skip
        data.append({"way": name, "longest": most, "bytes": memory.total, "dominant": memory.dominant, "fits": fits})
    shown = f"{tokens:,} tokens" if tokens else "that length"
    text = f"{room / 2**30:.2f} GiB, batch {batch}, {dtype}\n\n" + table(
        ["computes again", "longest context", f"memory at {shown}", "most of it", "work"], rows
    )
    return Report(text=text, data={"budget": room, "ways": data})


def bench(
    *,
    tokens: int = 4096,
    batch: int = 1,
    threads: int = 1,
    config: Annotated[BackboneConfig, tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands] = _SMALL,
) -> Report:
    """Measures a training step here, each in a process of its own, beside what was planned and the ordinary ways.

    Those are attention as a matrix (vanilla) and PyTorch's own (SDPA), both with checkpointed layers. The loss is over
    a small vocabulary, in chunks; "time" is that of the processor, as a share of SDPA's, of one step each. Exit code 1
    when a plan is off by more than a tenth.

    Args:
        tokens: of the sequence.
        batch: sequences at a time.
        threads: of the processor.
        config: the transformer.

    Examples:
        offbook context bench
        offbook context bench --tokens 16384 --layers 12
    """
    for name, number in (("--tokens", tokens), ("--batch", batch), ("--threads", threads)):
        if number < 1:
            raise ConfigError(name, expected="a positive number", got=str(number), fix="choose one")
    step = Step(backbone=config, tokens=tokens, batch=batch, threads=threads, vocabulary=64)
    arms = {"SDPA": replace(step, arm="sdpa"), "vanilla": replace(step, arm="vanilla")}
    arms |= {name: replace(step, backbone=way) for name, way in ways(config).items()}
    rows, data, beyond, least = [], [], [], 0.0
    for name, arm in track(arms.items(), "measuring", len(arms)):
        size, seconds = measure(arm).bytes, measure(replace(arm, goal="time")).seconds
        expected = planned(arm.backbone, tokens, batch).total if arm.arm == "blockwise" else None
        least = least or seconds
        off = None if expected is None else expected / size - 1
        beyond += [name] if off is not None and abs(off) > _OFF else []
        plan_words = ["-", "-"] if expected is None or off is None else [f"{expected / 2**20:,.0f} MiB", f"{off:+.0%}"]
        rows.append([name, f"{size / 2**20:,.0f} MiB", *plan_words, f"{seconds / least:.2f}"])
        data.append({"way": name, "bytes": size, "planned": expected, "seconds": seconds})
    text = f"{tokens:,} tokens, batch {batch}, float32\n\n" + table(["way", "memory", "planned", "off", "time"], rows)
    text += f"\n\nThe plan is off by more than a tenth: {', '.join(beyond)}." if beyond else ""
    return Report(text=text, data={"tokens": tokens, "ways": data, "beyond": beyond}, exit_code=int(bool(beyond)))


def check(*, shapes: int = 200, seed: int = 0) -> Report:
    """Audits blockwise layers on this machine: random backbones against a transformer written from the equations.

    Shapes, masks, norms, dropout and what is computed again are drawn at random. The error of an output or gradient is
    its largest difference from the reference in float64, as a share of its largest number; beside one that is beyond
    its limit stands that of plain operations in the same numbers. Exit code 1 when there is one.

    Args:
        shapes: how many backbones.
        seed: of their choice.

    Examples:
        offbook context check
        offbook context check --shapes 20 --seed 7
    """
    if shapes < 1:
        raise ConfigError("--shapes", expected="1 or more", got=str(shapes), fix="audit at least one")
    results = list(track(audit(shapes, seed), "auditing", 2 * shapes))
    rows, largest = [], {}
    for dtype, limit in LIMITS.items():
        of = [result for result in results if result.dtype == dtype]
        worst = max(of, key=lambda result: result.error)
        name = str(dtype).removeprefix("torch.")
        rows.append([name, len(of), f"{worst.error:.2g}", f"{limit:.2g}", worst.tensor])
        largest[name] = worst.error
    missed = [result for result in results if not result.ok]
    lines = [table(["numbers", "backbones", "largest error", "limit", "where"], rows), ""]
    for result in missed:
        # In float64 plain operations are the reference.
        beside = f" (plain operations: {result.plain:.2g})" if result.plain else ""
        lines.append(f"beyond: {result.error:.2g}{beside} in {result.tensor} of {result.case}")
    lines += [f"{len(missed)} of {len(results)} are beyond their limit" if missed else "All are within their limits."]
    data = {"beyond": len(missed), "results": len(results), "largest": largest}
    return Report(text="\n".join(lines), data=data, exit_code=1 if missed else 0)


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(\w*)", text)
    if not found or found[2] not in _UNITS or not float(found[1]):
        raise ConfigError("--budget", expected="a size such as 2GiB or 500MB", got=repr(text), fix="write it so")
    return int(float(found[1]) * _UNITS[found[2]])
