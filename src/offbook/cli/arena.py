"""`offbook arena ...`: run an arena, lend it robots, submit policies to it."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import tyro

from offbook.cli.access import TOKEN, URL, read_settings, read_token
from offbook.cli.policy import find_policy, run_and_role
from offbook.cli.report import Report, interval_text, table
from offbook.client.submit import ArenaClient, kept_promise
from offbook.errors import ConfigError, needs_extra
from offbook.runs.checkpoint import read_header
from offbook.runs.directory import RunDirectory

_ANCHORS = ("expert", "random")


def init(
    folder: tyro.conf.Positional[Path] = Path("arena"),
    *,
    benchmarks: tuple[str, ...] = ("pour", "scoop", "pendulum"),
    trials: int = 20,
    real: str | None = None,
    pass_score: float | None = None,
    seed: int | None = None,
    database: str = "",
    blobs: str = "",
    operator: str = "operator",
) -> Report:
    """Sets up an arena in a folder and prints the operator's token, once.

    Run again on the same folder it adds missing benchmarks, and new versions of those whose protocol differs, and
    makes another token; what is there stays.

    Args:
        folder: where settings, the embedded database and recordings will stand.
        benchmarks: what policies are tried on: pour, scoop, pendulum; several trials in a row: darkpoint, hopper-tries;
            and files, ending in .json, that describe benchmarks for robots of your own.
        trials: scenes in each split of a benchmark; a file says itself.
        real: also adds each of these, but files, for real robots as NAME-real; their workers are started with this as
            --robot.
        pass_score: mean score on the simulated benchmark that a policy needs before it may run on real robots.
        seed: from which scenes and seeds follow; drawn in secret for a new arena, which keeps it in arena.json.
        database: address of a PostgreSQL database; SQLite in the folder when empty.
        blobs: folder or fsspec address for recordings and checkpoints; in the folder when empty.
        operator: name of the user whose token is printed.

    Examples:
        offbook arena init
        offbook arena init /srv/arena --database postgresql+psycopg://arena@localhost/arena --trials 40
        offbook arena init lab --benchmarks pour --real franka --pass-score 0.6
        offbook arena init lab --benchmarks bench.json
    """
    with needs_extra("arena"):
        from offbook.arena import accounts, submissions
        from offbook.arena.database import Database
        from offbook.arena.service import Settings
        from offbook.arena.suites import make_suite, on_real_robots
    fresh = not (folder / "arena.json").exists()
    if not fresh and (database or blobs):
        raise ConfigError(
            str(folder), expected="a new folder for these settings", got="an arena", fix=f"edit {folder}/arena.json"
        )
    if fresh and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(str(folder), expected="a new or empty folder", got="something else", fix="choose another")
    drawn = secrets.randbits(63) if seed is None else seed
    settings = Settings(folder=folder, database=database, blobs=blobs, seed=drawn) if fresh else Settings.load(folder)
    root = settings.seed if seed is None else seed
    specs = [make_suite(name, trials, root) for name in benchmarks]
    if (real is None) != (pass_score is None):
        raise ConfigError("--real and --pass-score", expected="both or neither", got="one of them", fix="give both")
    if real is not None and pass_score is not None:
        # Scenes of their own: those of the simulated benchmark are known to whoever has passed it.
        simulated = [name for name in benchmarks if not name.endswith(".json")]
        if not simulated:
            fix = "name a simulated benchmark too, or leave --real and --pass-score out"
            raise ConfigError("--real", expected="a simulated benchmark to pass first", got="files alone", fix=fix)
        specs += [on_real_robots(make_suite(name, trials, root + 1), real, pass_score) for name in simulated]
    store = Database(settings.database_url)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        store.migrate()
        if fresh:
            settings.save()
        with store.write() as session:
            made = [submissions.define_benchmark(session, spec) for spec in specs]
            names = [{"name": each.name, "version": each.version, "robot": each.robot_class} for each in made]
            user = accounts.find_user(session, operator, create=True)
            token = accounts.issue_token(session, user, ["admin"], label="made by arena init", days=None)
            accounts.record_audit(session, None, "token.create", f"{operator}: admin")
    finally:
        store.close()
    listed = ", ".join(f"{each['name']} (version {each['version']})" for each in names)
    text = (
        f"An arena stands in {folder} with {listed or 'no benchmarks'}.\n\n"
        f"The operator's token, shown this once:\n\n  {token}\n\n"
        f"Next: offbook arena serve {folder}\n"
        f"      {TOKEN}={token[:11]}... offbook arena worker --robot {names[0]['robot'] if names else 'pour'}"
    )
    return Report(text=text, data={"folder": str(folder), "benchmarks": names, "user": operator, "token": token})


def serve(
    folder: tyro.conf.Positional[Path] = Path("arena"),
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    advertise: str = "",
) -> Report:
    """Runs an arena's service and pages until it is interrupted.

    Several may serve one arena on PostgreSQL, each from its own folder with the same arena.json and one blob store.

    Args:
        folder: of the arena.
        host: address to listen on. Beyond this machine put a server with TLS in front; tokens travel in headers.
        port: 0 for any free one.
        advertise: where several serve one arena, the address at which workers of the others reach this one, as
            http(s)://HOST[:PORT]; here for the address that it listens on.

    Examples:
        offbook arena serve
        offbook arena serve /srv/arena --port 8080
        offbook arena serve /srv/arena --host 10.0.0.5 --advertise here
    """
    with needs_extra("arena"):
        from offbook.arena.service import Settings
        from offbook.arena.serving import serve_arena
    settings = Settings.load(folder)

    def announce(url: str) -> None:
        print(f"The arena is open at {url} (interrupt to close it).", file=sys.stderr, flush=True)

    url = serve_arena(settings, host=host, port=port, advertise=advertise, announce=announce)
    return Report(text=f"The arena at {url} is closed.", data={"url": url})


def worker(
    *,
    robot: str = "pour",
    settings: Path | None = None,
    url: str = URL,
    name: str | None = None,
    max_trials: int | None = None,
    idle_exit: float | None = None,
    sandbox: bool = False,
    token_file: Path | None = None,
) -> Report:
    """Lends a robot, real or simulated, to an arena. The token (scope worker) comes from OFFBOOK_TOKEN.

    It ends with exit code 1 when the robot needs somebody beside it.

    Args:
        robot: pour, scoop, franka, lerobot, a robot of another installed package, or a simulator as LIBRARY:NAME, such
            as gym:Pendulum-v1; gym:Hopper-v5@4 for a benchmark of four trials in a row.
        settings: JSON file with the robot's address, cameras and limits.
        url: address of the arena.
        name: of this robot on the arena's pages; host and process by default.
        max_trials: end after so many trials.
        idle_exit: end after so many seconds without work.
        sandbox: play uploaded checkpoints in a sandbox (bubblewrap), without network and files; it must prove itself.
        token_file: file that holds the token, instead of OFFBOOK_TOKEN.

    Examples:
        offbook arena worker
        offbook arena worker --robot gym:Pendulum-v1 --url https://arena.example --name swing-1
        offbook arena worker --robot franka --settings cell.json --url https://arena.example
    """
    with needs_extra("arena"):
        from offbook.arena.worker import run_worker
    report = run_worker(
        url,
        read_token(token_file),
        robot,
        settings=read_settings(settings),
        name=name,
        max_trials=max_trials,
        idle_exit=idle_exit,
        sandbox=sandbox,
        on_event=lambda line: print(line, file=sys.stderr, flush=True),
    )
    played = ", ".join(f"{count} {outcome}" for outcome, count in sorted(report.trials.items())) or "none"
    text = f"trials: {played}" + (f"\nThe robot needs somebody: {report.needs_human}" if report.needs_human else "")
    data = {"trials": report.trials, "dropped": report.dropped, "needs_human": report.needs_human}
    return Report(text=text, data=data, exit_code=1 if report.needs_human else 0)


def token(
    action: tyro.conf.Positional[Literal["create", "list", "revoke"]],
    prefix: tyro.conf.Positional[str] = "",
    *,
    folder: Path = Path("arena"),
    user: str = "",
    scopes: tuple[str, ...] = ("submit",),
    days: float = 90.0,
    label: str = "",
) -> Report:
    """Gives out, lists or withdraws tokens, at the machine of the arena.

    A token is printed once, when it is made; the arena keeps only its hash. One that is withdrawn is out at once.

    Args:
        action: create, list or revoke.
        prefix: of the token to revoke: the eight characters after ob_.
        folder: of the arena.
        user: whose token it is; made when new.
        scopes: what it allows: submit, worker, admin.
        days: until it expires; 0 for never.
        label: a note to recognise it by.

    Examples:
        offbook arena token create --user ada
        offbook arena token create --user lab --scopes worker --days 0 --label "robot in room 3"
        offbook arena token list
        offbook arena token revoke 3f9a1c02
    """
    with needs_extra("arena"):
        from offbook.arena import accounts
        from offbook.arena.database import Database
        from offbook.arena.service import Settings
    store = Database(Settings.load(folder).database_url)
    try:
        store.migrate()
        with store.write() as session:
            if action == "create":
                owner = accounts.find_user(session, user, create=True)
                made = accounts.issue_token(session, owner, scopes, label=label, days=days or None)
                accounts.record_audit(session, None, "token.create", f"{user}: {','.join(scopes)}")
                return Report(
                    text=f"Token of {user} for {', '.join(scopes)}, shown this once:\n\n  {made}",
                    data={"user": user, "scopes": list(scopes), "token": made},
                )
            if action == "revoke":
                accounts.revoke_token(session, prefix)
                accounts.record_audit(session, None, "token.revoke", prefix)
                return Report(text=f"Token {prefix} is withdrawn.", data={"revoked": prefix})
            rows = accounts.list_tokens(session)
    finally:
        store.close()
    lines = [[row["prefix"], row["user"], ",".join(row["scopes"]), _standing(row), row["label"]] for row in rows]
    return Report(text=table(["prefix", "user", "scopes", "standing", "label"], lines), data={"tokens": rows})


def submit(
    policy: tyro.conf.Positional[str],
    *,
    benchmark: str = "pour",
    split: str | None = None,
    name: str | None = None,
    method: str = "",
    imitates: str = "",
    trials: int | None = None,
    against: str | None = None,
    against_name: str | None = None,
    url: str = URL,
    wait: bool = False,
    timeout: float = 3600.0,
    token_file: Path | None = None,
) -> Report:
    """Submits a policy for trials. The token (scope submit) comes from OFFBOOK_TOKEN.

    Args:
        policy: a run folder or checkpoint file, which is uploaded and checked, with :ROLE or :ROLE:TARGET behind it for
            a model of many roles, or ::TARGET for another return to aim at; remote for a policy that dials in from your
            machine; expert or random for the benchmark's anchors (scope admin).
        benchmark: on which.
        split: on which scenes; the benchmark's first by default.
        name: label on the leaderboard; the name of the run folder by default.
        method: how it was made, in a few words; of the first policy.
        imitates: whose behaviour it learned, in a few words; likewise.
        trials: only the first so many scenes.
        against: a second policy, given like the first: on each scene one runs right after the other, which of them
            first is drawn by lot, and raters see them as policy A and policy B.
        against_name: its label on the leaderboard.
        url: address of the arena.
        wait: stay until all trials are done.
        timeout: longest time to wait, seconds.
        token_file: file that holds the token, instead of OFFBOOK_TOKEN.

    Examples:
        offbook arena submit runs/bc --benchmark pour --split position --wait
        offbook arena submit runs/mtm:rcbc:0.9 --name "MTM, return-conditioned"
        offbook arena submit remote --name my-policy --benchmark pour
        offbook arena submit runs/new --against runs/old --benchmark pour
    """
    if against is None and against_name is not None:
        raise ConfigError("--against-name", expected="--against beside it", got="none", fix="name the second policy")
    token = read_token(token_file)
    common = {"benchmark": benchmark, "split": split, "trials": trials}
    with ExitStack() as stack:
        arena = stack.enter_context(ArenaClient(url, token))
        given = {key: value for key, value in common.items() if value is not None}
        told = {"method": method, "imitates": imitates}  # of the first alone, whatever the second is
        records = [given | told | _record(arena, stack, policy, name, "--name")]
        if against is not None:
            records.append(given | _record(arena, stack, against, against_name, "--against-name"))
        if against is None:
            entries = [arena.request("POST", "/v1/submissions", json=records[0])]
        else:
            entries = arena.submit_pair(*records)
        if wait:
            entries = [arena.wait(each["id"], timeout_s=timeout, progress=_show_progress) for each in entries]
            print(file=sys.stderr)
    text = "\n\n".join(_entry_text(each, url) for each in entries)
    return Report(text=text, data=entries[0] if against is None else {"entries": entries})


def _record(arena: ArenaClient, stack: ExitStack, policy: str, name: str | None, flag: str) -> dict[str, Any]:
    """Label and policy of a submission, with its checkpoint uploaded."""
    if policy == "remote" and name is None:
        raise ConfigError(flag, expected="a label for the leaderboard", got="none", fix=f"give {flag}")
    given = policy in ("remote", *_ANCHORS)
    file = None if given else stack.enter_context(_upload(policy))
    label = name or (policy if given else Path(run_and_role(policy)[0]).resolve().stem)
    anchor = policy if policy in _ANCHORS else None
    return {"name": label} | arena.policy(checkpoint=file, anchor=anchor, progress=_show_upload)


@contextmanager
def _upload(policy: str) -> Iterator[Path]:
    """The file to send: a run's checkpoint, or a copy of it in the role, or aiming at the return, that is asked for."""
    path, role, aim = run_and_role(policy)
    file = RunDirectory.open(path).checkpoint() if Path(path).is_dir() else Path(path)
    read_header(file)  # what the arena would refuse is said before it is sent
    if not role and aim is None:
        yield file
        return
    chosen: Any = find_policy(policy, None)
    with TemporaryDirectory() as folder:
        copy = Path(folder) / file.name
        chosen.save(copy)
        yield copy


