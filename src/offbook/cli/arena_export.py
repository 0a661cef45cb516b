"""`offbook arena export`: what robots and policies did in an arena, as recordings to learn from."""

from __future__ import annotations

from pathlib import Path

import tyro

from offbook.cli.access import URL
from offbook.cli.report import Report
from offbook.client.submit import ArenaClient
from offbook.errors import needs_extra


def export(
    submission: tyro.conf.Positional[str],
    out: tyro.conf.Positional[Path],
    *,
    films: Path | None = None,
    url: str = URL,
) -> Report:
    """Keeps the trials of a submission as a store of episodes: states, actions, rewards, and which steps came late.

    From there `offbook data export` writes LeRobotDataset v3.0 or Minari, and `offbook train` learns. The last
    observation of a trial is its final one: the action of its last step is left out. Trials that cannot be kept, such
    as those of one step, are left out and told.

    Args:
        submission: its id.
        out: folder of the store, new or empty.
        films: also keep the films in this folder.
        url: address of the arena.

    Examples:
        offbook arena export 7 stores/trials
        offbook arena export 7 stores/trials --films films
    """
    with needs_extra("arena"):
        from offbook.arena.export import read_trials
    from offbook.data.formats import new_folder, write_whole

    folder, left_out = new_folder(out), dict[int, str]()
    with ArenaClient(url) as arena:
        trials = read_trials(arena, submission, films, left_out.__setitem__)
        store = write_whole(trials, f"submission {submission}", folder, "fetching")
    lines = [f"{out} holds {len(store)} trials, {store.steps} steps, of submission {submission}."]
    for why in dict.fromkeys(left_out.values()):
        slots = [slot for slot, its in left_out.items() if its == why]
        lines.append(f"Left out, because {why}: {len(slots)}, trial {', '.join(map(str, slots))}")
    told = [{"trial": slot, "why": why} for slot, why in left_out.items()]
    data = {"path": str(out), "episodes": len(store), "steps": store.steps, "left_out": told}
    return Report(text="\n".join(lines), data=data)
