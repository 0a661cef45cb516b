"""`offbook rating ...` from the outside: a folder of outputs becomes a ranking, for every kind of output."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from rating_world import World, by_number, jsonl, texts

from offbook.data.clips import write_clip
from offbook.rating.app import Settings, rating_app

pytestmark = pytest.mark.service


def served(folder: Path) -> World:
    """The service of a folder, in this process."""
    settings = Settings.load(folder)
    database, blobs = settings.open()
    return World(rating_app(database, blobs, settings.owner), raise_server_exceptions=False)


def tokens(outcome) -> list[str]:
    return [link.split("#")[1] for link in json.loads(outcome.stdout)["invitations"]]


def answers(folder: Path) -> Path:
    """Texts of two systems as files."""
    for system, words in (("good", "5 words"), ("poor", "1 word")):
        (folder / system).mkdir(parents=True)
        for i in range(5):
            (folder / system / f"q{i}.txt").write_text(f"{words} on {i}")
    (folder / "prompts.json").write_text(json.dumps({f"q{i}": f"Question {i}?" for i in range(5)}))
    return folder


def pictures(folder: Path) -> Path:
    for shade, system in ((200, "good"), (40, "poor")):
        (folder / system).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (20 + i, 20), (shade,) * 3).save(folder / system / f"p{i}.png")
    return folder


def films(folder: Path) -> Path:
    lines = []
    folder.mkdir()
    for shade, system in ((200, "good"), (40, "poor")):
        for i in range(5):
            name = f"{system}-{i}.mp4"
            write_clip(folder / name, np.full((4 + i, 32, 32, 3), shade, np.uint8), 10)
            lines.append({"item": f"scene {i}", "system": system, "prompt": "Pour.", "file": name})
    (folder / "outputs.jsonl").write_bytes(jsonl(lines))
    return folder


def by_brightness(world: World):
    """Looks at what a browser is given, and prefers what is brighter."""

    def prefer(given) -> str:
        shades = []
        for side in ("left", "right"):
            content = world.get(given[side]["url"]).content
            path = Path(world.folder) / "seen"
            path.write_bytes(content)
            if given[side]["kind"] == "image":
                shades.append(int(np.asarray(Image.open(path))[5, 5, 0]))
            else:
                from offbook.data.clips import read_clip

                shades.append(int(read_clip(path)[0, 5, 5, 0]))
        return "left" if shades[0] > shades[1] else "right"

    return prefer


@pytest.mark.parametrize(
    ("make", "modality", "more"),
    [(answers, "text", []), (pictures, "image", []), (films, "video", []),
     (films, "rollout", ["--modality", "rollout"])],
    ids=["text", "image", "video", "rollout"],
)  # fmt: skip
def test_a_study_of_each_modality_through_the_same_doors(tmp_path: Path, cli, make, modality: str, more) -> None:
    source, folder, out = make(tmp_path / "outputs"), tmp_path / "rating", tmp_path / "results"
    votes = tmp_path / "votes.jsonl"
    words = ["rating", "import", str(source), "--folder", str(folder), "--name", "first", "--open", "--raters", "3"]
    made = cli([*words, "--kind", "script", *more, "--json"])
    assert made.exit_code == 0, made.stderr
    record = json.loads(made.stdout)
    assert (record["state"], record["added"], record["pairs"], record["name"]) == ("open", 10, 5, "first")
    with served(folder) as world:
        world.folder = str(tmp_path)
        invitation = world.ask("GET", "invitation", tokens(made)[0]).json()
        assert invitation["modality"] == modality
        for token in tokens(made):
            world.judge(token, by_number if modality == "text" else by_brightness(world), watched=1.0)
    exported = cli(["rating", "export", "first", "--folder", str(folder), "--out", str(votes), "--close"])
    assert exported.exit_code == 0, exported.stderr
    assert "(closed)" in exported.stdout
    found = cli(["rating", "stats", str(votes), "--anchor", "poor", "--out", str(out), "--json"])
    assert found.exit_code == 0, found.stderr
    (group,) = json.loads(found.stdout)["groups"]
    assert [rating["system"] for rating in group["ranking"]["ratings"]] == ["good", "poor"]
    assert (group["ranking"]["votes"], group["agreement"]["raw"]["value"]) == (15, 1)
    assert json.loads((out / "stats.json").read_text())["groups"][0]["votes"] == group["votes"]
    assert "good" in (out / "stats.txt").read_text()
    with Image.open(out / "ratings.png") as picture:
        assert picture.width > 300


def test_somebody_elses_votes_are_shown_like_ones_own(tmp_path: Path, cli, world: World) -> None:
    study = world.study(texts(("a", "b", "c"), items=5, gold=3), gold_rate=0.1, repeat_rate=0.1)
    for token in world.invite(study, 4, cohort="spring"):
        world.judge(token, by_number, note="n", reasons=["clear"])
    world.own("POST", f"studies/{study}/close")
    votes = tmp_path / "votes.jsonl"
    given = world.votes(study)
    given[0]["left_features"] = given[0]["right_features"] = {"characters": 6.0}  # others have more
    votes.write_text("".join(json.dumps(vote) + "\n" for vote in given))
    folder = tmp_path / "rating"
    made = cli(["rating", "import", str(votes), "--folder", str(folder), "--name", "theirs", "--json"])
    assert json.loads(made.stdout)["state"] == "closed", made.stderr
    assert cli(["rating", "import", str(votes), "--folder", str(folder), "--name", "theirs"]).exit_code == 1
    with served(folder) as other:
        page = other.ask("GET", "/studies/1").text
        ours, theirs = (w.ask("GET", f"studies/{study}/stats").json()["groups"][0] for w in (world, other))
    assert "theirs" in page
    # Names of raters and pairs are new; everything that is said with them is the same.
    assert theirs["ranking"] == ours["ranking"]
    for name in ("votes", "skips", "agreement", "gold_failures", "consistency"):
        assert theirs[name] == ours[name]
    again = cli(["rating", "export", "theirs", "--folder", str(folder), "--out", str(tmp_path / "again.jsonl")])
    assert again.exit_code == 0, again.stderr
    pairs = [[json.loads(line) for line in path.read_text().splitlines()] for path in (votes, tmp_path / "again.jsonl")]
    for before, after in zip(*pairs, strict=True):
        for name in (
            "item",
            "left",
            "right",
            "choice",
            "created",
            "note",
            "reasons",
            "pair_kind",
            "expected",
            "cohort",
        ):
            assert before[name] == after[name]


def test_outputs_are_added_to_a_draft_until_it_opens(tmp_path: Path, cli) -> None:
    folder = tmp_path / "rating"
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts(items=2)))
    (tmp_path / "b.jsonl").write_bytes(jsonl(texts(items=3)))
    design = tmp_path / "design.json"
    design.write_text(json.dumps({"raters_per_pair": 5, "min_dwell_s": 2, "prereg": {"rules": {"min_streak_p": 0.01}}}))
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"raters_per_pair": 4}))

    def bring(file: str, *more: str):
        return cli(["rating", "import", str(tmp_path / file), "--folder", str(folder), "--name", "s", *more])

    assert "4 added" in bring("a.jsonl", "--design", str(design)).stdout
    assert "4 known" in bring("a.jsonl", "--design", str(design), "--modality", "text").stdout
    pictures(tmp_path / "pictures")
    for code, words, named in (
        (2, ["b.jsonl", "--anchor", "alpha"], "study 's', anchor: expected '' as in the draft, got 'alpha'"),
        (
            2,
            ["b.jsonl", "--question", "Which?"],
            "study 's', question: expected 'Which one is better?' as in the draft",
        ),
        (2, ["b.jsonl", "--modality", "image"], "study 's', modality: expected 'text' as in the draft, got 'image'"),
        (2, ["b.jsonl", "--design", str(other)], "study 's', raters_per_pair: expected 5 as in the draft, got 4"),
        (1, ["pictures"], "a file in a study of texts"),
    ):
        refused = bring(*words)
        assert (refused.exit_code, named in refused.stderr) == (code, True), refused.stderr
    outcome = bring("b.jsonl", "--open", "--raters", "2", "--url", "https://rate.example/")
    assert "2 added, 4 known, 3 pairs" in outcome.stdout
    assert outcome.stdout.count("https://rate.example/rate#rt_") == 2
    assert bring("b.jsonl").exit_code == 1
    kept = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert outcome.stdout.split("#")[1].split()[0].encode() not in kept


def test_the_command_of_a_page_makes_its_figures(tmp_path: Path, cli, world: World, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = {}
    for name, items in (("all", 4), ("skipped", 1)):
        records = texts(("a", "b", "c"), items=items)
        study = made[name] = world.study(records, name=name, anchor="b", min_dwell_s=1.0, repeat_rate=0)
        for token in world.invite(study, 2, kind="human"):
            world.ask("POST", "consent", token)
            about_b = lambda given: any(given[side]["text"].startswith("2") for side in ("left", "right"))  # noqa: E731
            world.judge(token, lambda given: "skip" if name == "skipped" and about_b(given) else by_number(given))  # noqa: B023
        world.own("POST", f"studies/{study}/close")
    for name, more in (("all", " --anchor b"), ("skipped", "")):
        page = world.ask("GET", f"/studies/{made[name]}").text
        command = f"offbook rating stats votes.jsonl{more} --min-dwell-ms 1000"
        assert f">{command}<" in page
        (tmp_path / "votes.jsonl").write_text(world.ask("GET", f"studies/{made[name]}/export").text)
        found = cli([*command.split()[1:], "--json"])
        shown = world.ask("GET", f"studies/{made[name]}/stats").json()
        assert json.loads(found.stdout) == {"ok": True} | shown, found.stderr
        assert shown["groups"][0]["quality"][0]["hasty"] > 0


def voted(**changes) -> str:
    """The line of a vote."""
    plain = {"schema": 1, "study": "s", "id": "1", "pair": "p", "item": "i", "rater": "r", "left": "alpha",
             "right": "beta", "choice": "left", "created": "2026-01-31T12:00:00+00:00"}  # fmt: skip
    return json.dumps(plain | changes) + "\n"


VOTES = {
    "votes": voted(),
    "half": voted(note="\ud800"),
    "halves": voted(left="\ud800"),
    "twice": voted(excluded=["dwell", "dwell"]),
    "long": voted(excluded=["d" * 201]),
    "again": voted() + voted(id="2"),
    "pairs": voted() + voted(id="2", pair="q"),
    "golds": voted(pair_kind="gold", expected="alpha")
    + voted(id="2", pair="q", rater="other", pair_kind="gold", expected="beta"),
    "repeat": voted(pair_kind="gold", expected="alpha")
    + voted(id="2", pair="q", rater="other", pair_kind="repeat", repeat_of="p"),
    "features": voted(left_features={"words": 1}, right_features={"words": 2})
    + voted(id="2", pair="q", rater="other", left_features={"words": 3}, right_features={"words": 2}),
}
"""Files of votes; all but the first cannot be taken in."""


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (["import"], 2, "a source, or --runs"),
        (["import", "{tmp}/none.jsonl"], 1, "no such file"),
        (["import", "{tmp}/empty"], 1, "SYSTEM/ITEM.EXTENSION"),
        (["import", "{tmp}/x.jsonl", "--folder", "{tmp}/empty"], 1, "x.jsonl, line 1"),
        (["import", "{tmp}/escape.jsonl"], 1, "the file '../secret.png'"),
        (["import", "{tmp}/good.jsonl", "--modality", "image"], 1, "a text in a study of images"),
        (["import", "{tmp}/good.jsonl", "--design", "{tmp}/x.jsonl"], 2, "a JSON object"),
        (["import", "{tmp}/good.jsonl", "--raters", "-1"], 2, "--raters"),
        (["import", "{tmp}/good.jsonl", "--folder", "{tmp}/full"], 2, "a new or empty folder"),
        (["import", "{tmp}/good.jsonl", "--design", "{tmp}/design.json", "--anchor", "y"], 2, "--anchor: expected 'x'"),
        (["import", "{tmp}/prompts"], 2, "offbook: {tmp}/prompts/prompts.json: expected a JSON object"),
        (["import", "{tmp}/votes.jsonl", "--modality", "text"], 2, "but question, name, anchor beside votes"),
        (["import", "{tmp}/votes.jsonl", "--design", "{tmp}/design.json"], 2, "got 'seed'; leave out 'seed'"),
        (["import", "{tmp}/votes.jsonl", "--raters", "2"], 2, "expected outputs to judge"),
        (["import", "{tmp}/votes.jsonl", "--open"], 2, "expected outputs to judge"),
        (["import", "{tmp}/votes.jsonl", "--anchor", "alhpa"], 1, "did you mean 'alpha'?"),
        (["import", "{tmp}/half.jsonl"], 1, "note: expected a text without NUL or half a character"),
        (["import", "{tmp}/twice.jsonl"], 1, "excluded: expected a list of texts"),
        (["import", "{tmp}/long.jsonl"], 1, "vote '1': expected names of at most 200 characters"),
        (["import", "{tmp}/again.jsonl"], 1, "line 2: expected one vote of rater 'r' on pair 'p', got a second after"),
        (["import", "{tmp}/pairs.jsonl"], 1, "vote '2': expected one pair of 'alpha' and 'beta' for 'i' by a rater"),
        (["import", "{tmp}/golds.jsonl"], 1, "expected 'alpha', which is the better one in vote '1', got 'beta'"),
        (["import", "{tmp}/repeat.jsonl"], 1, "vote '2': expected a repeat of a real pair, got one of pair 'p'"),
        (["import", "{tmp}/features.jsonl"], 1, "vote '2', output of 'alpha' for 'i': expected the features"),
        (["stats", "{tmp}/halves.jsonl", "--out", "{tmp}/out"], 1, "left: expected a text that is not empty"),
        (["stats", "{tmp}/votes.jsonl", "--seed", "-1"], 2, "--seed: expected 0 or more"),
        (["import", "--runs", "1", "2"], 2, "--folder of an arena"),
        (["import", "--runs", "1", "2", "--folder", "{tmp}/arena", "--anchor", "a"], 2, "question, name beside --runs"),
        (["export", "1"], 2, "offbook rating serve"),
        (["stats", "{tmp}/none.jsonl"], 1, "a file of votes"),
        (["stats", "{tmp}/good.jsonl"], 1, "a vote of schema"),
        (["serve", "{tmp}/full"], 2, "a new or empty folder"),
        (["serve", "{tmp}/arena"], 2, "offbook arena serve"),
    ],
)  # fmt: skip
def test_wrong_use_is_one_sentence(tmp_path: Path, cli, monkeypatch, words, code: int, named: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("precious")
    (tmp_path / "arena").mkdir()
    (tmp_path / "arena" / "arena.json").write_text("{}")
    (tmp_path / "x.jsonl").write_text("[]\n")
    (tmp_path / "design.json").write_text('{"anchor": "x", "seed": 1}')
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "prompts.json").write_text("[")
    for name, lines in VOTES.items():
        (tmp_path / f"{name}.jsonl").write_text(lines)
    (tmp_path / "good.jsonl").write_bytes(jsonl(texts()))
    (tmp_path / "escape.jsonl").write_bytes(jsonl([{"item": "i", "system": "a", "file": "../secret.png"}]))
    Image.new("RGB", (4, 4)).save(tmp_path.parent / "secret.png")
    outcome = cli(["rating", *(word.format(tmp=tmp_path) for word in words)])
    assert (outcome.exit_code, outcome.stdout) == (code, "")
    assert named.format(tmp=tmp_path) in outcome.stderr
    assert outcome.stderr.strip().splitlines()[-1].startswith("offbook: ")
    # Only outputs that can be read make a new folder.
    assert (tmp_path / "rating").exists() == (named in ("the file '../secret.png'", "a text in a study of images"))


def test_serve_makes_a_folder_tells_the_token_once_and_answers(tmp_path: Path, cli) -> None:
    folder = tmp_path / "r"
    command = [sys.executable, "-m", "offbook.cli.main", "rating", "serve", str(folder), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        said = ""
        while "Studies are at" not in said:
            line = server.stderr.readline()
            assert line, said
            said += line
        answer = httpx.get(said.split("Studies are at ")[1].split(" ")[0], timeout=30, trust_env=False)
        server.terminate()
    assert (answer.status_code, "No study yet" in answer.text) == (200, True)
    token = next(word for word in said.split() if word.startswith("ro_"))
    # Only its hash is kept, where only its owner looks; nobody is told again.
    kept = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert token.encode() not in kept
    assert (folder / "rating.json").stat().st_mode & 0o077 == 0
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts()))
    outcome = cli(["rating", "import", str(tmp_path / "a.jsonl"), "--folder", str(folder)])
    assert (outcome.exit_code, "ro_" in outcome.stderr) == (0, False)
