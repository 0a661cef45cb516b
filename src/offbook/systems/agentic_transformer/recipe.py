"""Do a policy's later trials profit from its earlier ones, or do they only look as if?

Source: Liu and Abbeel, "Emergent Agentic Transformer from Chain of Hindsight Experience" (2023).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from offbook.data.splits import ensure_split
from offbook.data.store import EpisodeStore
from offbook.learning.arms import Arm, fit_all
from offbook.learning.cloning import CloningConfig
from offbook.learning.datasets import generate
from offbook.learning.fit import FitConfig
from offbook.learning.hindsight_presets import decision_transformer
from offbook.learning.hindsight_training import HindsightConfig
from offbook.learning.offline import OfflineConfig
from offbook.runs.directory import RunDirectory
from offbook.runs.ledger import Claim, Dataset
from offbook.systems.agentic_transformer import claims
from offbook.systems.agentic_transformer.claims import AT, DT, FIXED, HIDDEN, HOPPER, LAST
from offbook.systems.agentic_transformer.experiments import Try, try_all
from offbook.systems.agentic_transformer.lengths import LongStep, measure
from offbook.systems.agentic_transformer.presets import AtStudy


def run(study: AtStudy, out: RunDirectory) -> list[Claim]:
    """Trains, tries and judges all of it; interrupted, it goes on from what the folder holds."""
    # Data: trials of different quality at points that are hidden or always the same, and a hopper's whole life.
    sizes = {HIDDEN: study.goals * 16, FIXED: study.goals * 16, HOPPER: study.hopper_steps}
    stores = {name: generate(name, size=size, jobs=study.jobs) for name, size in sizes.items()}
    # One group of trials, of which all seeds and learners, and other studies of these recordings, hold out the same.
    ensure_split(stores[HOPPER], 0.1)
    data = {name: Dataset(name=name, sha256=store.digest, episodes=len(store)) for name, store in stores.items()}

    # Model and learning: chains of trials and single ones, in equal numbers of steps; ablations; other learners.
    arms = {
        (name, kind, seed): Arm(store=store.path, config=config, folder=_folder(out, name, kind, seed))
        for name, store in stores.items()
        for kind, config in kinds(study, name).items()
        for seed in study.seeds
        for config in [replace(config, fit=replace(config.fit, seed=seed))]
    }
    others = {
        (name, seed): Arm(store=stores[HOPPER].path, config=config, folder=_folder(out, HOPPER, name, seed))
        for name, config in learners(study).items()
        for seed in study.seeds
        for config in [replace(config, fit=replace(config.fit, seed=seed))]
    }
    fit_all([*arms.values(), *others.values()], study.jobs)

    # Test: groups of trials on instances that nobody has seen; the last trial also after another group's trials.
    tries = {key: _try(study, key[0], stores[key[0]], arm, key[1]) for key, arm in arms.items()}
    hopper = {key: _try(study, HOPPER, stores[HOPPER], arm, key[0]) for key, arm in others.items()}
    played = try_all([*tries.values(), *hopper.values()], study.jobs)
    groups = {key: played[one] for key, one in tries.items()}
    lengths = {plain: measure(_long(study, plain, study.long)) for plain in (True, False)}
    shorter = {plain: measure(_long(study, plain, (32, 64))) for plain in (True, False)}

    # Record: each claim beside its limits, and a picture.
    claims.draw(study, out.path / "agentic_transformer.png", groups)
    return [
        claims.audit(study, FIXED, groups, data[FIXED]),
        claims.audit(study, HOPPER, groups, data[HOPPER], {key: played[one] for key, one in hopper.items()}),
        claims.context(study, groups, data[HIDDEN]),
        claims.ablation(study, groups, data[HIDDEN]),
        claims.sizes(study, groups, data[HIDDEN]),
        claims.lengths(study, lengths, shorter),
    ]


def kinds(study: AtStudy, name: str) -> dict[str, HindsightConfig]:
    """What is trained on a dataset, by name: on all a policy over trials and one over single ones."""
    full = study.hopper if name == HOPPER else study.point
    full = replace(full, n_trials=(study.trials, study.trials))
    single = decision_transformer(full)
    single = replace(single, fit=replace(single.fit, batch_size=study.trials * full.fit.batch_size))
    both = {AT: full, DT: single}
    if name != HIDDEN:
        return {**both, LAST: replace(full, loss_trials="last")}
    values = tuple(value for value in full.model.values if value != "done")
    return {
        **both,
        LAST: replace(full, loss_trials="last"),
        "AT, trials unsorted": replace(full, order="random"),
        "AT, each its own aim": replace(full, relabel="own"),
        "AT, no mark of success": replace(full, model=replace(full.model, values=values)),
        "AT, also shorter chains": replace(full, n_trials=(1, study.trials)),
        "AT, mean action": replace(full, model=replace(full.model, head="mse")),
        **{
            f"AT, width {width}": replace(full, model=replace(full.model, width=width))
            for width in study.widths
            if width != full.model.width
        },
    }


def learners(study: AtStudy) -> dict[str, OfflineConfig | CloningConfig]:
    """Other offline learners, for the hopper."""
    cloning = FitConfig(batch_size=256, learning_rate=1e-3, ema=0.99)
    found: dict[str, OfflineConfig | CloningConfig] = {
        "10 % BC": CloningConfig(top=0.1, chunk=1, execute=1, validate_every=study.offline_steps, fit=cloning),
        "IQL": OfflineConfig(algorithm="iql"),
        "TD3+BC": OfflineConfig(algorithm="td3bc"),
    }
    return {
        name: replace(config, fit=replace(config.fit, steps=study.offline_steps, device="cpu", threads=1))
        for name, config in found.items()
    }


def _folder(out: RunDirectory, name: str, kind: str, seed: int) -> Path:
    return out.path / name / f"{kind.replace(',', '').replace(' % ', '-').replace(' ', '-').replace('+', '-')}-{seed}"


def _try(study: AtStudy, name: str, store: EpisodeStore, arm: Arm, kind: str) -> Try:
    settings = json.dumps(store.schema.extra.get("recording", {}).get("settings", {}))
    groups = study.hidden_groups if name == HIDDEN else study.groups
    fresh = study.fresh if kind == DT else 0
    return Try(
        arm=arm, task=store.schema.environment, settings=settings, trials=study.trials, groups=groups, fresh=fresh,
        foreign=kind.startswith("AT"),
    )  # fmt: skip


def _long(study: AtStudy, plain: bool, long: tuple[int, int]) -> LongStep:
    sizes = replace(study.point.model, remat="attn")
    return LongStep(trials=long[0], steps=long[1], sizes=sizes, plain=plain)
