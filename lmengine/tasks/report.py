"""A run's report: one HTML file that needs nothing else, for light and dark screens, phones and paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lmengine.files import written_aside
from lmengine.tasks.charts import Chart, line_chart, word_map
from lmengine.tasks.page import STYLE, printable, text
from lmengine.tasks.speed import KernelSpeed


@dataclass(frozen=True)
class Headline:
    """A number that the run is about, and what to hold it against: "Perplexity, LSTM", "61.3", "unigram model: 402"."""

    name: str
    value: str
    beside: str = ""


@dataclass(frozen=True)
class Sample:
    """Text that a model generated; `text` goes on from `prompt`, and may begin with it."""

    model: str
    prompt: str
    text: str


@dataclass(frozen=True)
class Classification:
    """A classifier's results on held-out texts: confusion[i][j] texts of label i were said to be of label j."""

    labels: Sequence[str]
    confusion: Sequence[Sequence[int]]
    about: str = ""

    def __post_init__(self) -> None:
        size = len(self.labels)
        if len(self.confusion) != size or any(len(row) != size for row in self.confusion):
            raise ValueError(f"confusion: expected {size} rows of {size} numbers, one for each of labels")


@dataclass(frozen=True)
class WordVectors:
    """Words, the most frequent ones first, and their vectors (words, dim)."""

    words: Sequence[str]
    vectors: Tensor

    def __post_init__(self) -> None:
        if self.vectors.dim() != 2 or len(self.words) != len(self.vectors):
            raise ValueError(f"vectors: expected shape ({len(self.words)}, dim), got {tuple(self.vectors.shape)}")


@dataclass(frozen=True)
class Report:
    """What a report shows; a part that is empty is left out.

    Attributes:
        title, about: the heading, and a line below it.
        facts: pairs of a name and a value: corpus, tokens, vocabulary, seed, backend, machine, versions.
        stages: pairs of a stage's name and its seconds.
        neighbours: pairs of a word and its nearest words, each with its similarity.
        word_map: the words of the map, about 150 of them.
    """

    title: str
    about: str = ""
    facts: Sequence[tuple[str, str]] = ()
    stages: Sequence[tuple[str, float]] = ()
    headlines: Sequence[Headline] = ()
    charts: Sequence[Chart] = ()
    neighbours: Sequence[tuple[str, Sequence[tuple[str, float]]]] = ()
    word_map: WordVectors | None = None
    classification: Classification | None = None
    samples: Sequence[Sample] = ()
    kernels: Sequence[KernelSpeed] = ()


def write_report(folder: Path, contents: Report) -> Path:
    """Write `folder`/report.html, and return its path."""
    path = Path(folder) / "report.html"
    page = render(contents)
    with written_aside(path) as aside:
        aside.write_text(page, encoding="utf-8")
    return path


