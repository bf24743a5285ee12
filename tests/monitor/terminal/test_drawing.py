"""Drawings say what the numbers say, with colour and without."""

import math
from itertools import pairwise

import numpy as np
import pytest

from monitor.terminal.drawing import Line, along, head_map, plot, sparkline


def shown(rows):
    return [row.plain for row in rows]


def colours(row):
    return [str(span.style) for span in row.spans if "rgb" in str(span.style)]


def test_a_sparkline_of_nothing_is_empty_and_gaps_stay_gaps():
    assert sparkline([], 8) == sparkline([math.nan], 8) == ""
    assert sparkline([1, 1], 8) == "▁▁"
    assert sparkline([0, math.nan, 1], 8) == "▁ █"
    assert len(sparkline(list(range(1_000)), 20)) == 20


def test_along_an_axis_dense_measurements_take_no_more_room():
    line = Line(name="", x=[0, 1, 2, 3, 100], y=[0.0, 0, 0, 5, 9])
    assert along(line, 11) == [0.0, *[5.0] * 9, 9.0]
    assert along(Line(name="", x=[], y=[]), 5) == []
    assert along(Line(name="", x=[3], y=[1.0]), 5) == [1.0]


def test_a_curve_lies_where_its_values_do_and_the_null_is_dotted():
    rising = Line(name="1.0", x=[0, 10], y=[0.0, 1.0])
    null = Line(name="null", x=[0, 10], y=[0.5, 0.5])
    rows, ends = plot([rising], null, width=40, height=5)
    assert ends == (0, 10)
    text = shown(rows)
    assert len(text) == 5
    assert all(len(row) <= 40 for row in text)
    assert text[0].startswith("1.00 ")
    assert text[0].endswith(" 1.0")
    assert text[4].startswith("0.00 ")
    assert text[2].endswith(" null")
    assert "┈" in text[2]
    assert not any("┈" in row for row in (*text[:2], *text[3:]))
    at = [[i for i, c in enumerate(row[5:]) if 0x2800 < ord(c) < 0x2900] for row in text]
    assert all(min(lower) < min(upper) for upper, lower in pairwise(at))


def test_noise_does_not_fill_the_plot():
    noise = Line(name="a", x=[0, 1, 2], y=[0.020, 0.021, 0.020])
    text = shown(plot([noise], None, width=40, height=6, span=0.1)[0])
    assert text[0].startswith("0.12 ")
    assert not any(0x2800 < ord(c) < 0x2900 for row in text[:5] for c in row)


def test_a_step_has_no_gap():
    jump = Line(name="a", x=[0, 1, 1.0001, 2], y=[0.0, 0, 1, 1])
    text = shown(plot([jump], None, width=40, height=6)[0])
    assert all(any(0x2800 < ord(c) < 0x2900 for c in row) for row in text)


@pytest.mark.parametrize("y", [[], [math.nan]])
def test_nothing_to_draw_is_nothing(y):
    line = Line(name="a", x=list(range(len(y))), y=y)
    assert plot([line], line, width=40, height=5) == ([], None)


def test_a_single_measurement_is_a_single_mark():
    text = shown(plot([Line(name="a", x=[3], y=[0.5])], None, width=40, height=5)[0])
    assert sum(0x2800 < ord(c) < 0x2900 for row in text for c in row) == 1


def test_a_small_map_has_a_number_for_each_head():
    values = np.array([[0.02, 0.58, math.nan], [0.3, 0.999, 1.0]])
    for colour in (True, False):
        rows = head_map(values, 0.02, width=30, height=10, colour=colour)
        assert shown(rows) == ["0  . 5 ?", "1  3 9 +"]
    assert not any(colours(row) for row in rows)


def test_half_blocks_hold_two_layers_and_shades_one():
    values = np.zeros((12, 12))
    values[3, 7] = 1.0
    rows = head_map(values, 0.0, width=30, height=10, colour=True)
    assert shown(rows)[1] == " 2 " + "▀" * 12
    assert [i for i, style in enumerate(colours(rows[1])) if "253,231,37" in style] == [7]
    assert colours(rows[1])[7].split(" on ")[1] == "rgb(253,231,37)"
    rows = shown(head_map(values, 0.0, width=30, height=12, colour=False)[:12])
    assert rows[3] == " 3  . . . . . . . + . . . ."
    rows = shown(head_map(values, 0.0, width=20, height=12, colour=False))
    assert rows[3] == " 3 " + " " * 7 + "█" + " " * 4


@pytest.mark.parametrize("colour", [True, False])
def test_of_a_map_that_is_too_large_the_highest_neighbours_are_shown_and_that_is_said(colour):
    values = np.full((40, 50), 0.1)
    values[39, 49] = 1.0
    values[0, :] = math.nan
    rows = head_map(values, 0.0, width=30, height=10, colour=colour)
    assert len(rows) == 10
    said = "(the highest of 2 × 2)" if colour else "(the highest of 4 × 2)"
    assert said in rows[-1].plain
    brightest = colours(rows[-1])[-1] if colour else rows[-1].plain.split(" (")[0][-1]
    assert brightest.endswith("rgb(253,231,37)" if colour else "█")
