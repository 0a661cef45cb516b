"""The long tests: do all hold, and within half an hour on two cores?

2,000 histories of the arena's states and 150 hostile requests of each operation, on either database; 200 trials while
workers are killed; an arena full of users; workers on several machines; rating studies under fire; and others that take
minutes. They run as those of `make test` do, in a process of their own, two at a time.
"""

import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

from offbook.errors import OffbookError
from offbook.runs.benchmark import Options
from offbook.runs.ledger import Claim, Metric

WORDS = ["-m", "slow", "-n", "2", "--dist", "worksteal", "-v"]
MINUTES = 30.0


def run(options: Options) -> list[Claim]:
    """Runs them once; their seeds are their own."""
    with tempfile.TemporaryDirectory(prefix="offbook-soak-") as folder:
        told = Path(folder) / "told.xml"
        command = [sys.executable, "-m", "pytest", *WORDS, f"--junitxml={told}"]
        subprocess.run(command, stdout=sys.stderr, check=False, env={"OMP_NUM_THREADS": "1", **os.environ})
        if not told.exists():
            raise OffbookError("pytest", expected="a report of the tests", got="none", fix="see what it says above")
        suite = next(ElementTree.parse(told).iter("testsuite"))
    ran, skipped = (int(suite.get(of, 0)) for of in ("tests", "skipped"))
    broken = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    minutes = float(suite.get("time", 0)) / 60
    times: dict[str, float] = defaultdict(float)
    for case in suite.iter("testcase"):
        times[case.get("classname", "").rpartition(".")[2]] += float(case.get("time", 0)) / 60
    missing = [f"{case.get('name')} ({each.get('message')})" for case in suite.iter("testcase")
               for each in case.iter("skipped")]  # fmt: skip
    longest = sorted(times.items(), key=lambda pair: -pair[1])[:8]
    return [
        Claim(
            system="soak",
            claim=f"the long tests pass, in {MINUTES:g} minutes or less on two cores",
            metrics=(
                Metric(name="passed", value=ran - skipped - broken, higher_is_better=True),
                Metric(name="failed", value=broken, higher_is_better=False),
                Metric(name="skipped", value=skipped),
                Metric(name="time", value=minutes, unit="min", higher_is_better=False),
            ),
            seeds=(options.seed,),
            verdict="met" if ran > skipped and not broken and minutes <= MINUTES else "missed",
            note=f"Minutes of the longest, two at a time: {', '.join(f'{name} {of:.1f}' for name, of in longest)}. "
            f"Skipped: {', '.join(missing) or 'none'}",
        )
    ]
