"""Does an agent learn faster when it is paid for states that are new among those of about the same value?

Source: Kim et al., "Accelerating Reinforcement Learning with Value-Conditional State Entropy Exploration" (2023).
"""

from __future__ import annotations

import json

from offbook.runs.config import to_json
from offbook.runs.directory import RunDirectory, write_atomic
from offbook.runs.ledger import Claim
from offbook.systems.vcse import claims
from offbook.systems.vcse.experiments import lives
from offbook.systems.vcse.presets import VcseStudy, paper


def run(study: VcseStudy, out: RunDirectory) -> list[Claim]:
    """Lets agents live, and judges their curves; interrupted, it goes on from what the folder holds."""
    # Data: none; agents meet their tasks. Model, learn, test: for each task and seed one agent without a bonus and one
    # with each; all begin with the same weights, and are looked at on the same episodes in worlds kept for that.
    curves = lives(study, out.path)

    # Record: each task beside what the paper says, all of them together, a table, a picture and the published size.
    write_atomic(out.path / "paper.json", json.dumps(to_json(paper()), indent=2) + "\n")
    claims.draw(study, out.path / "vcse.png", curves)
    write_atomic(out.path / "table.md", claims.table(study, curves))
    alone = [claims.task(study, one, curves) for one in study.tasks]
    grids = [claims.together(study, curves)] if any(one.algorithm == "a2c" for one in study.tasks) else []
    return [*alone, *grids, claims.conditioning(study, curves)]
