"""`offbook train`: learning from recordings."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from offbook.cli.learner import begun, opened
from offbook.cli.report import Report
from offbook.client.protocol import ObservationSpec
from offbook.data.store import EpisodeStore
from offbook.errors import ConfigError, needs_extra
from offbook.runs.config import with_presets

with needs_extra("models"):
    from offbook.learning.actor_critic import Algorithm
    from offbook.learning.cloning import CloningConfig, check_cloning, train_cloning
    from offbook.learning.fit import FitConfig
    from offbook.learning.offline import OfflineConfig, check_offline, train_offline
    from offbook.learning.vinn import VinnConfig, check_vinn, train_vinn

C = TypeVar("C", CloningConfig, OfflineConfig, VinnConfig)


def smoke() -> CloningConfig:
    """Seconds: shows that everything is wired, learns little."""
    fit = FitConfig(steps=60, batch_size=64, warmup=10, ema=0.9, log_every=10, checkpoint_every=30, threads=1)
    return CloningConfig(hidden=64, validate_every=30, fit=fit)


def tiny() -> CloningConfig:
    """A minute or so on two cores: tens of episodes, state or small images."""
    return CloningConfig()


PRESETS: dict[str, Callable[[], CloningConfig]] = {"smoke": smoke, "tiny": tiny}


def offline_smoke(algorithm: Algorithm) -> OfflineConfig:
    """Seconds: shows that everything is wired, learns little."""
    config = OfflineConfig(algorithm=algorithm)
    fit = replace(config.fit, steps=60, batch_size=64, log_every=10, checkpoint_every=30, threads=1)
    return replace(config, hidden=64, save_every=30, fit=fit)


def offline_tiny(algorithm: Algorithm) -> OfflineConfig:
    """Minutes on two cores, for CQL up to an hour: the papers' settings for a fiftieth of their steps."""
    return OfflineConfig(algorithm=algorithm)


def offline_presets(algorithm: Algorithm) -> dict[str, Callable[[], OfflineConfig]]:
    """The presets of one algorithm."""
    return {"smoke": partial(offline_smoke, algorithm), "tiny": partial(offline_tiny, algorithm)}


@with_presets(PRESETS)
def bc(
    *,
    data: Path,
    out: Path,
    resume: bool = False,
    encoder: Path | None = None,
    config: Annotated[CloningConfig, tyro.conf.arg(name="")] = tiny(),  # noqa: B008 (frozen)
) -> Report:
    """Clones the recorded behaviour: a policy that answers observations as the recordings do.

    Args:
        data: the recordings, a store that `offbook data` made.
        out: a new folder for the run.
        resume: continue the run in that folder after an interruption.
        encoder: a frozen encoder through which cameras are seen, instead of an own one: a run of `offbook train
            encoder`, a folder of transformers or a file of a network's weights.
        config: the network and its training.

    Examples:
        offbook train bc --data recordings/pour --out runs/bc
        offbook train bc --data recordings/hopper --out runs/best-tenth --top 0.1 --chunk 1 --execute 1
        offbook train bc --data recordings/pour --out runs/bc-images --parts joints --cameras front
        offbook train bc --data recordings/pour --out runs/seeing --parts joints --encoder runs/byol
        offbook train bc --data recordings/pour --out runs/queries --parts joints --cameras front --body transformer
        offbook train bc --data recordings/pour --out runs/quick --preset smoke --fit.steps 100
        offbook train bc --data recordings/pour --out runs/bc --resume
    """
    return _train(data, out, resume, encoder, config, check_cloning, train_cloning)


@with_presets({"smoke": VinnConfig, "tiny": VinnConfig})
def vinn(
    *,
    data: Path,
    out: Path,
    resume: bool = False,
    encoder: Path | None = None,
    config: Annotated[VinnConfig, tyro.conf.arg(name="")] = VinnConfig(),  # noqa: B008 (frozen)
) -> Report:
    """Imitates by nearest neighbours: does what was done where the recordings looked most alike. Nothing is trained.

    Args:
        data: the recordings, a store that `offbook data` made.
        out: a new folder for the run.
        resume: continue the run in that folder after an interruption.
        encoder: a frozen encoder through which cameras are seen: a run of `offbook train encoder`, a folder of
            transformers or a file of a network's weights.
        config: what is compared, and how.

    Examples:
        offbook train vinn --data recordings/pour --out runs/vinn --parts joints --encoder runs/byol
        offbook train vinn --data recordings/pour --out runs/vinn --parts joints --encoder runs/byol --chunk 50
    """
    return _train(data, out, resume, encoder, config, check_vinn, train_vinn)


