"""The look of the figures: colours that everyone can see on both grounds, bands that are the percentiles they say."""

from itertools import combinations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from nnlib import figures

GROUNDS = {"white": "#ffffff", "dark": "#14181e"}


@pytest.fixture(autouse=True)
def own_style():
    """Draw without a screen, with the book's style, and leave Matplotlib as it was."""
    plt.switch_backend("agg")
    with mpl.rc_context():
        figures.use_style()
        yield
    plt.close("all")


def linear(color):
    """A colour in linear RGB."""
    return np.array(
        [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    )


def contrast(one, other):
    """The contrast ratio of two colours as WCAG 2 defines it."""
    dark, light = sorted(np.dot([0.2126, 0.7152, 0.0722], linear(color)) for color in (one, other))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_measured_as_wcag_does():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)


@pytest.mark.parametrize("ground", GROUNDS)
@pytest.mark.parametrize("color", [*figures.PALETTE, "INK"])
def test_every_colour_stands_out_from_both_grounds(color, ground):
    assert contrast(figures.PALETTE.get(color, figures.INK), GROUNDS[ground]) >= 3.0


# How dichromats see linear RGB: Machado, Oliveira and Fernandes (2009), severity 1.
SIGHT = {
    "normal": np.eye(3),
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
}


def lab(color, sight):
    """The colour as somebody with this sight sees it, in CIELAB (white D65)."""
    seen = np.clip(np.array(SIGHT[sight]) @ linear(color), 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(
        np.array(to_xyz) @ seen / [0.9505, 1.0, 1.089]
    )  # exact for all but nearly black colours
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("sight", SIGHT)
def test_no_two_colours_look_alike_to_anybody(sight):
    seen = {name: lab(color, sight) for name, color in figures.PALETTE.items()}
    distance = {
        pair: np.linalg.norm(seen[pair[0]] - seen[pair[1]]) for pair in combinations(seen, 2)
    }
    assert min(distance.values()) > 20, min(
        distance, key=distance.get
    )  # 2.3 is just noticeable side by side


def test_lines_take_the_palette_in_turn_and_grounds_are_transparent():
    _, ax = figures.panels()
    drawn = [ax.plot([0, 1])[0].get_color() for _ in figures.PALETTE]
    assert drawn == list(figures.PALETTE.values())
    assert ax.get_facecolor()[3] == 0 and ax.figure.get_facecolor()[3] == 0


@pytest.mark.parametrize("columns, rows, shape", [(1, 1, None), (3, 1, (3,)), (2, 2, (2, 2))])
def test_panels_are_one_axes_or_an_array_of_them(columns, rows, shape):
    figure, axes = figures.panels(columns, rows)
    assert getattr(axes, "shape", None) == shape
    assert figure.get_size_inches()[1] == pytest.approx(figures.HEIGHT * rows)


def test_a_band_is_the_median_between_two_percentiles():
    _, ax = figures.panels()
    runs = np.arange(101.0)[:, None] * np.array([1.0, 2.0])  # percentile p of column c is p * c
    figures.band(ax, [5, 6], runs, label="method", color=figures.PALETTE["blue"], percent=(10, 75))
    (line,), (area,) = ax.lines, ax.collections
    assert line.get_label() == "method" and list(line.get_ydata()) == [50, 100]
    corners = {tuple(map(float, point)) for point in area.get_paths()[0].vertices}
    assert corners == {(5, 10), (5, 75), (6, 20), (6, 150)}


@pytest.mark.parametrize("runs", [np.zeros(3), np.zeros((3, 4)), np.zeros((2, 3, 1))])
def test_runs_that_do_not_fit_the_points_are_refused(runs):
    _, ax = figures.panels()
    with pytest.raises(ValueError, match=r"runs must have shape \(runs, 3\), got \("):
        figures.band(ax, [1, 2, 3], runs, label="", color="#000000")


def test_theory_is_dashed_and_above_the_data():
    _, ax = figures.panels()
    (data,) = ax.plot([0, 1], [0, 1])
    figures.theory(ax, [0, 1], [1, 1])
    line = ax.lines[-1]
    assert (
        line.get_linestyle() == "--"
        and line.get_label() == "theory"
        and line.get_zorder() > data.get_zorder()
    )
