"""Curves as SVG that takes its colours from the page: for light and dark, and told apart without colours too."""

import io
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

WIDTH, HEIGHT = 4.2, 2.5  # inches
INK, GRID = "#010101", "#020202"  # what stands for colours of the page until they are put in
# Told apart by dashes and markers too, for print and for eyes that see fewer colours.
LINES = ("#030301", "#030302", "#030303", "#030304", "#030305", "#030306")
DASHES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P")
COLOURS = {INK: "var(--ink)", GRID: "var(--line)", **{line: f"var(--curve-{n})" for n, line in enumerate(LINES)}}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "clipmini",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.parse_math": False,
}
# Left out: what is no part of a page, what would be said of all of it, and the size, which is the page's.
LEFT_OUT = re.compile(
    r'^.*?(?=<svg )|<metadata>.*?</metadata>|<style.*?</style>| (?:width|height)="[\d.]+pt"', re.DOTALL
)
IDENTIFIER = re.compile(r'(\bid="|href="#|url\(#)')
MAX_POINTS = 600  # of a curve: more cannot be seen, and make pages large


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        label: of the run, where there are several.
    """

    label: str
    steps: Sequence[int]
    values: Sequence[float]


def draw(title: str, lines: Sequence[Line], *, is_logarithmic: bool = False, is_share: bool = False) -> str:
    """Draw curves over the steps: an `<svg>` for inside a page.

    Args:
        is_share: values are written in per cent.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        for number, line in enumerate(lines):
            plot(axes, line, number, is_alone=len(lines) == 1, scale=100 if is_share else 1)
        if is_logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        style(axes, f"{title}, %" if is_share else title)
        if len(lines) > 1:
            labels = [line.label for line in lines]  # given, as one that begins with _ would be left out
            axes.legend(axes.lines, labels, frameon=False, labelcolor=INK, handlelength=3.5, fontsize=8)
        content = io.StringIO()
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return adapt(content.getvalue(), describe(title, lines, is_share))


def plot(axes: Axes, line: Line, number: int, *, is_alone: bool, scale: float) -> None:
    """Add a curve, thinned out if it has more points than can be seen."""
    shown = thin(line.values)
    steps, values = [line.steps[number] for number in shown], [scale * line.values[number] for number in shown]
    look = number % len(LINES)
    marked: dict[str, Any] = (
        {} if is_alone and len(steps) > 1 else {"marker": MARKERS[look], "markevery": max(1, len(steps) // 6)}
    )
    axes.plot(
        steps,
        values,
        color=LINES[look],
        linestyle=DASHES[look],
        linewidth=1.6,
        markersize=4,
        **marked,
    )


def thin(values: Sequence[float]) -> list[int]:
    """Return the numbers of at most MAX_POINTS values: the first, lowest, highest and last one of each group."""
    size = 1 if len(values) <= MAX_POINTS else -(-len(values) // (MAX_POINTS // 4))
    shown: list[int] = []
    for start in range(0, len(values), size):
        group = range(start, min(start + size, len(values)))
        lowest, highest = (choose(group, key=values.__getitem__) for choose in (min, max))
        shown += sorted({group[0], lowest, highest, group[-1]})
    return shown


def style(axes: Axes, title: str) -> None:
    """Draw little but the curves."""
    axes.set_title(title, loc="left", color=INK, fontsize=10)
    axes.set_xlabel("step", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.tick_params(which="both", color=GRID, labelcolor=INK, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def describe(title: str, lines: Sequence[Line], is_share: bool) -> str:
    """Say what a chart shows, for those who do not see it."""

    def tell(value: float) -> str:
        return f"{value:.1%}" if is_share else f"{value:.4g}"

    told = [
        f"{line.label + ': ' if len(lines) > 1 else ''}{tell(line.values[0])} at step {line.steps[0]}, "
        f"{tell(line.values[-1])} at step {line.steps[-1]}"
        for line in lines
    ]
    return f"{title}. {'; '.join(told)}"


def adapt(svg: str, description: str) -> str:
    """Make a picture of the page: its colours, names that no other picture has, and a description."""
    prefix = f"chart{zlib.crc32(svg.encode()):08x}-"
    svg = IDENTIFIER.sub(lambda found: found[1] + prefix, LEFT_OUT.sub("", svg))
    for colour, name in COLOURS.items():
        svg = svg.replace(colour, name)
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
