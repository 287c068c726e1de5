"""Turns the recorded results into tables of ratios and into plots.

python -m bench.report                      every device's tables, and a plot beside each results file
python -m bench.report --device NAME        one device's
python -m bench.report --readme FILE        writes a summary between the markers of a Markdown file
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


@dataclass(frozen=True)
class Row:
    """One shape, dtype and direction: the median of each implementation, in seconds or bytes."""

    shape: str
    dtype: str
    direction: str
    medians: dict[str, float]
    unit: str = "seconds"
    flops: int | None = None

    def ratio(self, implementation: str) -> float:
        """How many times as fast (or as small) as the best PyTorch entry an implementation is."""
        return min(v for k, v in self.medians.items() if k.startswith("torch")) / self.medians[implementation]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="a folder of bench/results")
    parser.add_argument("--readme", type=Path, help="a Markdown file with the markers")
    options = parser.parse_args(arguments)
    recorded = devices()
    if options.device and options.device not in recorded:
        wanted = f"one of {', '.join(recorded)}" if recorded else "nothing, as no results are recorded yet"
        print(f"--device: expected {wanted}, got {options.device!r}", file=sys.stderr)
        return 2
    results = {device: read(device) for device in ([options.device] if options.device else recorded)}
    if options.readme:
        return update(options.readme, summary(results))
    if not results:
        print(f"There are no results under {RESULTS.parent.name}/{RESULTS.name} yet: `make bench` records them.")
    for device, families in results.items():
        peaks = peaks_of(families.get("machine", []))
        for family, rows in families.items():
            what = "megabytes (how many times less than PyTorch)"
            if rows[0].unit == "seconds":
                what = "median milliseconds (times as fast as PyTorch, share of the machine's peak)"
            print(f"\n{family} on {device}: {what}\n")
            print(table(rows, peaks))
            if rows[0].unit == "seconds":
                plot(RESULTS / device / f"{family}.svg", f"{family}, {device}", rows)
    return 0


def devices() -> list[str]:
    """The devices that results were recorded on; none where there is no folder of results."""
    return sorted(path.name for path in RESULTS.iterdir() if path.is_dir()) if RESULTS.is_dir() else []


def read(device: str) -> dict[str, list[Row]]:
    """A device's results: family -> rows, in the order in which they were measured."""
    families = {}
    for path in sorted((RESULTS / device).glob("*.json")):
        rows: dict[tuple[str, str, str], Row] = {}
        for entry in json.loads(path.read_text())["entries"]:
            key = (entry["shape"], entry["dtype"], entry["direction"])
            row = rows.setdefault(key, Row(*key, {}, entry.get("unit", "seconds"), entry.get("flops")))
            row.medians[entry["implementation"]] = statistics.median(entry["samples"])
        families[path.stem] = list(rows.values())
    return families


def peaks_of(rows: list[Row]) -> dict[str, float]:
    """The most floating-point operations a second that the machine was seen to do, by dtype."""
    peaks: dict[str, float] = {}
    for row in rows:
        if row.flops:
            peaks[row.dtype] = max(peaks.get(row.dtype, 0.0), row.flops / min(row.medians.values()))
    return peaks


def ours(rows: list[Row]) -> list[str]:
    """The names of our implementations in `rows`, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.medians if name.startswith("lmengine")))


def has_peer(row: Row) -> bool:
    return any(name.startswith("torch") for name in row.medians)


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def cell(row: Row, name: str, peaks: dict[str, float]) -> str:
    """A median, in milliseconds or megabytes, with the ratio of ours to PyTorch's and the share of the peak."""
    if name not in row.medians:
        return ""
    text = f"{row.medians[name] / 1e6:.1f}" if row.unit == "bytes" else f"{row.medians[name] * 1000:.3f}"
    notes = [f"{row.ratio(name):.2f}"] if name.startswith("lmengine") and has_peer(row) else []
    if row.flops and row.dtype in peaks:
        notes.append(f"{row.flops / row.medians[name] / peaks[row.dtype]:.0%}")
    return f"{text} ({', '.join(notes)})" if notes else text


def table(rows: list[Row], peaks: dict[str, float] | None = None) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row.medians))
    lines = [["shape", "dtype", "direction", *names]]
    for row in rows:
        cells = [cell(row, name, peaks or {}) for name in names]
        lines.append([row.shape, row.dtype, row.direction, *cells])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    for name in ours(rows):
        ratios = [row.ratio(name) for row in rows if name in row.medians and has_peer(row)]
        if ratios:
            what = "less memory than PyTorch" if rows[0].unit == "bytes" else "PyTorch's speed"
            text.append(f"{name}: {geometric_mean(ratios):.2f} times {what} (geometric mean of {len(ratios)}, ")
            text[-1] += f"worst {min(ratios):.2f}, best {max(ratios):.2f})"
    return "\n".join(text)


def summary(results: dict[str, dict[str, list[Row]]]) -> str:
    """A Markdown table: for each device, family, dtype and direction our speed as a multiple of PyTorch's."""
    lines = [
        "| device | family | backend | dtype | direction | times PyTorch's speed (geometric mean) | worst | cells |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for device, families in results.items():
        for family, rows in families.items():
            for name in ours(rows) if rows[0].unit == "seconds" and family != "machine" else []:
                for dtype, direction in dict.fromkeys((row.dtype, row.direction) for row in rows):
                    chosen = [r for r in rows if (r.dtype, r.direction) == (dtype, direction) and name in r.medians]
                    ratios = [row.ratio(name) for row in chosen if has_peer(row)]
                    if ratios:
                        backend = name.removeprefix("lmengine ")
                        lines.append(
                            f"| {device} | {family} | {backend} | {dtype} | {direction} "
                            f"| {geometric_mean(ratios):.2f} | {min(ratios):.2f} | {len(ratios)} |"
                        )
    return "\n".join(lines)


def update(path: Path, text: str) -> int:
    content = path.read_text(encoding="utf-8")
    if BEGIN not in content or END not in content:
        print(f"--readme: {path} lacks the markers {BEGIN} and {END}", file=sys.stderr)
        return 2
    head, rest = content.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    path.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}", encoding="utf-8")
    return 0


def plot(path: Path, title: str, rows: list[Row]) -> None:
    """A bar for each cell: how many times as fast as PyTorch."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "lmengine"  # the same picture for the same numbers
    import matplotlib.pyplot as plt

    bars: list[tuple[str, float, Any]] = []
    for index, name in enumerate(ours(rows)):
        for row in rows:
            if name in row.medians and has_peer(row):
                label = f"{row.shape} {row.dtype} {row.direction}"
                label += f" [{name.removeprefix('lmengine ')}]" if len(ours(rows)) > 1 else ""
                bars.append((label, row.ratio(name), f"C{index}"))
    if not bars:
        return
    figure, axes = plt.subplots(figsize=(9, 0.6 + 0.22 * len(bars)), layout="constrained")
    positions = range(len(bars))
    axes.barh(list(positions), [bar[1] for bar in bars], color=[bar[2] for bar in bars])
    axes.set_yticks(list(positions), [bar[0] for bar in bars], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("times as fast as PyTorch")
    axes.set_title(title)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
