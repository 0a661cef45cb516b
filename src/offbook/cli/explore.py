"""`offbook explore`: is the estimator of bonuses right on this machine, what does one cost, what does it lead to?"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Literal, TypeVar

import tyro

from offbook.cli.data import described
from offbook.cli.report import Report, table
from offbook.errors import ConfigError, needs_extra
from offbook.runs.progress import track

with needs_extra("models"):
    import torch

    from offbook.systems.vcse.measure import TOLERANCE, Large, estimates, measure, ratios, seconds

N = TypeVar("N", int, float)


def check(*, dim: str = "1,2", rho: str = "0,0.6,0.9", n: int = 4096, k: int = 5, seed: int = 0) -> Report:
    """Estimates the entropy of states given their value where it is known in closed form, and compares.

    States and value are Gaussian; each number of a state has the same correlation with the value. Exit code 1 when an
    estimate is off by more than 0.06 nats, as in many dimensions it is bound to be.

    Args:
        dim: numbers of a state, with commas between several.
        rho: correlations, above -1 and below 1, with commas between several.
        n: samples.
        k: which neighbour is measured.
        seed: of the samples.

    Examples:
        offbook explore check
        offbook explore check --dim 1,2,5 --rho 0.9 --n 16384
    """
    sizes, rhos = _numbers("--dim", dim, int), _numbers("--rho", rho, float)
    for flag, right, expected, got in (
        ("--dim", min(sizes) >= 1, "1 or more", dim),
        ("--rho", all(-1 < r < 1 for r in rhos), "above -1 and below 1", rho),
        ("--n", n >= 2, "2 or more", str(n)),
    ):
        if not right:
            raise ConfigError(flag, expected=expected, got=got, fix=f"change {flag}")
    found = estimates(sizes, rhos, n, k, seed)
    rows = [[e.size, e.rho, f"{e.true:.3f}", f"{e.found:.3f}", f"{e.found - e.true:+.3f}"] for e in found]
    missed = [e for e in found if e.off > TOLERANCE]
    text = f"{n:,} samples, k = {k}, in nats\n\n" + table(["dim", "rho", "true", "estimate", "off"], rows)
    text += f"\n\n{len(missed)} of {len(found)} are off by more than {TOLERANCE}." if missed else "\n\nAll are right."
    data = {"estimates": [{**vars(e), "off": e.off} for e in found], "tolerance": TOLERANCE}
    return Report(text=text, data=data, exit_code=int(bool(missed)))


def bench(
    *,
    points: str = "128,256,1024,2048,8192",
    size: int = 64,
    k: int = 12,
    repeats: int = 3,
    large: int = 65_536,
    seed: int = 0,
) -> Report:
    """Measures what a bonus for each of many states costs here, beside two other ways to compute the same.

    Those are the published formula, on all differences at once, and PyTorch's exact distances of all pairs. One thread;
    the processor's time, in medians; by turns in this process, and all must agree. The largest number of states is
    computed in a process of its own, whose memory is read.

    Args:
        points: states of a batch, with commas between several.
        size: numbers of a state.
        k: which neighbour.
        repeats: how often each is timed.
        large: states of the one whose memory is read; 0 for none.
        seed: of the states.

    Examples:
        offbook explore bench
        offbook explore bench --points 512 --large 0
    """
    counts = _numbers("--points", points, int)
    if min(counts) <= k or 0 < large <= k:
        raise ConfigError("--points", expected=f"more than k = {k}", got=points, fix="change --points or --large")
    for flag, number, least in (("--size", size, 1), ("--k", k, 2), ("--repeats", repeats, 1), ("--large", large, 0)):
        if number < least:
            raise ConfigError(flag, expected=f"{least} or more", got=str(number), fix=f"change {flag}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows, data = [], []
    try:
        for count in track(counts, "measuring", len(counts)):
            spent = seconds(count, size, k, repeats, seed)
            times, beside = {name: 1e3 * median(of) for name, of in spent.items()}, ratios(spent)
            cells = [[f"{times[name]:.1f}", f"{beside[name]:.1f}"] if name in times else ["-", "-"]
                     for name in ("published", "cdist")]  # fmt: skip
            rows.append([f"{count:,}", f"{times['ours']:.1f}", *cells[0], *cells[1]])
            data.append({"points": count, "milliseconds": times, "ratios": beside})
    finally:
        torch.set_num_threads(threads)
    head = ["states", "ours, ms", "published, ms", "times ours", "all pairs, ms", "times ours"]
    text = f"{size} numbers each, k = {k}, one thread\n\n" + table(head, rows)
    report: dict[str, object] = {"batches": data}
    if large:
        taken = measure(Large(count=large, size=size, k=k, seed=seed))
        text += f"\n\n{large:,} states: {taken.bytes / 2**20:,.0f} MiB in all, {taken.seconds:.1f} s."
        report |= {"large": {"points": large, "bytes": taken.bytes, "seconds": taken.seconds}}
    return Report(text=text, data=report)


def record(
    task: tyro.conf.Positional[str],
    *,
    out: Path,
    steps: int = 100_000,
    bonus: Literal["state-entropy", "rnd", "vcse"] = "state-entropy",
    with_reward: bool = False,
    beta: float = 1.0,
    seed: int = 0,
) -> Report:
    """Lets an agent explore and records what it lives through: recordings without a task, for any task.

    The agent is soft actor-critic with an exploration bonus, and learns from that alone. Worlds of the DeepMind control
    suite are recorded with the state of their physics, so that offbook data reward can add the rewards of any task of
    the same body. Interrupted, the same command ends with the same store.

    Args:
        task: with numbers as observations and continuous actions, such as dmc:walker-walk.
        out: folder of the store.
        steps: of the environment, at least; the last episode is finished.
        bonus: what the agent explores by; vcse needs the reward.
        with_reward: learn from the task's reward too, and keep it.
        beta: weight of the bonus.
        seed: of the agent and its worlds.

    Examples:
        offbook explore record dmc:walker-walk --out stores/explore
        offbook explore record dmc:walker-walk --bonus vcse --with-reward --beta 0.1 --out stores/walk
    """
    with needs_extra("sim"):
        from offbook.systems.vcse.recording import record_exploration
    return described(record_exploration(task, steps, out, bonus=bonus, with_reward=with_reward, beta=beta, seed=seed))


def _numbers(flag: str, text: str, kind: type[N]) -> list[N]:
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError:
        expected = "numbers with commas between them"
        raise ConfigError(flag, expected=expected, got=repr(text), fix="write them like 1,2") from None
