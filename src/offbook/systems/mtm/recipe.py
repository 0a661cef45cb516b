"""Does one masked model do as well as a specialist in each role, with less supervision, and what of it matters?

Source: Wu et al., "Masked Trajectory Models for Prediction, Representation, and Control" (2023).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from offbook.data.splits import ensure_split
from offbook.data.store import EpisodeStore
from offbook.learning.arms import fit_all
from offbook.learning.datasets import generate
from offbook.learning.hindsight_training import HindsightConfig
from offbook.learning.masked_training import MtmConfig
from offbook.learning.offline import OfflineConfig
from offbook.learning.specialists import SpecialistConfig
from offbook.runs.directory import RunDirectory
from offbook.runs.ledger import Claim, Dataset
from offbook.systems.mtm import claims
from offbook.systems.mtm.agents import learning_curves
from offbook.systems.mtm.experiments import Arm, Play, errors, play_all, without_actions
from offbook.systems.mtm.presets import MtmStudy

MAZE, HOPPER = "pointmaze-mixed", "hopper-replay"


def run(study: MtmStudy, out: RunDirectory) -> list[Claim]:
    """Trains, plays and judges all of it; interrupted, it goes on from what the folder holds."""
    # Data: recordings that the project makes itself, and copies of them in which few episodes have actions.
    stores = {MAZE: generate(MAZE, size=study.maze, jobs=study.jobs), HOPPER: generate(HOPPER, size=study.hopper)}
    for store in stores.values():
        ensure_split(store, 0.1)
    data = {name: Dataset(name=name, sha256=store.digest, episodes=len(store)) for name, store in stores.items()}
    partial = {
        (name, which, seed): EpisodeStore.open(path)
        for name, store in stores.items() for seed in study.seeds
        for which, path in zip(("all", "few"), without_actions(store, study.keep_actions, seed, out.path), strict=True)
    }  # fmt: skip

    # Model and learning: one model for all roles, specialists, masks of other kinds, offline reinforcement learners.
    models = {
        (name, seed): _arm(study, store, seed, out.path, "mtm")
        for name, store in stores.items()
        for seed in study.seeds
    }
    experts = {key: _specialists(study, stores[key[0]], key[1], out.path) for key in models}
    masks = {
        (pattern, seed): models[MAZE, seed] if study.model.patterns == (pattern,) else
        _arm(study, stores[MAZE], seed, out.path, f"mask-{pattern}", patterns=(pattern,))
        for pattern in study.patterns for seed in study.seeds
    }  # fmt: skip
    few = {key: _arm(study, store, key[2], out.path, f"actions-{key[1]}") for key, store in partial.items()}
    learners = {
        (name, seed): _learner(study, stores[HOPPER], seed, out.path, name)
        for name in ("DT", "IQL", "TD3+BC") for seed in study.seeds
    }  # fmt: skip
    every = [*models.values(), *(arm for of in experts.values() for arm in of.values()), *masks.values(), *few.values()]
    fit_all(list(dict.fromkeys([*every, *learners.values()])), study.jobs)

    # Test: errors on episodes held out, and episodes in the simulators; agents that learn on a model's features.
    cards = {key: errors(arm, experts[key]) for key, arm in models.items()}
    mask_cards = {key: errors(arm, experts[MAZE, key[1]]) for key, arm in masks.items()}
    few_cards = {key: errors(arm, {}) for key, arm in few.items()}
    plays = claims.Plays(
        few={key: _play(study, arm, stores[key[0]], "id") for key, arm in few.items()},
        hopper={
            (name, seed): _play(study, arm, stores[HOPPER], "rcbc")
            for seed in study.seeds
            for name, arm in _contenders(models[HOPPER, seed], experts[HOPPER, seed], learners, seed).items()
        },
        targets={
            (target, seed): _play(study, models[HOPPER, seed], stores[HOPPER], "rcbc", target)
            for target in study.targets for seed in study.seeds
        },
    )  # fmt: skip
    returns = play_all(plays.every, study.jobs)
    curves = learning_curves(study, out.path / "agents")

    # Record: each claim beside its limits, and pictures.
    claims.draw(study, out.path, cards, returns, plays, curves)
    return [
        *(
            claims.roles(study, name, {seed: cards[name, seed] for seed in study.seeds}, data[name], seeing)
            for name in stores for seeing in (1, study.model.model.length)
        ),
        *(claims.few_actions(study, name, few_cards, plays.few, returns, data[name]) for name in stores),
        claims.offline(study, plays, returns, data[HOPPER]),
        claims.masks(study, mask_cards, data[MAZE]),
        claims.features(study, curves),
    ]  # fmt: skip


def _arm(study: MtmStudy, store: EpisodeStore, seed: int, out: Path, name: str, **changes: object) -> Arm:
    config: MtmConfig = replace(study.model, fit=replace(study.model.fit, seed=seed), **changes)  # type: ignore[arg-type]
    return Arm(store=store.path, model=config, config=config, folder=out / store.path.name / f"{name}-{seed}")


def _specialists(study: MtmStudy, store: EpisodeStore, seed: int, out: Path) -> dict[str, Arm]:
    """An MLP for each role, for as many steps; with a model's history too, and for the best tenth of the episodes."""
    length, fit = study.model.model.length, replace(study.model.fit, seed=seed)
    kinds = {
        "MLP bc": SpecialistConfig(role="bc", fit=fit),
        f"MLP bc, {length} states": SpecialistConfig(role="bc", history=length, fit=fit),
        "MLP rcbc": SpecialistConfig(role="rcbc", fit=fit),
        f"MLP rcbc, {length} states": SpecialistConfig(role="rcbc", history=length, fit=fit),
        "MLP id": SpecialistConfig(role="id", fit=fit),
        "MLP fd": SpecialistConfig(role="fd", fit=fit),
        "10 % bc": SpecialistConfig(role="bc", top=0.1, fit=fit),
    }
    model = replace(study.model, fit=fit)
    folder = out / store.path.name
    return {
        name: Arm(store=store.path, model=model, config=kind, folder=folder / f"{name.replace(' ', '-')}-{seed}")
        for name, kind in kinds.items()
    }


def _learner(study: MtmStudy, store: EpisodeStore, seed: int, out: Path, name: str) -> Arm:
    """A transformer that is told its return, or an offline reinforcement learner."""
    config: HindsightConfig | OfflineConfig = study.transformer
    if name != "DT":
        config = OfflineConfig(algorithm="iql" if name == "IQL" else "td3bc")
        config = replace(config, fit=replace(config.fit, steps=study.offline_steps, device="cpu", threads=1))
    config = replace(config, fit=replace(config.fit, seed=seed))
    folder = out / store.path.name / f"{name.replace('+', '')}-{seed}"
    return Arm(store=store.path, model=study.model, config=config, folder=folder)


def _contenders(model: Arm, experts: dict[str, Arm], learners: dict[tuple[str, int], Arm], seed: int) -> dict[str, Arm]:
    players = {name: arm for name, arm in experts.items() if "id" not in name and "fd" not in name}
    return {"MTM": model, **players, **{name: arm for (name, of), arm in learners.items() if of == seed}}


def _play(study: MtmStudy, arm: Arm, store: EpisodeStore, role: str, target: float = 1.0) -> Play:
    return Play(arm=arm, task=store.schema.environment, episodes=study.episodes, role=role, target=target)
