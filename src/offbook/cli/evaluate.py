"""`offbook evaluate`: how well policies do in a simulator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from offbook.cli.policy import aim_of, find_policy, recorded_in, run_and_role, scripted
from offbook.cli.report import Report, as_json, interval_text, table
from offbook.errors import ConfigError, needs_extra
from offbook.runs.directory import write_atomic

if TYPE_CHECKING:
    from offbook.evaluate.rollout import Evaluation
    from offbook.evaluate.trials import Comparison

Aims = Mapping[str, tuple[float, Mapping[str, float]]]
"""By run, the return that its policy aims at and quantiles of those of its recordings."""

# Of the recordings' range of returns, from the 5 % quantile to the largest, by which an aim beyond it is far outside.
_FAR = 0.5


def evaluate(
    runs: tyro.conf.Positional[tuple[str, ...]],
    *,
    task: str | None = None,
    episodes: int = 50,
    seed: int = 0,
    split: str | None = None,
    trials: int | None = None,
    max_steps: int | None = None,
    parallel: int = 8,
    jobs: int = 1,
    videos: int = 3,
    out: Path | None = None,
) -> Report:
    """Tests policies on a task: success, score and return with 95% intervals, videos and a figure.

    Episodes begin from evaluation seeds, which no recording or training uses. Several policies meet the same episodes
    and are compared pair by pair.

    Args:
        runs: run folders or checkpoint files, with :ROLE or :ROLE:TARGET behind a model of many roles, TARGET a share
            of the recordings' range of returns, or ::TARGET behind a policy of agentic_transformer or dt, a return to
            aim at; expert or expert:GRADE with a grade from 0 to 1, random, or MODULE:NAME.
        task: the environment, such as offbook:pour or gym:Hopper-v5; by default where the policy's recordings are from.
        episodes: how many for each policy.
        seed: from which the episodes' seeds follow.
        split: which arrangements of offbook:pour or offbook:scoop to draw: seen, position, object, lighting or all.
        trials: give each policy so many trials in a row at each episode's task, and tell first, last, mean and best
            apart, and what its own earlier trials are worth beside another task's.
        max_steps: cut longer episodes.
        parallel: environments that take turns in one process.
        jobs: processes.
        videos: clips to keep of each policy's first episodes.
        out: folder for results, videos and the figure; by default the folder evaluation inside the first run folder.

    Examples:
        offbook evaluate runs/bc
        offbook evaluate runs/bc --task offbook:pour --split position --episodes 100
        offbook evaluate runs/bc expert expert:0.5 random --task offbook:pour --out comparison
        offbook evaluate runs/mtm:bc runs/mtm:rcbc:0.9 runs/mtm:plan
        offbook evaluate runs/at runs/dt --trials 4 --episodes 64
        offbook evaluate runs/at runs/at::2500 --trials 4
    """
    if not runs or len(set(runs)) < len(runs):
        got = " ".join(runs) or "none"
        raise ConfigError("RUN", expected="one or more different ones", got=got, fix="name each once")
    task = task or next(filter(None, map(recorded_in, runs)), None)
    if task is None:
        got = "none, and no checkpoint that names one"
        raise ConfigError("--task", expected="the name of an environment", got=got, fix="give --task")
    if out is None:
        folders = (Path(run_and_role(run)[0]) for run in runs if not scripted(run))
        out = next((folder / "evaluation" for folder in folders if folder.is_dir()), None)
    with needs_extra("sim"):
        from offbook.evaluate.trials import compare_all
    limits = {"episodes": episodes, "max_steps": max_steps, "parallel": parallel, "jobs": jobs}
    settings = {} if split is None else {"split": split}
    aims = {run: aim for run in runs if (aim := aim_of(run))}
    if trials is not None:
        if jobs > 1:
            fix = "leave --jobs out; --parallel lets environments take turns"
            raise ConfigError("--jobs", expected="1 with --trials", got=str(jobs), fix=fix)
        return _in_groups(runs, task, seed, out, trials, limits, settings, aims)
    evaluations = list(_evaluate(runs, task, seed, out if videos > 0 else None, videos, limits, settings))
    comparisons = compare_all(evaluations)
    report = _report(task, evaluations, comparisons, out, aims)
    if out is not None:
        from offbook.evaluate.figures import draw_evaluations

        write_atomic(out / "evaluation.json", as_json(report.data) + "\n")
        draw_evaluations(out / "evaluation.png", evaluations)
    return report


def _in_groups(
    runs: Sequence[str],
    task: str,
    seed: int,
    out: Path | None,
    trials: int,
    limits: Mapping[str, Any],
    settings: Mapping[str, Any],
    aims: Aims,
) -> Report:
    """Several trials in a row of each policy, on the same tasks."""
    from offbook.evaluate.figures import draw_groups
    from offbook.evaluate.groups import RecallingPolicy, evaluate_trials, group_rows

    found = {}
    for run in runs:
        policy = find_policy(run, task, seed)
        recalls = isinstance(policy, RecallingPolicy) and min(trials, limits["episodes"]) > 1
        found[run] = evaluate_trials(
            task, policy, trials=trials, groups=limits["episodes"], seed=seed, settings=settings,
            parallel=limits["parallel"], max_steps=limits["max_steps"], foreign=recalls, fresh=4 * trials,
        )  # fmt: skip
    head, rows = group_rows(found)
    n = limits["episodes"]
    # The results are never maxima over checkpoints, and say so.
    folders = [run for run in runs if not scripted(run) and Path(run_and_role(run)[0]).is_dir()]
    last = ", at the last checkpoint" if folders else ""
    lines = [f"{task}, {n} group{'s' * (n != 1)} of {trials} trials each{last}, with 95% intervals", ""]
    lines += [table(head, rows), *_aim_lines(aims)]
    policies = [groups.to_json() for groups in found.values()]
    data = {"task": task, "policies": policies, "aims": _aims_json(aims), "out": str(out or "") or None}
    if out is not None:
        write_atomic(out / "trials.json", as_json(data) + "\n")
        draw_groups(out / "trials.png", found)
    lines += ["", f"results and figure in {out}" if out else "add --out FOLDER for a figure"]
    return Report(text="\n".join(lines), data=data)


def _aim_lines(aims: Aims) -> list[str]:
    """What policies aim at, beside the returns of the recordings that they learnt from."""
    lines = []
    for run, (target, returns) in aims.items():
        listed = ", ".join(f"{value:.4g} ({name})" for name, value in returns.items())
        low, high = returns["5 %"], returns["100 %"]
        far = not low - _FAR * (high - low) <= target <= high + _FAR * (high - low)
        said, those = f"{run} aims at a return of {target:.4g}", "those of its recordings"
        lines.append(f"warning: {said}, far outside {those}: {listed}" if far else f"{said}; {those} are {listed}")
    return ["", *lines] if lines else []


def _aims_json(aims: Aims) -> dict[str, Any]:
    return {run: {"target": target, "returns": dict(returns)} for run, (target, returns) in aims.items()}


def _evaluate(
    runs: Sequence[str],
    task: str,
    seed: int,
    out: Path | None,
    videos: int,
    limits: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> Iterator[Evaluation]:
    from offbook.evaluate.rollout import evaluate_policy

    for run, folder in zip(runs, _folders(runs), strict=True):
        video_dir = None if out is None else out / "videos" / folder
        policy = find_policy(run, task, seed)
        found = evaluate_policy(
            task, policy, seed=seed, settings=settings, video_dir=video_dir, videos=videos, **limits
        )
        # Names need not differ between runs; what the user typed does.
        yield replace(found, policy=run) if len(runs) > 1 else found


def _folders(runs: Sequence[str]) -> list[str]:
    """A name for the videos of each run; of those that would share one, the later ones are numbered."""
    names: list[str] = []
    for run in runs:
        plain = "".join(letter if letter.isalnum() or letter in "-." else "-" for letter in run).strip("-.") or "policy"
        tries = (plain if n == 1 else f"{plain}-{n}" for n in count(1))
        names.append(next(name for name in tries if name not in names))
    return names


def _report(
    task: str, evaluations: Sequence[Evaluation], comparisons: Sequence[Comparison], out: Path | None, aims: Aims
) -> Report:
    data = {
        "task": task,
        "policies": [evaluation.to_json() for evaluation in evaluations],
        "comparisons": [comparison.to_json() for comparison in comparisons],
        "aims": _aims_json(aims),
        "out": None if out is None else str(out),
    }
    return Report(text=_text(task, evaluations, comparisons, out, aims), data=data)


def _text(
    task: str, evaluations: Sequence[Evaluation], comparisons: Sequence[Comparison], out: Path | None, aims: Aims
) -> str:
    names = [name for name in ("success", "score", "return", "length") if name in evaluations[0].summary]
    rows = [[e.policy, *(interval_text(e.summary[name].to_json()) for name in names)] for e in evaluations]
    n = len(evaluations[0].results)
    head = f"{task}, {n} episode{'s' * (n != 1)} each, with 95% intervals"
    lines = [head, "", table(["policy", *names], rows)]
    if comparisons:
        difference = f"{comparisons[0].metric} difference"
        columns = ["first", "second", difference, "only first / second succeeded", "p", "verdict"]
        lines += ["", table(columns, [_compared(c) for c in comparisons])]
    lines += _aim_lines(aims)
    lines += ["", f"results, videos and figure in {out}" if out else "add --out FOLDER for videos and a figure"]
    return "\n".join(lines)


def _compared(comparison: Comparison) -> list[str]:
    known = comparison.p_value is not None
    return [
        comparison.first,
        comparison.second,
        interval_text(comparison.difference.to_json()),
        f"{comparison.first_only} : {comparison.second_only}" if known else "unknown",
        f"{comparison.p_value:.3g}" if known else "",
        comparison.verdict,
    ]
