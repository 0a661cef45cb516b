"""View-models as the arena makes them, from plain to hostile, for the tests of the pages."""

from __future__ import annotations

import math
import random
from typing import Any

HOSTILE = "<script>alert('x')</script>\"'><img src=x onerror=alert(1)> & co"
T0 = 1_795_000_000.0
ANCHORS = [{"name": "random", "value": 0.03}, {"name": "expert", "value": 0.97}]
BENCHMARK = {
    "name": "pour",
    "title": "Pouring",
    "task": "Pour the grains from the cup into the bowl, wherever the bowl stands.",
    "metric": "mean share of grains in the bowl",
    "range": [0.0, 1.0],
    "splits": ["seen", "position", "object", "lighting", "all"],
}


def interval(value: float, half: float) -> dict[str, float]:
    return {"value": value, "low": max(0.0, value - half), "high": min(1.0, value + half)}


def trials(
    skill: float, n: int = 40, done: int | None = None, seed: int = 0, first_id: int = 1
) -> list[dict[str, Any]]:
    draw = random.Random(f"{skill}-{seed}")
    rows = []
    for slot in range(n):
        row: dict[str, Any] = {"id": first_id + slot, "slot": slot, "state": "done", "outcome": "success", "score": 1.0}
        luck = draw.random()
        if done is not None and slot >= done:
            state = "running" if slot == done else "queued"
            row |= {"state": state, "outcome": None, "score": None}
        elif luck > skill + 0.25:
            row |= {"outcome": "failure", "score": 0.0}
        elif luck > skill:
            row |= {"outcome": "failure", "score": round(draw.random(), 2)}
        elif luck < 0.03:
            row |= {"state": "policy_fault", "outcome": "policy_fault", "score": 0.0}
        rows.append(row)
    return rows


def board_row(number: int, name: str, value: float, half: float, rank: list[int] | None, **more: Any) -> dict[str, Any]:
    return {
        "submission": number,
        "name": name,
        "owner": "ada",
        "kind": "remote",
        "method": "",
        "date": T0 + 86400 * number,
        "imitates": "",
        "n": 40,
        "wanted": 40,
        "score": interval(value, half),
        "success": interval(max(0.0, value - 0.05), half + 0.03),
        "rank": rank,
        "latency_ms": 6.2 + number,
        "late_share": 0.004,
        "trials": trials(value, first_id=1000 + 100 * number),
        "anchor": None,
    } | more


def leaderboard() -> dict[str, Any]:
    rows = [
        board_row(1, "scripted expert", 0.97, 0.02, None, anchor="expert", owner="arena", method="inverse kinematics"),
        board_row(7, "bc-chunk50", 0.78, 0.09, [1, 2], method="behaviour cloning, 50 steps", latency_ms=4.1),
        board_row(9, "vinn-byol", 0.71, 0.11, [1, 3], owner="grace", method="nearest neighbours", latency_ms=21.0),
        board_row(4, "dt-small", 0.62, 0.12, [2, 4], method="return-conditioned transformer", late_share=0.13),
        board_row(5, "iql-joints", 0.58, 0.12, [2, 4], owner="grace", method="offline RL", kind="checkpoint"),
        board_row(6, "student-of-bc", 0.31, 0.1, [5, 5], imitates="bc-chunk50", method="distillation", latency_ms=0.8),
        board_row(
            8,
            "fresh",
            0.4,
            0.25,
            [3, 6],
            n=9,
            owner="linus",
            trials=trials(0.5, done=9, first_id=1800),
            late_share=None,
        ),
        board_row(
            10,
            "waiting",
            0.0,
            0.0,
            None,
            n=0,
            score=None,
            success=None,
            latency_ms=None,
            late_share=None,
            trials=trials(0.5, done=0, first_id=2000),
        ),
        board_row(2, "random actions", 0.03, 0.02, None, anchor="random", owner="arena", method=""),
    ]
    return {
        "benchmark": BENCHMARK,
        "split": "seen",
        "rows": rows,
        "anchors": ANCHORS,
        "generated": T0,
        "command": "offbook arena status --benchmark pour --split seen",
    }


