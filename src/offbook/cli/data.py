"""`offbook data record`, `import`, `info`, `check` and `export`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from offbook.cli.report import Report, table
from offbook.errors import ConfigError, needs_extra

if TYPE_CHECKING:
    import numpy as np

    from offbook.data.store import EpisodeStore

_QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)


def record(
    env: tyro.conf.Positional[str],
    *,
    out: Path,
    episodes: int = 50,
    policy: Literal["expert", "random", "drift"] = "expert",
    grades: tuple[float, ...] = (1.0,),
    trials: int = 1,
    split: str | None = None,
    image_size: int | None = None,
    seed: int = 0,
    jobs: int = 1,
) -> Report:
    """Records episodes of a scripted expert or of random actions in a simulator.

    Interrupted, or asked for more episodes later, the same command goes on where it stopped.

    Args:
        env: library and environment, such as offbook:pour, gym:Hopper-v5 or metaworld:drawer-open-v3.
        out: folder of the store; a new one, or one that this command made.
        episodes: how many the store shall hold at the end.
        policy: the environment's scripted expert, random actions, or random ones that change slowly.
        grades: from 0 to 1 (flawless), given to the expert by turns: 1.0 0.5 makes every second episode a poor one.
        trials: how many episodes in a row are tries at one instance of the task.
        split: which arrangements of offbook:pour or offbook:scoop to draw: seen, position, object, lighting or all.
        image_size: width and height of the camera's picture; 0 for none.
        seed: seed of the recording.
        jobs: worker processes; the store does not depend on how many.

    Examples:
        offbook data record offbook:pour --episodes 50 --out stores/pour
        offbook data record gym:Hopper-v5 --policy random --episodes 20 --out stores/hopper
        offbook data record offbook:darkpoint --episodes 80 --trials 8 --grades 0.2 1.0 --out stores/dark
    """
    with needs_extra("sim"):
        from offbook.sim.recording import record as make_recording
    given = {"split": split, "image_size": image_size}
    store = make_recording(
        env,
        episodes,
        out,
        policy=policy,
        grades=grades,
        trials=trials,
        seed=seed,
        jobs=jobs,
        settings={key: value for key, value in given.items() if value is not None},
    )
    return described(store)


def import_recordings(
    source: tyro.conf.Positional[str], *, out: Path, env: str | None = None, task: str | None = None
) -> Report:
    """Brings recordings in from a format that others use.

    The store appears under its name when it is whole. Nothing is downloaded, and nothing in a file is run.

    Args:
        source: format and name: minari:ID is a dataset on this machine, where MINARI_DATASETS_PATH says, and
            minari:./FOLDER one anywhere; lerobot:FOLDER; d4rl:FILE.hdf5; robomimic:FILE.hdf5; exorl:FOLDER of .npz
            episodes; paths:FILE.pkl, a list of dicts; toto:FOLDER or toto:FOLDER@120x160; zarr:FOLDER or
            zarr:FILE.zarr.zip.
        out: folder of the store, new or empty.
        env: the environment that they are from, such as gym:Hopper-v5, where the recordings do not tell; it also gives
            the bounds of the actions, which otherwise are the range of those recorded, and the parts of an observation
            that was recorded as one array.
        task: of ExoRL's recordings, in place of --env: a task of the DeepMind control suite, such as walker-run, whose
            rewards are worked out from the physics and take the place of those recorded.

    Examples:
        offbook data import minari:D4RL/door/human-v2 --out stores/door
        offbook data import lerobot:downloads/so100-pick --out stores/pick
        offbook data import d4rl:hopper_medium-v2.hdf5 --env gym:Hopper-v5 --out stores/hopper
        offbook data import robomimic:low_dim_v141.hdf5 --out stores/lift
        offbook data import exorl:datasets/walker/proto --task walker-run --out stores/walker
        offbook data import paths:relocate-v0_demos.pickle --out stores/relocate
        offbook data import toto:cloud-dataset-pouring@120x160 --out stores/toto
        offbook data import zarr:pusht_cchi_v7_replay.zarr --out stores/pusht
    """
    from offbook.data.formats import Setting, import_dataset

    if env is not None and task is not None:
        fix = "leave --env out"
        raise ConfigError("--env", expected="either this or --task, which names it too", got="both", fix=fix)
    name = env or task
    if name is None:
        return described(import_dataset(source, out))
    with needs_extra("sim"):
        from offbook.sim.adapters import make
        from offbook.sim.rewards import TaskRewards
        from offbook.sim.spaces import action_spec, observation_spec
    rewards = None if task is None else TaskRewards(task)
    environment = name if rewards is None else rewards.task
    world = make(environment)
    try:
        observation, action = observation_spec(world.observation_space), action_spec(world.action_space)
    finally:
        world.close()
    setting = Setting(environment=environment, observation=observation, action=action, rewards=rewards)
    return described(import_dataset(source, out, setting=setting))


def export(store: tyro.conf.Positional[Path], target: tyro.conf.Positional[str]) -> Report:
    """Writes a store in a format that others read.

    Args:
        store: folder of the store.
        target: format and new name: minari:pour/expert-v0, minari:./FOLDER, lerobot:FOLDER for LeRobotDataset v3.0, or
            toto:FOLDER for joints, one camera and an amount at the end, as TOTO keeps its recordings.

    Examples:
        offbook data export stores/pour minari:pour/expert-v0
        offbook data export stores/pour lerobot:./pour-lerobot
        offbook data export stores/pour toto:./pour-toto
    """
    from offbook.data.formats import export_dataset, left_out
    from offbook.data.store import EpisodeStore

    opened = EpisodeStore.open(store)
    written = export_dataset(opened, target)
    lacking = left_out(opened, target)
    text = f"Wrote {len(opened)} episodes, {opened.steps} steps, to {written}."
    if lacking:
        text += f" The format has no place for {', '.join(lacking)}: left out."
    data = {"path": written, "episodes": len(opened), "steps": opened.steps, "left_out": lacking}
    return Report(text=text, data=data)


def info(store: tyro.conf.Positional[Path], *, plot: Path | None = None, verify: bool = False) -> Report:
    """Shows what a store holds: episodes, fields, returns, successes, size and digest.

    Args:
        store: folder of the store.
        plot: draw the distribution of returns and lengths to this file, such as returns.png.
        verify: read everything and compare it with its checksums.

    Examples:
        offbook data info stores/pour
        offbook data info stores/pour --plot returns.png
    """
    from offbook.data.store import EpisodeStore

    opened = EpisodeStore.open(store)
    if verify:
        opened.verify()
    if plot is not None:
        _draw(opened, plot)
    report = described(opened)
    if verify:
        report = replace(report, text=report.text + "\n\nAll values agree with their checksums.")
    return report


def check(store: tyro.conf.Positional[Path], *, repair: bool = False) -> Report:
    """Checks a store: files, checksums, NaN, bounds of actions, and whether actions stand beside their steps.

    The exit code is 1 when something is wrong. What may be meant so, such as actions beyond their bounds, is reported
    and no error.

    Args:
        store: folder of the store.
        repair: drop what an interrupted writer left behind the last finished episode; finished ones are never touched.

    Examples:
        offbook data check stores/pour
        offbook data check stores/pour --repair
        offbook data check stores/pour --json
    """
    from offbook.data.check import check_store

    found = check_store(store, repair=repair)
    rows = [[finding.check, finding.result, finding.text] for finding in found.findings]
    lines = [table(["check", "result", "found"], rows)]
    if found.repaired:
        lines.append(f"Repaired: {found.repaired}.")
    lines.append(f"{store} is sound." if found.sound else f"{store} is not sound.")
    data = {
        "path": store,
        "episodes": found.episodes,
        "steps": found.steps,
        "findings": [
            {"check": finding.check, "result": finding.result, "text": finding.text, **finding.details}
            for finding in found.findings
        ],
        "repaired": found.repaired,
    }
    return Report(text="\n\n".join(lines), data=data, exit_code=0 if found.sound else 1)


def described(store: EpisodeStore) -> Report:
    """What a store holds."""
    data = _facts(store)
    schema = store.schema
    rate = f" at {schema.rate_hz:g} Hz" if schema.rate_hz else ""
    lines = [
        f"{store.path}: {data['episodes']} episodes, {data['steps']} steps, {_size(data['bytes'])}",
        "",
        f"environment  {schema.environment or 'unknown'}{rate}",
        f"source       {schema.source or 'unknown'}",
        f"licence      {schema.licence or 'not stated'}",
        f"tasks        {data['tasks']}",
        f"success      {_share(data['success'])}",
        *([f"splits       {_groups(data)}"] if data["splits"] else []),
        f"digest       {data['digest']}",
        *(f"as imported  {line}" for line in data["as_imported"]),
        "",
        table(
            ["field", "role", "type", "shape", "units", "episodes"],
            [[f["name"], f["role"], f["dtype"], _shape(f["shape"]), f["units"], f["episodes"]] for f in data["fields"]],
        ),
    ]
    rows = [
        [name, *(f"{value:.4g}" for value in data[name].values())]
        for name in ("return", "length", "score")
        if data[name] is not None
    ]
    if rows:
        lines += ["", table(["each episode", "least", "10 %", "median", "90 %", "most", "mean"], rows)]
    return Report(text="\n".join(lines), data=data)


def _facts(store: EpisodeStore) -> dict[str, Any]:
    import numpy as np

    from offbook.data.splits import left_out, read_splits

    columns, schema = store.episodes, store.schema
    known = columns["success"][~np.isnan(columns["success"])]
    return {
        "path": store.path,
        "episodes": len(store),
        "steps": store.steps,
        "bytes": sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file()),
        "environment": schema.environment,
        "rate_hz": schema.rate_hz,
        "source": schema.source,
        "licence": schema.licence,
        "tasks": len(set(columns["task"].tolist()) - {""}),
        "success": {"known": len(known), "successes": int(known.sum())},
        "terminated": int(columns["terminated"].sum()),
        "truncated": int(columns["truncated"].sum()),
        "return": _spread(columns["return"]),
        "length": _spread(columns["length"]),
        "score": _spread(columns["score"]),
        "fields": [
            {
                "name": spec.name,
                "role": spec.role,
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "units": spec.units,
                "episodes": int(store.present(spec.name).sum()),
            }
            for spec in schema.fields
        ],
        "splits": {name: len(numbers) for name, numbers in read_splits(store).items()},
        "left_out": left_out(store),
        "digest": store.digest,
        "as_imported": _as_imported(schema.extra.get("import", {})),
    }


def _groups(data: dict[str, Any]) -> str:
    named = ", ".join(f"{name} {count}" for name, count in data["splits"].items())
    return f"{named}; {data['left_out']} in none: run offbook data split again" if data["left_out"] else named


def _as_imported(said: Mapping[str, Any]) -> list[str]:
    """What a user should know of how a foreign file was read."""
    recorded = "the bounds of the actions are the range of those recorded"
    return [*said.get("stated", ()), *[recorded] * (said.get("bounds") == "recorded")]


def _spread(values: np.ndarray) -> dict[str, float] | None:
    """Quantiles and mean of the known values; None where none is known."""
    import numpy as np

    known = values[np.isfinite(values)]
    if not len(known):
        return None
    names = ("least", "q10", "median", "q90", "most")
    return {**dict(zip(names, np.quantile(known, _QUANTILES).tolist(), strict=True)), "mean": float(known.mean())}


def _share(success: dict[str, int]) -> str:
    if not success["known"]:
        return "unknown"
    return f"{success['successes']} of {success['known']} episodes ({success['successes'] / success['known']:.0%})"


def _shape(shape: list[int]) -> str:
    return " x ".join(map(str, shape)) or "1"


def _size(count: int) -> str:
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"


def _draw(store: EpisodeStore, file: Path) -> None:
    """Two histograms, of returns and of lengths; returns are coloured by success where that is known."""
    import numpy as np

    from offbook.runs.directory import atomic_path

    with needs_extra("models"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    if file.suffix.lstrip(".") not in figure.canvas.get_supported_filetypes():
        raise ConfigError(
            f"plot {file}", expected="a name such as returns.png", got=repr(file.suffix), fix="choose another ending"
        )
    left, right = figure.subplots(1, 2)
    columns = store.episodes
    groups = {
        "success": columns["success"] == 1,
        "failure": columns["success"] == 0,
        "unknown": np.isnan(columns["success"]),
    }
    colours = {"success": "#0072b2", "failure": "#d55e00", "unknown": "#777777"}
    for axes, name, label in ((left, "return", "return"), (right, "length", "steps")):
        known = np.isfinite(columns[name])
        parts = {group: columns[name][chosen & known] for group, chosen in groups.items() if (chosen & known).any()}
        if parts:
            axes.hist(
                list(parts.values()), bins=30, stacked=True, label=list(parts), color=[colours[part] for part in parts]
            )
            if set(parts) != {"unknown"} and axes is left:
                figure.legend(loc="outside right upper", frameon=False)
        axes.set(xlabel=label, ylabel="episodes")
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{store.schema.environment or store.path.name}: {len(store)} episodes, {store.steps} steps")
    with atomic_path(file) as temporary:
        figure.savefig(temporary, dpi=120)