@with_presets(offline_presets("iql"))
def iql(
    *,
    data: Path,
    out: Path,
    resume: bool = False,
    encoder: Path | None = None,
    config: Annotated[OfflineConfig, tyro.conf.arg(name="")] = offline_tiny("iql"),  # noqa: B008 (frozen)
) -> Report:
    """Learns from recorded rewards by implicit Q-learning: recorded actions, weighted by how much they gain.

    Args:
        data: the recordings with rewards, a store that `offbook data` made.
        out: a new folder for the run.
        resume: continue the run in that folder after an interruption.
        encoder: a frozen encoder through which cameras are seen: a run of `offbook train encoder`, a folder of
            transformers or a file of a network's weights.
        config: the networks and their training.

    Examples:
        offbook train iql --data recordings/hopper --out runs/iql
        offbook train iql --data recordings/maze --out runs/iql-maze --expectile 0.9 --beta 10 --reward-shift -1
        offbook train iql --data recordings/hopper --out runs/quick --preset smoke --fit.steps 100
        offbook train iql --data recordings/hopper --out runs/iql --resume
    """
    return _offline("iql", data, out, resume, encoder, config)


@with_presets(offline_presets("td3bc"))
def td3bc(
    *,
    data: Path,
    out: Path,
    resume: bool = False,
    encoder: Path | None = None,
    config: Annotated[OfflineConfig, tyro.conf.arg(name="")] = offline_tiny("td3bc"),  # noqa: B008 (frozen)
) -> Report:
    """Learns from recorded rewards by TD3 with behaviour cloning: the best valued action near a recorded one.

    Args:
        data: the recordings with rewards, a store that `offbook data` made.
        out: a new folder for the run.
        resume: continue the run in that folder after an interruption.
        encoder: a frozen encoder through which cameras are seen: a run of `offbook train encoder`, a folder of
            transformers or a file of a network's weights.
        config: the networks and their training.

    Examples:
        offbook train td3bc --data recordings/hopper --out runs/td3bc
        offbook train td3bc --data recordings/hopper --out runs/bolder --alpha 5
        offbook train td3bc --data recordings/hopper --out runs/quick --preset smoke --fit.steps 100
        offbook train td3bc --data recordings/hopper --out runs/td3bc --resume
    """
    return _offline("td3bc", data, out, resume, encoder, config)


@with_presets(offline_presets("cql"))
def cql(
    *,
    data: Path,
    out: Path,
    resume: bool = False,
    encoder: Path | None = None,
    config: Annotated[OfflineConfig, tyro.conf.arg(name="")] = offline_tiny("cql"),  # noqa: B008 (frozen)
) -> Report:
    """Learns from recorded rewards by conservative Q-learning: values that are low where nothing was recorded.

    Args:
        data: the recordings with rewards, a store that `offbook data` made.
        out: a new folder for the run.
        resume: continue the run in that folder after an interruption.
        encoder: a frozen encoder through which cameras are seen: a run of `offbook train encoder`, a folder of
            transformers or a file of a network's weights.
        config: the networks and their training.

    Examples:
        offbook train cql --data recordings/hopper --out runs/cql
        offbook train cql --data recordings/hopper --out runs/bolder --cql-alpha 1
        offbook train cql --data recordings/hopper --out runs/quick --preset smoke --fit.steps 100
        offbook train cql --data recordings/hopper --out runs/cql --resume
    """
    return _offline("cql", data, out, resume, encoder, config)


def _offline(
    algorithm: Algorithm, data: Path, out: Path, resume: bool, encoder: Path | None, config: OfflineConfig
) -> Report:
    if config.algorithm != algorithm:
        fix = f"run: offbook train {config.algorithm}"
        raise ConfigError("--algorithm", expected=algorithm, got=config.algorithm, fix=fix)
    return _train(data, out, resume, encoder, config, check_offline, train_offline)


def _train(
    data: Path,
    out: Path,
    resume: bool,
    encoder: Path | None,
    config: C,
    check: Callable[[EpisodeStore, C], ObservationSpec],
    train: Callable[..., Any],
) -> Report:
    device: Literal["auto", "cpu"] = "auto" if isinstance(config, VinnConfig) else config.fit.device
    store, config, train = opened(data, encoder, config, train, device)
    # Resolved and written down, so that the run's folder says what the policy looks at.
    parts = tuple(name for name, _ in check(store, config).state)
    config = replace(config, parts=parts)
    run = begun(store, data, out, config, resume, device)
    began = time.monotonic()
    policy = train(store, config, run, resume=resume)
    seconds = time.monotonic() - began
    last = run.metrics()[-1]
    held_out = last.get("held_out_loss")
    seen: ObservationSpec = policy.meta.observation
    task = store.schema.environment
    eyes = ", ".join([*(name for name, _ in seen.state), *(f"camera {name}" for name in seen.cameras)])
    took = f"{last['step']:.0f} steps in {seconds:.0f} s" if "loss" in last else f"{last['steps']:.0f} steps remembered"
    losses = [f"loss {last['loss']:.4g}"] if "loss" in last else []
    losses += [] if held_out is None else [f"on episodes held out {held_out:.4g}"]
    lines = [
        f"learnt from {eyes}: {policy.provenance['recordings']['episodes']} episodes, {took}",
        ", ".join(losses),
        f"policy in {run.checkpoint()}",
        f"test it: offbook evaluate {out}" + ("" if task else " --task TASK") + " --episodes 50",
    ]
    return Report(
        text="\n".join(filter(None, lines)),
        data={
            "run": str(out),
            "policy": str(run.checkpoint()),
            "environment": task,
            "seconds": seconds,
            "metrics": last,
        },
    )
