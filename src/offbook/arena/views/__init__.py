"""What people see, as plain dicts: the pages draw them, the HTTP interface sends them, few queries make them.

Times are seconds since 1970; an interval is `{value, low, high}`, its ends null where a sample says nothing of them.
"""

from offbook.arena.views.boards import compare, index, leaderboard
from offbook.arena.views.entries import run, submission
from offbook.arena.views.robots import queue, robot, submit

__all__ = ["compare", "index", "leaderboard", "queue", "robot", "run", "submission", "submit"]
