"""`offbook context`: tables that people and machines read, exit codes, and wrong flags in one sentence."""

import json
import re
from dataclasses import replace

import pytest

from offbook.cli import context
from offbook.models.blockwise.audit import audit
from offbook.models.blockwise.plan import plan as planned
from offbook.systems.bpt.measure import Measured


def test_plan_shows_the_longest_context_of_each_way(cli):
    outcome = cli(["context", "plan", "--budget", "2GiB"])
    assert outcome.exit_code == 0, outcome.stderr
    assert "2.00 GiB, batch 1, float32" in outcome.stdout
    data = json.loads(cli(["context", "plan", "--budget", "2GiB", "--tokens", "100000", "--json"]).stdout)
    most = {way["way"]: way["longest"] for way in data["ways"]}
    assert data["budget"] == 2 << 30
    assert most["none"] < most["ffn"] < most["attn"] < most["layer"] < most["layer, offload to disk"]
    assert [way["fits"] for way in data["ways"]] == [longest >= 100_000 for longest in most.values()]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--budget", "two"], "--budget: expected a size such as 2GiB"),
        (["--budget", "0GiB"], "--budget: expected a size such as 2GiB"),
        (["--dtype", "int8"], "--dtype: expected float32 or bfloat16"),
        (["--batch", "0"], "--batch: expected a positive number"),
        (["--heads", "7"], "dim and heads: expected a multiple"),
    ],
)
def test_wrong_plans_are_explained(cli, flags, words):
    outcome = cli(["context", "plan", *flags])
    assert (outcome.exit_code, outcome.stderr.count("\n")) == (2, 1)
    assert words in outcome.stderr


def test_bench_holds_plans_against_measurements(cli, monkeypatch):
    def fake(step):
        size = 2 * planned(step.backbone, step.tokens).total if step.arm != "blockwise" else 0
        size = size or int(planned(step.backbone, step.tokens).total * share[step.backbone.remat])
        return Measured(bytes=size, seconds=0.5 if step.arm == "blockwise" else 1.0, loss=1.0)

    share = {"none": 1.0, "ffn": 1.05, "attn": 0.95, "layer": 1.0}
    monkeypatch.setattr(context, "measure", fake)
    outcome = cli(["context", "bench", "--tokens", "512"])
    assert outcome.exit_code == 0, outcome.stderr
    assert [line.split()[-1] for line in outcome.stdout.splitlines()[3:]] == ["1.00", "1.00", *6 * ["0.50"]]
    share["layer"] = 1.2
    outcome = cli(["context", "bench", "--tokens", "512", "--json"])
    assert outcome.exit_code == 1
    assert json.loads(outcome.stdout)["beyond"] == ["layer", "layer, segments of 2", "layer, offload to disk"]
    assert cli(["context", "bench", "--tokens", "0"]).exit_code == 2


def test_check_tells_what_is_beyond_its_limit(cli, monkeypatch):
    outcome = cli(["context", "check", "--shapes", "2"])
    assert (outcome.exit_code, "All are within their limits." in outcome.stdout) == (0, True)
    monkeypatch.setattr(context, "audit", lambda *of: (replace(result, error=1.0) for result in audit(*of)))
    outcome = cli(["context", "check", "--shapes", "1"])
    assert outcome.exit_code == 1
    assert "2 of 2 are beyond their limit" in outcome.stdout
    assert (
        len(re.findall(r"^beyond: 1 \(plain operations: [1-9].*e-0\d\) in \w+.* of batch", outcome.stdout, re.M)) == 1
    )
    assert len(re.findall(r"^beyond: 1 in \w+.* of batch", outcome.stdout, re.M)) == 1
    assert cli(["context", "check", "--shapes", "0"]).exit_code == 2
