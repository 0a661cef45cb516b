"""Which representation and which policy do best once they are tested, and what is left of it where things are new?

Source: Zhou et al., "Train Offline, Test Online: A Real Robot Learning Benchmark" (2023).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from offbook.data.store import EpisodeStore
from offbook.learning.arms import Arm, fit_all
from offbook.learning.datasets import generate
from offbook.learning.hindsight_presets import decision_transformer
from offbook.learning.self_supervised import Method
from offbook.runs.directory import RunDirectory, write_atomic
from offbook.runs.ledger import Claim, Dataset
from offbook.systems.toto import claims
from offbook.systems.toto.claims import ANCHORS, OWN, Key
from offbook.systems.toto.experiments import Eyes, Play, play_all
from offbook.systems.toto.presets import TotoStudy


def run(study: TotoStudy, out: RunDirectory) -> list[Claim]:
    """Trains, plays and judges all of it; interrupted, it goes on from what the folder holds."""
    # Data: each task done by a scripted expert, a quarter of the episodes with faults; test arrangements are drawn.
    stores = {task: generate(task, size=study.recorded, jobs=study.jobs) for task in study.tasks}
    data = {task: Dataset(name=task, sha256=store.digest, episodes=len(store)) for task, store in stores.items()}

    # Model: encoders from the same frames, and their features of all recordings, made once.
    eyes: dict[tuple[str, str, int], Eyes] = {
        (task, method, seed): _eyes(study, stores[task], method, seed, out.path / task)
        for task in study.tasks for method in study.representations for seed in study.seeds
    }  # fmt: skip
    fit_all([*eyes.values()], study.jobs)

    # Learn: every policy on every representation, and cloning with eyes of its own.
    arms: dict[Key, Arm] = {}
    for task, store in stores.items():
        for seed in study.seeds:
            for representation, name, config in kinds(study, seed):
                encoder = None if representation == OWN else eyes[task, representation, seed].folder
                folder = out.path / task / representation.replace(" ", "-") / f"{_plain(name)}-{seed}"
                arms[task, representation, name, seed] = Arm(
                    store=store.path, config=config, folder=folder, encoder=encoder
                )
    fit_all([*arms.values()], study.jobs)

    # Test: the same episodes for all, on what was recorded; and on what is new for policies on one representation.
    plays = {
        (key, split): Play(
            policy=arm, folder=arm.folder / "plays", task=stores[key[0]].schema.environment, split=split,
            episodes=study.trials,
        )
        for key, arm in arms.items() for split in (study.splits if key[1] == study.main else study.splits[:1])
    }  # fmt: skip
    plays |= {
        ((task, name, name, 0), split): Play(
            policy=name, folder=out.path / task / name.replace(" ", "-"), task=store.schema.environment, split=split,
            episodes=study.trials,
        )
        for task, store in stores.items() for name in ANCHORS for split in study.splits
    }  # fmt: skip
    evaluations = play_all([*plays.values()], study.jobs)
    found = {key: evaluations[play] for key, play in plays.items()}

    # Record: each claim beside its limits, a table and a picture.
    claims.draw(study, out.path / "toto.png", found)
    write_atomic(out.path / "table.md", claims.table(study, found))
    return [
        claim(study, task, found, data[task])
        for task in study.tasks
        for claim in (claims.anchors, claims.cloning, claims.policies, claims.drops, claims.seeing)
    ]


def kinds(study: TotoStudy, seed: int) -> Iterator[tuple[str, str, Any]]:
    """What is trained with a seed: representation, name of the policy, settings."""
    chains = replace(study.transformer, fit=replace(study.transformer.fit, seed=seed))
    for representation in (*study.representations, OWN):
        cloning = study.own if representation == OWN else study.cloning
        cloning = replace(cloning, fit=replace(cloning.fit, seed=seed))
        yield representation, "BC, H=1", replace(cloning, chunk=1, execute=1)
        yield representation, f"BC, H={cloning.chunk}", cloning
        if representation == OWN:
            return
        yield representation, "VINN", replace(study.vinn, seed=seed)
        yield representation, "IQL", replace(study.offline, fit=replace(study.offline.fit, seed=seed))
        batch = chains.n_trials[1] * chains.fit.batch_size
        yield representation, "DT", replace(decision_transformer(chains), fit=replace(chains.fit, batch_size=batch))
        yield representation, "MTM", replace(study.masked, fit=replace(study.masked.fit, seed=seed))
        yield representation, "AT", chains


def _eyes(study: TotoStudy, store: EpisodeStore, method: Method, seed: int, out: Path) -> Eyes:
    config = replace(study.encoder, method=method, fit=replace(study.encoder.fit, seed=seed))
    return Eyes(store=store.path, config=config, folder=out / f"eyes-{method}-{seed}")


def _plain(name: str) -> str:
    return "".join(letter for letter in name if letter.isalnum())
