"""How long a user waits for `offbook --help` and for the imports that a robot computer needs.

Whole processes are timed by turns with a bare interpreter; the interpreter's own start is the bound below which nothing
can come. Run it with compiled bytecode: the warm-up round sees to that.
"""

import subprocess
import sys

from offbook.runs.benchmark import Options, median_metric, timed
from offbook.runs.ledger import Claim

# Seconds: the whole process for the help, beyond a bare interpreter for the imports.
LIMITS = {"offbook --help": 0.4, "import offbook": 0.15, "import offbook.client": 0.15}
CODE = {
    "bare interpreter": "pass",
    "offbook --help": "import sys; from offbook.cli.main import main; sys.exit(main(['--help']))",
    "import offbook": "import offbook",
    "import offbook.client": "import offbook.client",
}


def _start(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def run(options: Options) -> list[Claim]:
    """Times each command and holds it against its limit."""
    sides = {name: (lambda code=code: _start(code)) for name, code in CODE.items()}
    seconds = timed(sides, options.repeats)
    bare = seconds["bare interpreter"]
    claims = []
    for name, limit in LIMITS.items():
        whole = name == "offbook --help"
        cost = seconds[name] if whole else [mine - base for mine, base in zip(seconds[name], bare, strict=True)]
        metric = median_metric(f"{name}, {'whole process' if whole else 'beyond bare'}", cost, unit="s")
        ratio = median_metric(f"{name}, ratio to bare", [m / b for m, b in zip(seconds[name], bare, strict=True)])
        claims.append(
            Claim(
                system="import_time",
                claim=f"{name} takes at most {limit:g} s" + ("" if whole else " beyond a bare interpreter"),
                metrics=(metric, ratio),
                baseline_metrics=(median_metric("bare interpreter", bare, unit="s"),),
                seeds=(options.seed,),
                verdict="met" if metric.value <= limit else "missed",
            )
        )
    return claims
