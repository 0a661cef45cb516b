"""What a step of a policy that reads its earlier trials costs, beside one that computes the whole context again.

The network has the size of the paper (128 wide, 3 layers, 1 head), with one token a step or with five. A session has
lived through a trial; then it is asked for 25 more steps. The other way, that of replications, sends all tokens
through the network at each step. Both run by turns in a process, with one thread, and its processor time is counted;
both must tell the same actions.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from offbook.client.protocol import ActionSpec, Observation, ObservationSpec, PolicyMeta
from offbook.data.chains import Trial
from offbook.learning.hindsight import HindsightNetwork, HindsightSizes
from offbook.learning.trying import HindsightPolicy
from offbook.models.trajectory import Layout
from offbook.runs.benchmark import Options, median_metric, timed
from offbook.runs.ledger import Claim, Metric

RATIO = 30.0
STATE, ACTION, STEPS = 17, 6, 25
SIZES = HindsightSizes(width=128, layers=3, heads=1, head="mse")
CASES: tuple[tuple[Layout, int], ...] = (("fused", 1_000), ("split", 1_000), ("fused", 4_000))


class Again(HindsightPolicy):
    """The same policy, which keeps nothing but what it has lived."""

    @torch.inference_mode()
    def infer(self, observation: Observation) -> np.ndarray:
        """The next action, from a forward pass over everything."""
        lives = [self._see(session, observation.state[i]) for i, session in enumerate(observation.sessions)]
        told = self.module(self._windows(lives, len(lives[0])))[:, -1]
        action = self.module.draw(told, torch.full(told.shape[:2], 0.5)).numpy()
        for life, done in zip(lives, action, strict=True):
            life.rows["action"][-1] = done
        return np.asarray(action[:, None], np.float32)


def measure(layout: Layout, tokens: int, options: Options) -> tuple[Metric, Metric]:
    """The ratio of the times for a step, and the time of ours, after so many tokens."""
    torch.manual_seed(options.seed)
    rng, lived = np.random.default_rng(options.seed), tokens // (5 if layout == "split" else 1)
    bounds = (100.0,) * ACTION
    action = ActionSpec(size=ACTION, low=tuple(-x for x in bounds), high=bounds)
    network = HindsightNetwork(STATE, action, 2, lived + STEPS, replace(SIZES, tokens=layout))
    meta = PolicyMeta(name="p", observation=ObservationSpec(state=(("state", STATE), ("trial", 3))), action=action)
    trial = Trial(
        state=rng.standard_normal((lived, STATE), np.float32),
        action=rng.standard_normal((lived, ACTION), np.float32),
        reward=rng.standard_normal(lived),
    )
    states = rng.standard_normal((STEPS + 1, STATE), np.float32)
    answers: dict[str, list[np.ndarray]] = {}

    def seen(step: int) -> Observation:
        state = np.concatenate([states[step], [1, step, 0]]).astype(np.float32)[None]
        return Observation(sessions=("a",), state=state, images={}, time=np.zeros(1))

    def side(name: str, kind: type[HindsightPolicy]) -> tuple[Callable[[], None], Callable[[], None]]:
        policy = kind(network, meta, {"target": 1.0, "seed": 0})

        def begin() -> None:
            policy.reset(["a"], [""])
            policy.recall("a", [trial])
            answers[name] = [policy.infer(seen(0))]

        def go_on() -> None:
            for step in range(1, STEPS + 1):
                answers[name].append(policy.infer(seen(step)))

        return begin, go_on

    sides = {"kept": side("kept", HindsightPolicy), "again": side("again", Again)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.repeats):
        for begin, _ in sides.values():
            begin()
        for name, of in timed({n: go for n, (_, go) in sides.items()}, 1, 0, clock=time.process_time).items():
            seconds[name] += of
        np.testing.assert_allclose(answers["kept"], answers["again"], atol=1e-4)
    pairs = [a / b for a, b in zip(seconds["again"], seconds["kept"], strict=True)]
    ratio = median_metric(f"ratio, {layout}, {tokens} tokens", pairs, higher_is_better=True)
    each = median_metric(f"a step, {layout}, {tokens} tokens", [spent / STEPS for spent in seconds["kept"]], unit="s")
    return ratio, each


def run(options: Options) -> list[Claim]:
    """Measures both ways after a shorter and a longer life."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = [measure(layout, tokens, options) for layout, tokens in CASES]
    finally:
        torch.set_num_threads(threads)
    return [
        Claim(
            system="trying",
            claim=f"after {CASES[0][1]} tokens a step is at least {RATIO:g} times as fast as computing all again",
            metrics=tuple(metric for pair in found for metric in pair),
            seeds=(options.seed,),
            verdict="met" if found[0][0].value >= RATIO else "missed",
            note="128 wide, 3 layers, 1 head; judged by the median ratio of processor time, with one token a step.",
        )
    ]