def status(
    submission: tyro.conf.Positional[str | None] = None,
    *,
    compare: str | None = None,
    benchmark: str | None = None,
    split: str | None = None,
    url: str = URL,
) -> Report:
    """How far a submission is, how two compare, or the leaderboard of a benchmark.

    Args:
        submission: its id.
        compare: another id on the same split: shows the paired difference.
        benchmark: shows its leaderboard instead; with neither, all benchmarks are listed.
        split: of the benchmark; the first by default.
        url: address of the arena.

    Examples:
        offbook arena status 7
        offbook arena status 7 --compare 4
        offbook arena status --benchmark pour --split position
    """
    with ArenaClient(url) as arena:
        if submission is not None and compare is not None:
            pair = arena.request("GET", "/v1/compare", params={"a": submission, "b": compare})
            return Report(text=_pair_text(pair), data=pair)
        if submission is not None:
            entry = arena.status(submission)
            return Report(text=_entry_text(entry, url), data=entry)
        if benchmark is not None:
            board = arena.leaderboard(benchmark, split)
            return Report(text=_board_text(board), data=board)
        found = arena.benchmarks()
    rows = [[each["name"], ", ".join(each["splits"]), each["entries"], each["trials_done"]] for each in found]
    return Report(text=table(["benchmark", "splits", "entries", "trials"], rows), data={"benchmarks": found})


