"""Charts: where the marks stand, what they say to listeners, and the same drawing as a file."""

import math
import re
import xml.etree.ElementTree as ET

from hypothesis import given, settings
from hypothesis import strategies as st
from page_views import ANCHORS, trials

from offbook.service.pages import charts


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6), st.booleans())
def test_an_axis_holds_all_values_between_its_evenly_spaced_ticks(values, zero):
    axis = charts.axis_for(values, zero=zero)
    slack = 1e-6 * (axis.high - axis.low)
    assert axis.low - slack <= min(values) <= max(values) <= axis.high + slack
    assert axis.ticks[0] == axis.low
    assert axis.ticks[-1] == axis.high
    assert 2 <= len(axis.ticks) <= 9
    assert len({axis.label(tick) for tick in axis.ticks}) == len(axis.ticks)
    if zero:
        assert axis.low == -axis.high


def test_fractions_share_the_axis_from_0_to_1():
    assert charts.axis_for([0.4, None, math.nan]).ticks == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert [charts.axis_for([]).label(tick) for tick in (0.0, 0.25)] == ["0.00", "0.25"]


def test_an_interval_row_puts_its_dot_and_ends_where_the_values_are():
    axis = charts.axis_for([-1500, 0])
    row = ET.fromstring(charts.interval_row({"value": -750, "low": -1200, "high": -300}, axis, ANCHORS[:1]))
    bar = row.find("line[@class='i']")
    assert (bar.get("x1"), bar.get("x2")) == ("20%", "80%")
    assert row.find("circle").get("cx") == "50%"
    assert "interval" in row.get("aria-label")
    assert charts.interval_row(None, axis).count("<circle") == 0
    without_ends = ET.fromstring(charts.interval_row({"value": -750, "low": None, "high": None}, axis))
    assert without_ends.find("circle").get("cx") == "50%"


def test_names_of_anchors_that_would_touch_step_apart():
    axis = charts.axis_for([0, 1])
    sides = re.findall(
        r'class="an( \w+)?"',
        charts.interval_axis(axis, [{"name": n, "value": v} for n, v in [("a", 0.5), ("b", 0.55), ("c", 0.97)]]),
    )
    assert sides == [" end", " start", ""]


def test_a_strip_has_one_cell_a_trial_and_says_how_many_of_each():
    rows = trials(0.6, n=40, done=27)
    strip = ET.fromstring(charts.trial_strip(rows))
    cells = 0
    for path in strip.iter("path"):
        runs = re.findall(r"M[\d.]+ [\d.]+(?:h(\d+))?", path.get("d"))
        cells += sum(round((int(length or 7) + 2) / 9) or 1 for length in runs)
    assert cells == 40
    assert strip.get("aria-label").startswith("40 trials: ")
    assert "12 queued" in strip.get("aria-label")
    assert ET.fromstring(charts.trial_strip([])).get("aria-label") == "0 trials: none yet"
    _, _, width, height = (float(x) for x in ET.fromstring(charts.trial_strip(rows * 5)).get("viewBox").split())
    assert width / height > 8  # 200 trials stay three lines


def test_a_trace_keeps_peaks_breaks_at_gaps_and_flags_late_steps():
    n = 20_000
    values = [0.0] * n
    values[7777] = 50.0
    late = [i in (5, 6) for i in range(n)]
    drawn = charts.trace([i / 30 for i in range(n)], values, label="latency", unit="ms", budget=33.3, late=late)
    assert len(drawn) < 20_000
    assert drawn.count('class="late"') == 2
    assert "at most 50" in drawn
    path = re.search(r'class="t" d="([^"]*)"', drawn).group(1)
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.-]+)", path)]
    assert max(heights) - min(heights) > 80
    gap = charts.trace([0.0, 0.1, 0.2, 0.3], [1.0, None, math.nan, 2.0], label="x")
    assert re.search(r'class="t" d="([^"]*)"', gap).group(1).count("M") == 2
    assert "nothing was recorded" in charts.trace([], [], label="x")
