"""The reproduction of BPT: verdicts beside their limits, and the whole of it at the smallest size."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from offbook.errors import ConfigError
from offbook.models.blockwise.audit import Result
from offbook.runs.directory import RunDirectory
from offbook.systems.bpt import claims, recipe
from offbook.systems.bpt.measure import Longest
from offbook.systems.bpt.presets import PRESETS, paper, smoke, tiny

CONFIG = tiny()


def found(**tokens: int) -> dict[str, Longest]:
    return {name: Longest(tokens=n, points=((100, 100), (n, n)), growth=1024.0) for name, n in tokens.items()}


CONTEXTS = {"vanilla": 100, "SDPA": 1_000, "attn": 2_000, "layer": 2_500, "segments": 2_600, "offload": 3_200}


def test_contexts_are_held_against_both_baselines() -> None:
    claim = claims.contexts(CONFIG, found(**CONTEXTS))
    assert claim.verdict == "reproduced"
    assert {m.name: m.value for m in claim.metrics if " to " in m.name} == {
        "layer to vanilla": 25, "layer to SDPA": 2.5, "offload to vanilla": 32, "offload to SDPA": 3.2,
        "attn to SDPA": 2, "segments to SDPA": 2.6,
    }  # fmt: skip
    assert {m.name: m.value for m in claim.baseline_metrics} == CONTEXTS
    assert {m.value for m in claim.metrics if m.name.startswith("growth")} == {1.0}
    for name, tokens in (("layer", 2_290), ("offload", 3_090), ("vanilla", 101)):
        assert claims.contexts(CONFIG, found(**{**CONTEXTS, name: tokens})).verdict == "contradicted"
    unjudged = replace(CONFIG, judged=False)
    assert claims.contexts(unjudged, found(**{**CONTEXTS, "layer": 1})).verdict == "recorded"


def test_depth_and_vocabulary_are_held_against_their_own_baselines() -> None:
    deep = {"SDPA, 12 layers": 100, "layer, 12 layers": 150, "segments, 12 layers": 200, "offload, 12 layers": 400}
    assert claims.depth(CONFIG, found(**deep), 12).verdict == "met"
    assert "12 layers of width 256" in claims.depth(CONFIG, found(**deep), 12).claim
    assert claims.depth(CONFIG, found(**{**deep, "offload, 12 layers": 399}), 12).verdict == "missed"
    wide = {"SDPA, all logits, V 9": 10, "SDPA, V 9": 60, "layer, V 9": 80}
    assert claims.vocabulary(CONFIG, found(**wide)).verdict == "met"
    assert claims.vocabulary(CONFIG, found(**{**wide, "layer, V 9": 79})).verdict == "missed"


def test_times_are_compared_pair_by_pair() -> None:
    seconds = {("SDPA", 8_192): [1.0, 2.0, 4.0], ("attn", 8_192): [0.9, 1.7, 3.6], ("layer", 8_192): [1.1, 2.0, 4.8]}
    claim = claims.time(replace(CONFIG, timed=((8_192, 4),)), seconds)
    assert [(m.name, m.value) for m in claim.metrics] == [
        ("attn to SDPA, 8192 tokens", 0.9),
        ("layer to SDPA, 8192 tokens", 1.1),
    ]
    assert claim.verdict == "met"
    seconds["attn", 8_192] = [0.91, 1.9, 3.6]
    assert claims.time(replace(CONFIG, timed=((8_192, 4),)), seconds).verdict == "missed"


def test_plans_gradients_and_losses_are_judged_by_the_worst() -> None:
    assert claims.planner(CONFIG, {"attn": 0.02, "layer": 0.1}).verdict == "met"
    assert claims.planner(CONFIG, {"attn": 0.02, "layer": 0.11}).verdict == "missed"
    errors = {torch.float32: 2e-6, torch.float64: 1e-11}
    results = [Result("case", dtype, error, "x", 0.0, 1.0) for dtype, error in errors.items()]
    assert claims.gradients(CONFIG, {0: results}).verdict == "reproduced"
    assert claims.gradients(CONFIG, {0: [*results, replace(results[0], error=3e-6)]}).verdict == "contradicted"
    assert claims.gradients(CONFIG, {0: [*results, replace(results[1], error=float("nan"))]}).verdict == "contradicted"
    curves = {"vanilla": [[2.0, 1.0]], "layer": [[2.0, 1.000009]]}
    one = replace(CONFIG, seeds=(0,))
    assert claims.losses(one, curves, b"text").verdict == "reproduced"
    assert claims.losses(one, {**curves, "layer": [[2.0, 1.00002]]}, b"text").verdict == "contradicted"


def test_presets_are_whole() -> None:
    assert list(PRESETS) == ["smoke", "tiny", "paper"]
    assert not smoke().judged
    assert tiny().judged
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"step\.device: expected a CUDA device"):
            recipe.run(paper(), RunDirectory(Path("never made")))


def test_smoke_runs_from_the_command_line_and_goes_on_from_its_folder(cli, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = cli(["reproduce", "bpt", "--preset", "smoke", "--out", "run", "--json"])
    assert outcome.exit_code == 0, outcome.stderr
    printed = json.loads(outcome.stdout)["claims"]
    assert len(printed) == 7
    assert {claim["verdict"] for claim in printed} == {"recorded"}
    values = {metric["name"]: metric["value"] for claim in printed for metric in claim["metrics"]}
    assert values["largest error, float32, seed 0"] <= 2e-6
    assert max(value for name, value in values.items() if name.startswith("largest difference")) <= 1e-5
    assert (tmp_path / "run/contexts.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "run/measurements.jsonl").read_bytes()
    again = cli(["reproduce", "bpt", "--preset", "smoke", "--out", "run", "--resume", "--json"])
    assert json.loads(again.stdout)["claims"] == printed
    assert (tmp_path / "run/measurements.jsonl").read_bytes() == before
