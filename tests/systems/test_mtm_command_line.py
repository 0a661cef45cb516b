"""Masked trajectory models from the command line: training, roles behind a colon, the reproduction."""

import json
from pathlib import Path

import pytest

from offbook.cli.main import main
from offbook.cli.policy import find_policy, run_and_role
from offbook.data.store import EpisodeStore
from offbook.sim.recording import record


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A model of a pendulum under random actions."""
    folder = tmp_path_factory.mktemp("mtm")
    record("gym:Pendulum-v1", 6, folder / "store", policy="random")
    command = ["train", "mtm", "--data", str(folder / "store"), "--out", str(folder / "run"), "--preset", "smoke"]
    assert main(command) == 0
    return folder / "run"


def test_a_training_ends_with_the_role_card(run) -> None:
    card = json.loads((run / "card.json").read_bytes())
    assert {row["role"] for row in card} == {"bc", "rcbc", "id", "fd", "return", "waypoint"}
    assert (run / "card.png").stat().st_size > 10_000


def test_a_role_and_a_target_stand_behind_the_run(run, tmp_path, monkeypatch) -> None:
    assert run_and_role(str(run)) == (str(run), "", None)
    assert run_and_role(f"{run}:bc") == (str(run), "bc", None)
    assert run_and_role(f"{run}:rcbc:0.9") == (str(run), "rcbc", 0.9)
    assert run_and_role(f"{run}::0.5") == (str(run), "", 0.5)
    found = find_policy(f"{run}::0.5", None)
    assert (found.role, found.provenance["target"]) == ("rcbc", 0.5)
    assert run_and_role("my_module:policy") == ("my_module:policy", "", None)
    # A package of that name is not a run.
    monkeypatch.chdir(tmp_path)
    Path("my_module").mkdir()
    assert run_and_role("my_module:policy") == ("my_module:policy", "", None)


def test_all_roles_are_evaluated_side_by_side(cli, run) -> None:
    roles = [f"{run}:bc", f"{run}:rcbc:0.9", f"{run}:id", f"{run}:plan"]
    command = ["evaluate", *roles, "--episodes", "2", "--max-steps", "5", "--videos", "0", "--json"]
    code, stdout, stderr = cli(command)
    assert code == 0, stderr
    assert [policy["policy"] for policy in json.loads(stdout)["policies"]] == roles
    assert (run / "evaluation" / "evaluation.json").is_file()


@pytest.mark.parametrize(
    ("role", "message"),
    [
        ("planner", "did you mean 'plan'?"),
        ("rcbc:high", "expected a number behind the role, got 'high'"),
        ("rcbc:nan", "in role 'rcbc', target: expected a share of the recordings' range, -10 to 10, got nan"),
        ("plan:inf", "in role 'plan', target: expected a share of the recordings' range, -10 to 10, got inf"),
        (":-11", "in role 'rcbc', target: expected a share of the recordings' range, -10 to 10, got -11"),
        ("bc:0.9", "in role 'bc': expected no target, as it aims at nothing, got one, 0.9; leave the target out, or"),
    ],
)
def test_wrong_roles_are_named(cli, run, role, message) -> None:
    code, _, stderr = cli(["evaluate", f"{run}:{role}", "--episodes", "1"])
    assert code == 2
    assert message in stderr


def test_a_policy_without_roles_says_so(cli, run, tmp_path) -> None:
    store = run.parent / "store"
    assert cli(["train", "bc", "--data", str(store), "--out", str(tmp_path / "bc"), "--preset", "smoke"])[0] == 0
    for words, expected in ((":plan", "a policy with roles"), ("::0.9", "a policy that aims at a return")):
        code, _, stderr = cli(["evaluate", f"{tmp_path / 'bc'}{words}", "--episodes", "1"])
        assert code == 2
        assert f"expected {expected}, got bc-bc, without; leave {words} out" in stderr


def test_recordings_without_actions_teach_to_fill_in_and_no_more(cli, run, tmp_path) -> None:
    whole = EpisodeStore.open(run.parent / "store")
    with EpisodeStore.create(tmp_path / "seen", whole.schema) as writer:
        for number in range(len(whole)):
            fields = {**whole.episode(number).fields, "action": None}
            writer.append(fields, terminated=False, truncated=True)
    command = ["train", "mtm", "--data", str(tmp_path / "seen"), "--out", str(tmp_path / "run"), "--preset", "smoke"]
    code, stdout, stderr = cli([*command, "--json"])
    assert code == 0, stderr
    assert {row["role"] for row in json.loads(stdout)["card"]} == {"return", "waypoint"}
    code, _, stderr = cli([*command, "--role", "bc"])
    assert code == 2
    assert "actions in one training episode or more" in stderr
