"""`offbook train mtm`: one model of masked trajectories for every role."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from offbook.cli.learner import begun, opened
from offbook.cli.report import Report, interval_text, table
from offbook.errors import DataError, needs_extra
from offbook.runs.config import with_presets
from offbook.runs.directory import RunDirectory, write_atomic
from offbook.runs.progress import note

with needs_extra("models"):
    from offbook.learning.encoding import EncodedPolicy
    from offbook.learning.masked_roles import FILL, RolePolicy
    from offbook.learning.masked_training import MtmConfig, train_mtm, trajectories
    from offbook.learning.specialists import Specialist, SpecialistConfig, train_specialist
    from offbook.learning.trajectories import Trajectories
    from offbook.systems.mtm.card import Row, draw_card, role_card
    from offbook.systems.mtm.presets import TRAINING, tiny_model


@with_presets(TRAINING)
def train(
    *,
    data: Path,
    out: Path,
    resume: bool = False,
    encoder: Path | None = None,
    specialists: bool = False,
    config: Annotated[MtmConfig, tyro.conf.arg(name="")] = tiny_model(),  # noqa: B008 (frozen)
) -> Report:
    """Learns to fill in what is hidden of trajectories: one model that clones, aims, predicts and plans.

    At the end stands the role card: how far off the model is in each role on episodes held out, beside simple rules.
    Episodes without actions or rewards are learnt from too.

    Args:
        data: the recordings, a store that `offbook data` made.
        out: a new folder for the run.
        resume: continue the run in that folder after an interruption.
        encoder: a frozen encoder through which cameras are seen: a run of `offbook train encoder`, a folder of
            transformers or a file of a network's weights.
        specialists: train an MLP for each role too, and put them on the card.
        config: the model and its training.

    Examples:
        offbook train mtm --data stores/hopper --out runs/mtm
        offbook train mtm --data stores/hopper --out runs/mtm --resume --specialists
        offbook train mtm --data stores/maze --out runs/long --model.length 16 --patterns auto waypoints
        offbook train mtm --data stores/maze --out runs/quick --preset smoke --role bc
        offbook train mtm --data stores/pour --parts joints --encoder runs/byol --out runs/seeing
        offbook evaluate runs/mtm
        offbook evaluate runs/mtm:bc runs/mtm:rcbc:0.9 runs/mtm:plan
    """
    store, config, learn = opened(data, encoder, config, train_mtm, config.fit.device)
    found = trajectories(store, config)
    found.sampler(config.model.length)  # refused, if at all, before a folder is made
    config = replace(config, parts=found.parts)
    run = begun(store, data, out, config, resume, config.fit.device)
    began = time.monotonic()
    learnt = learn(store, config, run, resume=resume)
    policy: RolePolicy = learnt.inner if isinstance(learnt, EncodedPolicy) else learnt
    seconds = time.monotonic() - began
    card: list[Row] = []
    if found.held_out_sampler(config.model.length) is None:
        note(f"no role card: no episode is held out that has a window of {config.model.length} steps")
    else:
        others = _specialists(found, config, run) if specialists else {}
        card = role_card(policy.module, found, others)
        write_atomic(out / "card.json", json.dumps([row.to_json() for row in card], indent=1) + "\n")
        draw_card(out / "card.png", card, f"{store.schema.environment or store.path.name}: errors in each role")
    last = run.metrics()[-1]
    task = store.schema.environment
    lines = [
        f"learnt from {len(found.train)} episodes, {last['step']:.0f} steps in {seconds:.0f} s",
        *([card_text(card), f"the same as a picture: {out / 'card.png'}"] if card else []),
        f"model, as a policy in the role {policy.role}, in {run.checkpoint()}",
    ]
    if policy.role != FILL:
        lines.append(f"test it: offbook evaluate {out}" + ("" if task else " --task TASK") + " --episodes 50")
    return Report(
        text="\n".join(lines),
        data={
            "run": str(out),
            "policy": str(run.checkpoint()),
            "role": policy.role,
            "environment": task,
            "seconds": seconds,
            "metrics": last,
            "card": [row.to_json() for row in card],
        },
    )


def _specialists(data: Trajectories, config: MtmConfig, run: RunDirectory) -> Mapping[str, Specialist]:
    """An MLP for each role, trained for as many steps; those of an earlier call are kept."""
    length = config.model.length
    wanted = {
        "MLP, bc": SpecialistConfig(role="bc"),
        f"MLP, bc on {length} states": SpecialistConfig(role="bc", history=length),
        "MLP, rcbc": SpecialistConfig(role="rcbc"),
        "MLP, id": SpecialistConfig(role="id"),
        "MLP, fd": SpecialistConfig(role="fd"),
    }
    found = {}
    for name, specialist in wanted.items():
        if all(modality in data.sizes for modality, _ in (*specialist.reads, specialist.tells)):
            note(f"training the specialist {name}")
            chosen = replace(specialist, fit=config.fit)
            folder = RunDirectory.create(run.path / "specialists" / name.replace(" ", "-"), chosen, resume=True)
            try:
                found[name] = train_specialist(data, chosen, folder, resume=True)
            except DataError as error:  # all that it needs is there, but in no episode together
                note(f"{name} is left out: {error}")
    return found


def card_text(rows: Sequence[Row]) -> str:
    """The role card as a table."""
    lines = [
        [row.role if first else "", name, interval_text(interval.to_json())]
        for row in rows
        for first, (name, interval) in zip((True, *[False] * len(row.errors)), row.errors.items(), strict=False)
    ]
    return table(["role", "who tells", "error on held-out episodes"], lines)
