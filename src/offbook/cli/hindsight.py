"""`offbook train agentic_transformer` and `dt`: policies of a causal transformer over trials."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import tyro

from offbook.cli.learner import begun, opened
from offbook.cli.report import Report
from offbook.errors import ConfigError, needs_extra
from offbook.runs.config import with_presets
from offbook.runs.progress import note

with needs_extra("models"):
    from offbook.learning.cost import check_cost, measure_cost
    from offbook.learning.hindsight_presets import SINGLE, TRAINING, decision_transformer, tiny
    from offbook.learning.hindsight_training import ChainData, HindsightConfig, train_hindsight


@with_presets(TRAINING)
def train(
    *,
    data: Path,
    out: Path,
    resume: bool = False,
    encoder: Path | None = None,
    dry_run: bool = False,
    yes: bool = False,
    config: Annotated[HindsightConfig, tyro.conf.arg(name="")] = tiny(),  # noqa: B008 (frozen)
) -> Report:
    """Learns a policy that keeps its earlier trials in view: from chains of trials, the best one last.

    All trials of a chain are told to aim at the return of its best one. What it takes is told before it begins.

    Args:
        data: the recordings with rewards, a store that `offbook data` made.
        out: a new folder for the run.
        resume: continue the run in that folder after an interruption.
        encoder: a frozen encoder through which cameras are seen: a run of `offbook train encoder`, a folder of
            transformers or a file of a network's weights.
        dry_run: only tell what it would take: tokens, arithmetic, memory, hours on this machine.
        yes: train even if that takes more than a day.
        config: the chains, the network and its training.

    Examples:
        offbook train agentic_transformer --data stores/darkpoint --group seed --out runs/at
        offbook train agentic_transformer --data stores/hopper --out runs/at --n-trials 1 8 --dry-run
        offbook train agentic_transformer --data stores/hopper --out runs/quick --preset smoke
        offbook train agentic_transformer --data stores/hopper --out runs/at --resume
        offbook evaluate runs/at --trials 4
    """
    return _train(data, out, resume, encoder, dry_run, yes, config)


@with_presets(SINGLE)
def dt(
    *,
    data: Path,
    out: Path,
    resume: bool = False,
    encoder: Path | None = None,
    dry_run: bool = False,
    yes: bool = False,
    config: Annotated[HindsightConfig, tyro.conf.arg(name="")] = decision_transformer(tiny()),  # noqa: B008 (frozen)
) -> Report:
    """Learns a Decision Transformer: a policy that is told which return to aim at, from single trials.

    It is the Agentic Transformer with one trial in a chain.

    Args:
        data: the recordings with rewards, a store that `offbook data` made.
        out: a new folder for the run.
        resume: continue the run in that folder after an interruption.
        encoder: a frozen encoder through which cameras are seen: a run of `offbook train encoder`, a folder of
            transformers or a file of a network's weights.
        dry_run: only tell what it would take: tokens, arithmetic, memory, hours on this machine.
        yes: train even if that takes more than a day.
        config: the network and its training.

    Examples:
        offbook train dt --data stores/hopper --out runs/dt
        offbook train dt --data stores/hopper --out runs/dt --model.tokens split --model.head mse
        offbook train dt --data stores/hopper --out runs/quick --preset smoke
        offbook train dt --data stores/hopper --out runs/dt --resume
        offbook evaluate runs/dt
    """
    if config.n_trials[1] > 1:
        got, fix = " ".join(map(str, config.n_trials)), "run: offbook train agentic_transformer"
        raise ConfigError("--n-trials", expected="1 1, as it learns from single trials", got=got, fix=fix)
    return _train(data, out, resume, encoder, dry_run, yes, config)


def _train(
    data: Path, out: Path, resume: bool, encoder: Path | None, dry_run: bool, yes: bool, config: HindsightConfig
) -> Report:
    store, config, learn = opened(data, encoder, config, train_hindsight, config.fit.device)
    found = ChainData(store, config)  # refused, if at all, before a folder is made
    config = replace(config, parts=tuple(name for name, _ in found.observation.state))
    cost = measure_cost(found, found.build())
    if dry_run:
        return Report(text=str(cost), data=asdict(cost))
    note(str(cost))
    if not yes:
        check_cost(cost)
    run = begun(store, data, out, config, resume, config.fit.device)
    began = time.monotonic()
    policy = learn(store, config, run, resume=resume)
    seconds, last = time.monotonic() - began, run.metrics()[-1]
    held_out, task = last.get("held_out_loss"), store.schema.environment
    trials = "" if config.n_trials[1] == 1 else f" --trials {config.n_trials[1]}"
    lines = [
        f"learnt from {len(found.train)} episodes, {last['step']:.0f} steps in {seconds:.0f} s",
        f"loss {last['loss']:.4g}" + ("" if held_out is None else f", on what is held out {held_out:.4g}"),
        f"policy, aiming at a return of {policy.provenance['target']:.4g}, in {run.checkpoint()}",
        f"test it: offbook evaluate {out}{trials}" + ("" if task else " --task TASK") + " --episodes 50",
    ]
    return Report(
        text="\n".join(lines),
        data={
            "run": str(out),
            "policy": str(run.checkpoint()),
            "environment": task,
            "target": policy.provenance["target"],
            "returns": policy.provenance["returns"],
            "cost": asdict(cost),
            "seconds": seconds,
            "metrics": last,
        },
    )