def _show_upload(sent: int, total: int) -> None:
    print(f"\r\033[Kuploaded {sent / total:.0%}", end="\n" if sent == total else "", file=sys.stderr, flush=True)


def _show_progress(entry: Mapping[str, Any]) -> None:
    print(f"\r\033[K{entry['state_words']}", end="", file=sys.stderr, flush=True)


def _standing(row: Mapping[str, Any]) -> str:
    if row["revoked"] is not None:
        return "withdrawn"
    return "for good" if row["expires"] is None else "until it expires"


def _entry_text(entry: Mapping[str, Any], url: str) -> str:
    lines = [
        f"submission {entry['id']}: {entry['name']} on {entry['benchmark']['name']}, {entry['split']}",
        entry["state_words"],
    ]
    if entry["score"]:
        lines.append(f"score {interval_text(entry['score'])} over {entry['n']} of {entry['wanted']} trials")
    if entry["success"]:
        lines.append(f"success {interval_text(entry['success'])}")
    kept = kept_promise(entry)
    if kept is not None:
        word = "" if kept else "NOT "
        lines.append(f"the order that was drawn is {word}the one that was promised: {entry['commitment']}")
    lines += [f"trial {trial['slot']}: {trial['fault']}" for trial in entry["trials"] if trial["fault"]][:10]
    lines.append(f"{url}/submissions/{entry['id']}")
    if entry["kind"] == "remote" and entry["state"] == "open" and not entry["connected"]:
        lines.append(f"connect it: {entry['command']}")
    return "\n".join(lines)


def _board_text(board: Mapping[str, Any]) -> str:
    rows = [
        [
            "anchor" if row["anchor"] else f"{row['rank'][0]}-{row['rank'][1]}" if row["rank"] else "-",
            row["submission"],
            row["name"],
            row["owner"],
            interval_text(row["score"]),
            interval_text(row["success"]),
            f"{row['n']} of {row['wanted']}",
        ]
        for row in board["rows"]
    ]
    head = ["rank", "id", "entry", "owner", f"score ({board['benchmark']['metric']})", "success", "trials"]
    return f"{board['benchmark']['title']}, {board['split']}, 95% intervals\n\n{table(head, rows)}"


def _pair_text(pair: Mapping[str, Any]) -> str:
    p = "" if pair["mcnemar_p"] is None else f", successes by the exact McNemar test p = {pair['mcnemar_p']:.3g}"
    return (
        f"{pair['a']['name']} minus {pair['b']['name']} on {pair['benchmark']['name']}, {pair['split']}: "
        f"{interval_text(pair['difference'])} over {pair['pairs']} pairs{p}"
    )
