"""Pictures for a report: SVG to put into a page, with text as text and with the page's own colours and fonts.

matplotlib draws in colours that stand for names; `_inline` puts the page's CSS variables in their place, so that one
picture suits a light and a dark page.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lmengine.tasks.page import printable, text
from lmengine.tasks.word_map import place_labels, tsne

# what is drawn in these colours comes out in the page's
COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--soft)",
    "#030303": "var(--line)",
    "#040404": "var(--first)",
    "#050505": "var(--second)",
}
INK, SOFT, LINE, FIRST, SECOND = COLOURS


@dataclass(frozen=True)
class Curve:
    """One line of a chart: its name in the legend, and its (x, y) points."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """Lines over a common x: the last is drawn strongly, those before it faintly."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]


def line_chart(chart: Chart) -> str:
    """The chart without its title as an `<svg>` element."""
    figure, axes = _figure(4.6, 2.9, layout="constrained")
    curves = [curve for curve in chart.curves if curve.points]
    for index, curve in enumerate(curves):
        last = index == len(curves) - 1
        few = len(curve.points) <= 25
        axes.plot(
            [x for x, _ in curve.points],
            [y for _, y in curve.points],
            color=FIRST if last else SECOND,
            linewidth=2 if last else 1.4,
            marker="o" if few else None,
            markersize=4,
            label=printable(curve.name),
        )
    axes.set_xlabel(printable(chart.x_label), parse_math=False)
    axes.set_ylabel(printable(chart.y_label), parse_math=False)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(curves) > 1:
        legend = axes.legend(frameon=False, labelcolor=INK, fontsize=10, loc="upper right")
        for text in legend.get_texts():
            text.set_parse_math(False)
    return _inline(figure, f"{chart.title}: {chart.y_label} by {chart.x_label}")


def word_map(words: Sequence[str], vectors: Tensor) -> str:
    """A map of word vectors, (words, dim), as an `<svg>` element: words of near vectors stand near each other."""
    width, height, size = 720, 560, 10
    middles = place_labels(tsne(vectors), words, width, height, size)
    figure, axes = _figure(width / 72, height / 72)
    axes.set_position((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, width), ylim=(0, height))
    for (x, y), word in zip(middles.tolist(), words, strict=True):
        axes.text(x, y, word, fontsize=size, color=INK, ha="center", va="center", parse_math=False)
    return _inline(figure, f"map of {len(words)} words")


def _figure(width: float, height: float, layout: Any = None) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout)
    axes = figure.add_subplot()
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(LINE)
    axes.tick_params(colors=SOFT, labelsize=10)
    axes.xaxis.label.set(color=SOFT, fontsize=10)
    axes.yaxis.label.set(color=SOFT, fontsize=10)
    return figure, axes


def _inline(figure: Any, title: str) -> str:
    import matplotlib

    file = io.StringIO()
    # the same picture for the same numbers; text stays text, in the page's fonts
    settings: dict[Any, Any] = {"svg.hashsalt": "lmengine", "svg.fonttype": "none", "font.family": "sans-serif"}
    nothing: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # its fonts measure the text, the browser's draw it
        figure.savefig(file, format="svg", metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, variable in COLOURS.items():
        svg = svg.replace(colour, variable)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    opening = re.match(r"<svg[^>]*viewBox=\"([^\"]*)\"[^>]*>", svg)
    assert opening is not None
    label = text(title)
    return (
        f'<svg viewBox="{opening[1]}" role="img" aria-label="{label}" xmlns:xlink="http://www.w3.org/1999/xlink">'
        + (svg[opening.end() :].strip())
    )