def empty_leaderboard() -> dict[str, Any]:
    return leaderboard() | {"rows": [], "anchors": []}


def single_leaderboard() -> dict[str, Any]:
    one = board_row(3, "alone", 0.5, 0.0, [1, 1], n=1, score={"value": 0.5, "low": None, "high": None}, success=None)
    return leaderboard() | {"rows": [one | {"trials": trials(0.5, 1)}], "anchors": []}


def returns_leaderboard() -> dict[str, Any]:
    rows = [
        board_row(1, "swing-up", 0, 0, [1, 1], score={"value": -183.4, "low": -221.9, "high": -149.2}, success=None),
        board_row(2, "random", 0, 0, [2, 2], score={"value": -1221.0, "low": -1302.0, "high": -1143.0}, success=None),
    ]
    for row in rows:
        row["trials"] = [trial | {"outcome": "done", "score": -200.0} for trial in trials(1.0, 10)]
    return leaderboard() | {"rows": rows, "anchors": [{"name": "random", "value": -1221.0}]}


def big_leaderboard(n: int = 50) -> dict[str, Any]:
    draw = random.Random(5)
    rows = [
        board_row(
            i,
            f"policy-{i:03d}-{draw.choice(['bc', 'vinn', 'iql', 'dt', 'diffusion'])}",
            1 - i / n,
            0.1,
            [max(1, i - 2), i + 3],
            method=draw.choice(["behaviour cloning", "nearest neighbours", "offline RL"]),
            trials=trials(1 - i / n, seed=i, first_id=40 * i),
        )
        for i in range(n)
    ]
    return leaderboard() | {"rows": rows}


def compare(videos: dict[str, Any] | None = None) -> dict[str, Any]:
    draw = random.Random(3)
    scenes = []
    for slot in range(12):
        a, b = round(min(1, draw.random() + 0.3), 2), round(draw.random(), 2)
        scene = {"bowl": [round(0.3 + 0.02 * slot, 3), -0.1], "cup_radius": 0.034, "light_from": [0.0, 1.0, 2.0]}
        scenes.append(
            {
                "scene": scene,
                "slot": slot,
                "a": a,
                "b": b,
                "difference": round(a - b, 2),
                "trials": {"a": 1000 + slot, "b": 2000 + slot},
                "videos": videos,
            }
        )
    scenes.append({"scene": "unfinished", "slot": 12, "a": 0.3, "b": None, "difference": None})
    return {
        "benchmark": {"name": "pour", "title": "Pouring"},
        "split": "seen",
        "a": {"submission": 7, "name": "bc-chunk50"},
        "b": {"submission": 4, "name": "dt-small"},
        "pairs": 12,
        "difference": {"value": 0.163, "low": 0.021, "high": 0.304},
        "mcnemar_p": 0.0313,
        "scenes": scenes,
        "rate_hz": 30,
        "command": "offbook arena status --compare 7 4",
    }


def empty_compare() -> dict[str, Any]:
    return compare() | {"pairs": 0, "difference": None, "mcnemar_p": None, "scenes": []}