def render(report: Report) -> str:
    """The page as text."""
    parts = [
        _section("Results", _headlines(report.headlines)),
        _section("Training", _charts(report.charts)),
        _section("Nearest neighbours", _neighbours(report.neighbours)),
        _section("Map of the words", _map(report.word_map)),
        _section("Classifier", _classification(report.classification)),
        _section("Generated text", _samples(report.samples)),
        _section("Kernels beside PyTorch", _kernels(report.kernels)),
        _section("Time", _stages(report.stages)),
    ]
    body = "\n".join(part for part in parts if part)
    about = f"<p class=about>{text(report.about)}</p>" if report.about else ""
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{text(report.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{text(report.title)}</h1>{about}{_facts(report.facts)}</header>\n"
        f"<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def duration(seconds: float) -> str:
    """ "3 min 20 s", "12.4 s", "3.25 ms", "870 µs"."""
    if seconds >= 100:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s"
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _section(heading: str, content: str) -> str:
    return f"<section>\n<h2>{heading}</h2>\n{content}\n</section>" if content else ""


def _headlines(headlines: Sequence[Headline]) -> str:
    cards = [
        f"<div class=card><div class=name>{text(h.name)}</div><div class=value>{text(h.value)}</div>"
        f"<div class=beside>{text(h.beside)}</div></div>"
        for h in headlines
    ]
    return f"<div class=cards>{''.join(cards)}</div>" if cards else ""


def _charts(charts: Sequence[Chart]) -> str:
    figures = [
        f"<figure><figcaption>{text(chart.title)}</figcaption>{line_chart(chart)}</figure>"
        for chart in charts
        if any(curve.points for curve in chart.curves)
    ]
    return f"<div class=figures>{''.join(figures)}</div>" if figures else ""


def _neighbours(neighbours: Sequence[tuple[str, Sequence[tuple[str, float]]]]) -> str:
    if not neighbours:
        return ""
    rows = []
    for word, found in neighbours:
        near = " ".join(f"<span class=near>{text(w)}<small>{similarity:.2f}</small></span>" for w, similarity in found)
        rows.append(f"<tr><th scope=row>{text(word)}</th><td>{near}</td></tr>")
    note = "<p class=note>The words whose vectors point the same way, with the cosine of the angle.</p>"
    return f"{note}<table class=words>{''.join(rows)}</table>"


def _map(words: WordVectors | None) -> str:
    if words is None or len(words.words) < 4:
        return ""
    shown = [printable(word) for word in words.words]
    note = f"<p class=note>The vectors of {len(shown)} frequent words by t-SNE: what is near stands near.</p>"
    return f"{note}<div class=wide>{word_map(shown, words.vectors)}</div>"


def _classification(result: Classification | None) -> str:
    if result is None:
        return ""
    counts = result.confusion
    total = sum(map(sum, counts))
    columns = [sum(row[i] for row in counts) for i in range(len(counts))]
    most = max((max(row) for row in counts if row), default=0) or 1
    labels = "".join(f"<th scope=col><span>{text(label)}</span></th>" for label in result.labels)
    rows = []
    for i, (label, row) in enumerate(zip(result.labels, counts, strict=True)):
        recall = row[i] / sum(row) if sum(row) else 0.0
        precision = row[i] / columns[i] if columns[i] else 0.0
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        cells = "".join(
            f'<td class=count style="--share:{100 * count / most:.0f}%">{count or ""}</td>' for count in row
        )
        scores = "".join(f"<td class=score>{score:.0%}</td>" for score in (precision, recall, f1))
        rows.append(f"<tr><th scope=row>{text(label)}</th>{cells}{scores}<td class=score>{sum(row)}</td></tr>")
    correct = sum(row[i] for i, row in enumerate(counts))
    about = f"{text(result.about)} " if result.about else ""
    accuracy = f"{correct} of {total} right ({correct / total:.1%})." if total else ""
    head = (
        "<tr><th></th>"
        + labels
        + "".join(f"<th scope=col class=score>{name}</th>" for name in ("precision", "recall", "F1", "texts"))
    )
    return (
        f"<p class=note>{about}{accuracy} A row is what a text is, a column what the classifier said.</p>"
        f"<div class=wide><table class=confusion>{head}</tr>{''.join(rows)}</table></div>"
    )


def _samples(samples: Sequence[Sample]) -> str:
    shown = []
    for sample in samples:
        rest = sample.text.removeprefix(sample.prompt)
        shown.append(
            f"<blockquote><cite>{text(sample.model)}</cite><p><b>{text(sample.prompt)}</b>{text(rest)}</p></blockquote>"
        )
    return "".join(shown)


def _kernels(kernels: Sequence[KernelSpeed]) -> str:
    if not kernels:
        return ""
    rows = []
    for kernel in kernels:
        longest = max(kernel.ours_seconds, kernel.torch_seconds) or 1.0
        bars = "".join(
            f'<div class="bar {name}"><i style="width:{100 * seconds / longest:.1f}%"></i>'
            f"<span>{duration(seconds)}</span></div>"
            for name, seconds in (("ours", kernel.ours_seconds), ("theirs", kernel.torch_seconds))
        )
        rows.append(
            f"<div class=kernel><div><b>{text(kernel.family)}</b> {text(kernel.direction)}"
            f"<small>{text(kernel.shape)}, {text(kernel.dtype)}</small></div><div>{bars}</div>"
            f"<div class=ratio>{kernel.ratio:.2f}×</div></div>"
        )
    key = "<span class=key><i class=ours></i>lmengine</span> <span class=key><i class=theirs></i>PyTorch</span>"
    return f"<p class=note>Median time of a call, and how many times as fast ours is. {key}</p>{''.join(rows)}"


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in facts)
    return f"<dl>{rows}</dl>" if rows else ""


def _stages(stages: Sequence[tuple[str, float]]) -> str:
    if not stages:
        return ""
    rows = [*stages, ("all stages", sum(seconds for _, seconds in stages))]
    cells = "".join(f"<tr><th scope=row>{text(name)}</th><td>{duration(seconds)}</td></tr>" for name, seconds in rows)
    return f"<table class=stages>{cells}</table>"
