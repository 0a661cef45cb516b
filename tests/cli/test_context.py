"""`offbook context`: tables that people and machines read, exit codes, and wrong flags in one sentence."""

import json
import re
from dataclasses import replace

import pytest

from offbook.cli import context
from offbook.models.blockwise.audit import audit


def test_plan_shows_the_longest_context_of_each_way(cli):
    outcome = cli(["context", "plan", "--budget", "2GiB"])
    assert outcome.exit_code == 0, outcome.stderr
    assert "2.00 GiB, batch 1, float32" in outcome.stdout
    data = json.loads(cli(["context", "plan", "--budget", "2GiB", "--tokens", "100000", "--json"]).stdout)
    most = {way["way"]: way["longest"] for way in data["ways"]}
    assert data["budget"] == 2 << 30
    assert most["none"] < most["ffn"] < most["attn"] < most["layer"] < most["layer, offload disk"]
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
