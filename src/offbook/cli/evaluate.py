"""`offbook evaluate`: how well policies do in a simulator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from offbook.cli.report import Report, as_json, table
from offbook.errors import ConfigError, needs_extra
from offbook.runs.checkpoint import read_header
from offbook.runs.directory import write_atomic

if TYPE_CHECKING:
    from offbook.client.protocol import Policy
    from offbook.evaluate.rollout import Evaluation
    from offbook.evaluate.trials import Comparison


def evaluate(
    runs: tyro.conf.Positional[tuple[str, ...]],
    *,
    task: str | None = None,
    episodes: int = 50,
    seed: int = 0,
    split: str | None = None,
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
        runs: run folders, checkpoint files, expert or expert:GRADE with a grade from 0 to 1, or random.
        task: the environment, such as offbook:pour or gym:Hopper-v5; by default where the policy's recordings are from.
        episodes: how many for each policy.
        seed: from which the episodes' seeds follow.
        split: which arrangements of offbook:pour to draw: seen, position, object, lighting or all.
        max_steps: cut longer episodes.
        parallel: environments that take turns in one process.
        jobs: processes.
        videos: clips to keep of each policy's first episodes.
        out: folder for results, videos and the figure; by default the folder evaluation inside the first run folder.

    Examples:
        offbook evaluate runs/bc
        offbook evaluate runs/bc --task offbook:pour --split position --episodes 100
        offbook evaluate runs/bc expert expert:0.5 random --task offbook:pour --out comparison
    """
    if not runs or len(set(runs)) < len(runs):
        raise ConfigError(
            "RUN", expected="one or more different ones", got=" ".join(runs) or "none", fix="name each once"
        )
    task = task or _task_of(runs)
    if out is None:
        out = next((Path(run) / "evaluation" for run in runs if not _scripted(run) and Path(run).is_dir()), None)
    with needs_extra("sim"):
        from offbook.evaluate.rollout import evaluate_policy
        from offbook.evaluate.trials import compare_all
    evaluations: list[Evaluation] = []
    for run in runs:
        evaluation = evaluate_policy(
            task,
            _policy(run, task, seed),
            episodes=episodes,
            seed=seed,
            settings={} if split is None else {"split": split},
            parallel=parallel,
            jobs=jobs,
            video_dir=None if out is None or videos < 1 else out / "videos" / _folder(run),
            videos=videos,
            max_steps=max_steps,
        )
        # Names need not differ between runs; what the user typed does.
        evaluations.append(replace(evaluation, policy=run) if len(runs) > 1 else evaluation)
    comparisons = compare_all(evaluations)
    data: dict[str, Any] = {
        "task": task,
        "policies": [evaluation.to_json() for evaluation in evaluations],
        "comparisons": [comparison.to_json() for comparison in comparisons],
        "out": None if out is None else str(out),
    }
    if out is not None:
        from offbook.evaluate.figures import draw_evaluations

        write_atomic(out / "evaluation.json", as_json(data) + "\n")
        draw_evaluations(out / "evaluation.png", evaluations)
    return Report(text=_text(task, evaluations, comparisons, out), data=data)


def _scripted(run: str) -> bool:
    return run == "random" or run.partition(":")[0] == "expert"


def _folder(run: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-." else "-" for letter in run).strip("-.") or "policy"


def _task_of(runs: Sequence[str]) -> str:
    """Where the recordings of the first trained policy are from."""
    from offbook.learning.policies import policy_file

    for run in runs:
        if not _scripted(run):
            environment = read_header(policy_file(run)).record.get("environment")
            if isinstance(environment, str) and environment:
                return environment
    raise ConfigError(
        "--task", expected="the name of an environment", got="none, and no checkpoint that names one", fix="give --task"
    )


def _policy(run: str, task: str, seed: int) -> Policy:
    if not _scripted(run):
        with needs_extra("models"):
            from offbook.learning.policies import load_policy
        return load_policy(run)
    with needs_extra("sim"):
        from offbook.sim.adapters import make
        from offbook.sim.experts import RandomPolicy, make_expert
        from offbook.sim.spaces import action_spec
    if run == "random":
        env = make(task)
        try:
            return RandomPolicy(action_spec(env.action_space), seed)
        finally:
            env.close()
    grade = run.partition(":")[2]
    try:
        return make_expert(task, float(grade) if grade else 1.0, seed)
    except ValueError as error:
        raise ConfigError(
            run, expected="expert:GRADE with a number", got=repr(grade), fix="write expert:0.5"
        ) from error


def _text(task: str, evaluations: Sequence[Evaluation], comparisons: Sequence[Comparison], out: Path | None) -> str:
    names = [name for name in ("success", "score", "return", "length") if name in evaluations[0].summary]
    rows = [[e.policy, *(_interval(e.summary[name].to_json()) for name in names)] for e in evaluations]
    count = len(evaluations[0].results)
    lines = [
        f"{task}, {count} episode{'s' * (count != 1)} each, with 95% intervals",
        "",
        table(["policy", *names], rows),
    ]
    if comparisons:
        head = [
            "first",
            "second",
            f"{comparisons[0].metric} difference",
            "only first / second succeeded",
            "p",
            "verdict",
        ]
        lines += ["", table(head, [_compared(c) for c in comparisons])]
    lines += ["", f"results, videos and figure in {out}" if out else "add --out FOLDER for videos and a figure"]
    return "\n".join(lines)


def _compared(comparison: Comparison) -> list[str]:
    known = comparison.p_value is not None
    return [
        comparison.first,
        comparison.second,
        _interval(comparison.difference.to_json()),
        f"{comparison.first_only} : {comparison.second_only}" if known else "unknown",
        f"{comparison.p_value:.3g}" if known else "",
        comparison.verdict,
    ]


def _interval(interval: dict[str, Any]) -> str:
    if interval["low"] is None:
        return f"{interval['value']:.3g} [unknown]"
    return f"{interval['value']:.3g} [{interval['low']:.3g}, {interval['high']:.3g}]"
