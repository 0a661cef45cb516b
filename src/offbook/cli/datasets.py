"""`offbook data generate`, `reward` and `split`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import tyro

from offbook.cli.data import described
from offbook.cli.report import Report, table
from offbook.errors import needs_extra


def generate(
    name: tyro.conf.Positional[str | None] = None,
    *,
    out: Path | None = None,
    seed: int = 0,
    size: int | None = None,
    jobs: int = 1,
) -> Report:
    """Makes one of the project's own datasets, or lists them; nothing is downloaded.

    It is kept in the cache folder ($OFFBOOK_CACHE, or ~/.cache/offbook) and made only once. Interrupted, the same
    command goes on where it stopped. Its digest is that of the reference, as long as simulator versions agree.

    Args:
        name: of the dataset; none for the list.
        out: folder of the store, instead of one in the cache folder.
        seed: of everything random; 0 is the dataset that results are stated for.
        size: how many episodes (for a replay: steps), instead of the whole dataset's.
        jobs: worker processes; the store does not depend on how many. A replay uses one.

    Examples:
        offbook data generate
        offbook data generate pointmaze-mixed --jobs 2
        offbook data generate minigrid-bot --size 20 --out stores/bot
    """
    with needs_extra("sim"), needs_extra("models"):
        from offbook.learning import datasets
    if name is None:
        rows = [[key, made.env_id, f"{made.size} {made.unit}", made.about] for key, made in datasets.DATASETS.items()]
        listed = [
            {"name": key, "environment": made.env_id, "size": made.size, "unit": made.unit, "about": made.about}
            for key, made in datasets.DATASETS.items()
        ]
        return Report(text=table(["dataset", "environment", "size", "what is in it"], rows), data={"datasets": listed})
    store = datasets.generate(name, out, seed=seed, size=size, jobs=jobs)
    made, report = datasets.DATASETS[name], described(store)
    if seed != 0 or (size or made.size) != made.size or not made.digest:
        return report
    same = store.digest == made.digest
    said = (
        "The digest is the reference's."
        if same
        else f"The reference has the digest {made.digest}: other versions of simulator or libraries made that one."
    )
    return replace(report, text=f"{report.text}\n\n{said}", data={**report.data, "reference_digest": made.digest})


def reward(store: tyro.conf.Positional[Path], *, task: str, out: Path) -> Report:
    """Copies recordings and gives them the rewards of a task of the DeepMind control suite.

    They are worked out from the state of the physics, which the recordings must hold as the observation "physics";
    those of ExoRL get them while they are imported: offbook data import exorl:FOLDER --task TASK.

    Args:
        store: folder of the recordings.
        task: such as dmc:walker-run, of the body that was recorded.
        out: folder of the new store, new or empty.

    Examples:
        offbook data reward stores/explore --task dmc:walker-run --out stores/run
    """
    from offbook.data.store import EpisodeStore

    with needs_extra("sim"):
        from offbook.sim.rewards import add_rewards
    return described(add_rewards(EpisodeStore.open(store), task, out))


def split(store: tyro.conf.Positional[Path], *, held_out: float = 0.1, seed: int = 0) -> Report:
    """Draws which episodes are held out, and keeps that with the store: every training then learns from the others.

    Args:
        store: folder of the store.
        held_out: share of the episodes, between 0 and 1.
        seed: the same seed gives the same split.

    Examples:
        offbook data split stores/pour
        offbook data split stores/pour --held-out 0.2 --seed 1
    """
    from offbook.data.splits import draw_split, write_splits
    from offbook.data.store import EpisodeStore

    opened = EpisodeStore.open(store)
    drawn = draw_split(opened, held_out, seed)
    write_splits(opened, drawn)
    text = f"{store}: {len(drawn['train'])} episodes to train on, {len(drawn['held_out'])} held out."
    return Report(text=text, data={"path": store, "splits": {name: ids.tolist() for name, ids in drawn.items()}})