def submission(n: int = 40, done: int | None = 27) -> dict[str, Any]:
    rows = trials(0.6, n, done, first_id=700)
    for row in rows:
        kind = ("seen", "position", "object", "lighting")[row["slot"] // 10 % 4]
        row |= {"scene": {"name": kind}, "seed": 50_000 + row["slot"], "attempts": 1, "fault": None}
    if n > 5:
        rows[5] |= {
            "state": "policy_fault",
            "outcome": "policy_fault",
            "score": 0.0,
            "fault": "action 17 at step 83 was NaN",
        }
        rows[8] |= {
            "state": "queued",
            "outcome": "robot_fault",
            "score": None,
            "fault": "worker lost: no heartbeat until the lease ran out",
            "attempts": 2,
        }
    return {
        "id": 7,
        "name": "bc-chunk50",
        "state": "open",
        "state_words": "Running on robot sim-2: trial 28 of 40, about 6 min left",
        "kind": "remote",
        "owner": "ada",
        "created": T0,
        "benchmark": BENCHMARK,
        "split": "seen",
        "trials": rows,
        "log": [
            {"time": T0 + 5 * i, "text": text}
            for i, text in enumerate(
                [
                    "submitted by ada",
                    "trial 0 was given to robot sim-2",
                    "trial 0 runs, attempt 1",
                    "trial 0 done: score 1.00",
                ]
                * 5
            )
        ],
        "command": "offbook policy serve runs/bc --url http://127.0.0.1:8000 --submission 7",
        "commitment": "sha256:" + "9f31c0" * 10,
        "quota": {"used": 120, "limit": 400},
        "opened": {"order": [3, 1, 2], "nonce": "c0ffee"},
        "score": interval(0.714, 0.11),
        "anchors": ANCHORS,
    }


def queued_submission() -> dict[str, Any]:
    view = submission(done=0)
    for row in view["trials"]:
        row |= {"state": "queued", "outcome": None, "score": None, "fault": None, "attempts": 0}
    return view | {
        "score": None,
        "state_words": "Queued: position 3, starts in about 4 min",
        "log": [],
        "name": "fresh",
        "quota": None,
    }


def run(videos: list[dict[str, Any]] | None = None, steps: int = 175, rate: float = 30.0) -> dict[str, Any]:
    draw = random.Random(1)
    time = [round(i / rate, 4) for i in range(steps)]
    late = [60 < i < 66 for i in range(steps)]
    return {
        "id": 705,
        "submission": {"id": 7, "name": "bc-chunk50"},
        "slot": 5,
        "scene": {"name": "position", "bowl_xy": [0.4213, -0.113], "bowl_size": 0.0721, "light": "evening"},
        "seed": 50_005,
        "state": "policy_fault",
        "outcome": "policy_fault",
        "fault": "action 17 at step 83 was NaN",
        "score": 0.0,
        "steps": steps,
        "rate_hz": rate,
        "videos": videos or [],
        "traces": {
            "time": time,
            "reward": [round(1 / (1 + math.exp(-(i - 90) / 9)), 3) for i in range(steps)],
            "latency_ms": [round(6 + 5 * draw.random() + 40 * bad, 2) for i, bad in enumerate(late)],
            "late": late,
        },
        "events": [
            {"time": 0.0, "kind": "reset", "text": "scene drawn, seed 50005"},
            {"time": time[61], "kind": "late", "text": "5 steps in a row came late; the arm held still"},
            {"time": time[80], "kind": "limit", "text": "joint 4 reached its speed limit and was slowed"},
            {"time": time[83], "kind": "policy_fault", "text": "action 17 at step 83 was NaN"},
        ],
        "attempts": [
            {
                "n": 1,
                "worker": "sim-1",
                "started": T0,
                "ended": T0 + 4,
                "outcome": "robot_fault",
                "reason": "worker lost: no heartbeat until the lease ran out",
            },
            {"n": 2, "worker": "sim-2", "started": T0 + 30, "ended": T0 + 36, "outcome": "policy_fault", "reason": ""},
        ],
        "downloads": [
            {"label": "Episode (Parquet)", "url": "/v1/blobs/aa"},
            {"label": "Video, front camera", "url": "/v1/blobs/bb"},
        ],
    }


def queued_run() -> dict[str, Any]:
    nothing = {"state": "queued", "outcome": None, "fault": None, "score": None, "steps": None, "rate_hz": None}
    return run() | nothing | {"traces": {}, "events": [], "attempts": [], "downloads": []}


def queue() -> dict[str, Any]:
    return {
        "robots": [
            {
                "name": "sim-1",
                "state": "running",
                "words": "runs trial 12 of 40 of bc-chunk50",
                "trial": 712,
                "progress": 0.42,
            },
            {"name": "sim-2", "state": "idle", "words": "idle, waiting for work", "trial": None, "progress": None},
            {
                "name": "franka-left",
                "state": "offline",
                "words": "offline: no heartbeat for 4 min",
                "trial": None,
                "progress": None,
            },
        ],
        "waiting": [
            {
                "submission": 7 + i,
                "name": name,
                "owner": owner,
                "trials_left": 40 - 3 * i,
                "position": i + 1,
                "eta_s": [12.0, 250.0, 7900.0, None][i],
            }
            for i, (name, owner) in enumerate(
                [("bc-chunk50", "ada"), ("vinn", "grace"), ("dt", "ada"), ("late", "linus")]
            )
        ],
        "fairness_words": (
            "Whoever used the robots least in the last 7 days goes first, so that one person with many policies waits "
            "no less than one person with a single one. At most one trial of a submission runs at a time."
        ),
        "generated": T0,
    }


def empty_queue() -> dict[str, Any]:
    return queue() | {"robots": [], "waiting": []}


def robot() -> dict[str, Any]:
    return {
        "name": "sim-1",
        "kind": "simulated",
        "state": "running",
        "heartbeat_age_s": 0.8,
        "rate_hz": 31.25,
        "trials_done": 212,
        "faults": 3,
        "current": {"trial": 712, "progress": 0.4},
    }


def unseen_robot() -> dict[str, Any]:
    nothing = {"heartbeat_age_s": None, "rate_hz": None, "trials_done": 0, "faults": 0, "current": None}
    return robot() | nothing | {"state": "offline"}


def submit() -> dict[str, Any]:
    return {
        "base_url": "http://127.0.0.1:8000",
        "benchmark": BENCHMARK,
        "snippets": [
            {
                "title": "First, check your policy on your own machine",
                "code": "offbook policy check runs/bc --robot pour",
            },
            {
                "title": "Serve it from your machine",
                "code": "export OFFBOOK_TOKEN=ob_3f9c_M4ybe7hisIsAS3cret\noffbook policy serve runs/bc --url http://127.0.0.1:8000",
            },
            {
                "title": "Or upload a checkpoint",
                "code": "offbook arena submit runs/bc --benchmark pour --split seen --url http://127.0.0.1:8000",
            },
            {
                "title": "Or answer in Python",
                "code": "from offbook.client import FunctionPolicy, serve_policy\nserve_policy(policy, url, token)",
            },
        ],
    }


def index() -> dict[str, Any]:
    return {
        "benchmarks": [
            BENCHMARK
            | {
                "entries": 8,
                "trials_done": 289,
                "anchors": ANCHORS,
                "leader": {"submission": 7, "name": "bc-chunk50", "score": interval(0.78, 0.09)},
            },
            BENCHMARK
            | {
                "name": "scoop",
                "title": "Scooping",
                "task": "Scoop grains out of the tray.",
                "entries": 0,
                "trials_done": 0,
            },
            {key: BENCHMARK[key] for key in ("title", "task", "metric", "splits")} | {"name": "gym:Pendulum-v1"},
        ],
        "generated": T0,
    }


def empty_index() -> dict[str, Any]:
    return {"benchmarks": [], "generated": T0}


def error() -> dict[str, Any]:
    return {
        "ok": False,
        "status": 404,
        "error": "not found",
        "detail": "No trial 99 here.",
        "hint": "look at the queue",
    }


VIEWS: dict[str, tuple[str, Any]] = {
    "index": ("index", index),
    "index-empty": ("index", empty_index),
    "leaderboard": ("leaderboard", leaderboard),
    "leaderboard-empty": ("leaderboard", empty_leaderboard),
    "leaderboard-single": ("leaderboard", single_leaderboard),
    "leaderboard-returns": ("leaderboard", returns_leaderboard),
    "leaderboard-big": ("leaderboard", big_leaderboard),
    "compare": ("compare", compare),
    "compare-empty": ("compare", empty_compare),
    "submission": ("submission", submission),
    "submission-queued": ("submission", queued_submission),
    "run": ("run", run),
    "run-queued": ("run", queued_run),
    "queue": ("queue", queue),
    "queue-empty": ("queue", empty_queue),
    "robot": ("robot", robot),
    "robot-unseen": ("robot", unseen_robot),
    "submit": ("submit", submit),
    "error": ("error", error),
}


def hostile(value: Any, key: str = "") -> Any:
    """The same view with every label, name and text turned into an attack; states and addresses stay what they are."""
    if isinstance(value, dict):
        return {k: hostile(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [hostile(v, key) for v in value]
    kept = {"state", "outcome", "kind", "anchor", "url", "poster"}
    return HOSTILE if isinstance(value, str) and key not in kept else value
