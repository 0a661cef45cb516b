"""A whole study with raters who err, one who always says left and one who spoils it: the true order comes out."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from rating_world import World, by_number

pytestmark = pytest.mark.service

TRUTH = {"ada": 1.6, "bea": 0.8, "cyd": 0.0, "dot": -0.8, "eve": -1.6}


def records() -> list[dict]:
    made = [
        {"item": f"item-{i}", "system": name, "text": f"{theta} of {i}", "cluster": f"topic-{i % 4}"}
        for i in range(8)
        for name, theta in TRUTH.items()
    ]
    for i in range(6):
        made += [
            {"item": f"known-{i}", "system": name, "text": f"{theta} of known {i}", "gold": mark}
            for name, theta, mark in (("whole", 9, "better"), ("spoilt", -9, "worse"))
        ]
    return made


def reader(chance: np.random.Generator):
    """A rater who follows Davidson's model with a leaning to the left."""

    def prefer(given) -> str:
        left, right = (float(given[side]["text"].split()[0]) for side in ("left", "right"))
        a, b = math.exp(left + 0.15), math.exp(right - 0.15)
        tie = 0.6 * math.sqrt(a * b)
        return str(chance.choice(["left", "right", "tie"], p=np.array([a, b, tie]) / (a + b + tie)))

    return prefer


def test_the_order_of_the_systems_is_recovered(world: World) -> None:
    rules = {"max_gold_failures": 0.5, "min_streak_p": 1e-4}
    study = world.study(
        records(), name="simulated", seed=11, raters_per_pair=6, gold_rate=0.08, repeat_rate=0.08, per_rater_cap=60,
        prereg={"rules": rules}, anchor="cyd",
    )  # fmt: skip
    chance = np.random.default_rng(5)
    other = {"left": "right", "right": "left", "tie": "tie"}
    careless = {1: lambda given: "left", 4: lambda given: other[by_number(given)]}
    for n, token in enumerate(world.invite(study, 10, kind="human")):
        world.ask("POST", "consent", token)
        world.judge(token, careless.get(n) or reader(chance))
    world.own("POST", f"studies/{study}/close")
    votes = world.votes(study)
    # As it was planned: enough answers for each pair, golds and repeats at their rates, sides by halves.
    answers = Counter(vote["pair"] for vote in votes if vote["pair_kind"] == "real")
    assert (len(answers), set(answers.values())) == (80, {6})
    shares = {kind: count / len(votes) for kind, count in Counter(vote["pair_kind"] for vote in votes).items()}
    assert 0.05 <= shares["gold"] <= 0.10
    assert 0.05 <= shares["repeat"] <= 0.10
    sides = [vote["left"] < vote["right"] for vote in votes if vote["pair_kind"] == "real"]
    assert abs(np.mean(sides) - 0.5) < 0.06
    # Who does not look, or spoils it, is left out, by rules that were written down, and by no other.
    assert {vote["rater"] for vote in votes if vote["excluded"]} == {"r1", "r4"}
    counted, everything = world.ask("GET", f"studies/{study}/stats").json()["groups"]
    ratings = counted["ranking"]["ratings"]
    assert [rating["system"] for rating in ratings] == list(TRUTH)
    inside = [rating["theta"]["low"] <= TRUTH[rating["system"]] <= rating["theta"]["high"] for rating in ratings]
    assert sum(inside) >= 4
    # With the two among them, differences shrink.
    spread = [max(r["theta"]["value"] for r in g["ranking"]["ratings"]) for g in (counted, everything)]
    assert spread[1] < spread[0]
    left = counted["ranking"]["left"]["value"]
    assert left["low"] < 0.3 < left["high"]
    assert counted["gold_failures"]["value"] < 0.1
    page = world.ask("GET", f"/studies/{study}").text
    for words in ("<b>ada</b>", "failed too many pairs with a known answer", "named one side over and over"):
        assert words in page
