"""The report page: whole HTML, all numbers in it, nothing loaded from elsewhere, text that stays text."""

import html
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from lmengine.tasks.charts import Chart, Curve
from lmengine.tasks.report import (
    Classification,
    Headline,
    Report,
    Sample,
    WordVectors,
    duration,
    render,
    write_report,
)
from lmengine.tasks.speed import KernelSpeed
from lmengine.tasks.word_map import place_labels, text_width, tsne

VOID = {"meta", "br", "img", "link", "input", "hr"}
TOPICS = {
    "types": "int str bytes float bool list tuple dict set None object type class instance subclass",
    "files": "file path directory name open read write close stream buffer line mode encoding text",
    "errors": "error exception raise raised handler traceback warning OSError ValueError TypeError KeyError",
    "functions": "function method argument arguments default keyword return returns call called callable",
    "numbers": "number integer value values size length index range count bits decimal digits",
    "network": "server client socket connection address host port request response header url http",
    "time": "time date seconds timeout thread process lock queue task event loop wait",
    "chinese": "模型 语言 训练 数据 向量 词语 注意力 循环 网络 文本 分类 生成 损失 参数 内核",
    "words": "the a of to in is and for if not be with that this an by are as from or it",
}


def made_up() -> Report:
    """Contents as a run of the main job has them."""
    generator = torch.Generator().manual_seed(0)
    steps = range(50, 1001, 50)

    def charted(title: str, last: float) -> Chart:
        def fall(step):
            return last + (9 - last) * math.exp(-step / 180)

        noise = torch.randn(200, generator=generator).tolist()
        train = [(5 * i + 5, fall(5 * i + 5) - 0.25 + 0.12 * noise[i]) for i in range(200)]
        return Chart(
            title,
            "step",
            "loss (nats a token)",
            [Curve("training", train), Curve("validation", [(s, fall(s)) for s in steps])],
        )

    words, vectors = [], []
    for topic in TOPICS.values():
        centre = torch.randn(64, generator=generator)
        for word in topic.split():
            words.append(word)
            vectors.append(centre + 1.1 * torch.randn(64, generator=generator))
    labels = ["asyncio", "email", "http", "logging", "os", "socket", "sqlite3", "unittest", "xml", "zipfile"]
    confusion = [[0] * 10 for _ in labels]
    for i in range(10):
        for j in torch.randint(10, (12,), generator=generator).tolist() + [i] * 30:
            confusion[i][j] += 1
    speeds = [
        ("attention", "forward", "32 x 4 x 64 x 32 causal", 0.00049, 0.00108),
        ("attention", "forward+backward", "16 x 4 x 128 x 32 causal", 0.0031, 0.0097),
        ("recurrent", "forward+backward", "LSTM 32 x 64 x 128", 0.0164, 0.0162),
        ("cooccurrence", "forward", "500000 tokens, 8000 words, window 10", 0.0568, 0.336),
        ("embedding", "GloVe epoch", "2654311 counts, 8000 words, dim 64", 0.167, 1.555),
    ]
    return Report(
        title="lmengine quickstart",
        about="Word vectors, two language models and a classifier, learned from text on this machine.",
        facts=[
            ("corpus", "this Python's documentation and library"),
            ("tokens", "1,204,511 to learn from, 131,020 held out"),
            ("vocabulary", "8,000 words, 3.1% of tokens unknown"),
            ("seed", "0"),
            ("backend", "auto (cpu)"),
            ("machine", "AMD EPYC 9B14, 2 threads, AVX-512 BF16"),
            ("versions", "lmengine 0.1.0, Python 3.11.7, PyTorch 2.13.0, Triton 3.7"),
        ],
        stages=[("Text", 6.2), ("Word vectors", 21.0), ("LSTM", 93.5), ("Transformer", 140.2), ("Classifier", 35.0)],
        headlines=[
            Headline("Perplexity, LSTM", "61.3", "unigram model: 402.7"),
            Headline("Perplexity, Transformer", "58.9", "unigram model: 402.7"),
            Headline("Test accuracy", "78.4%", "always the largest class: 16.2%"),
            Headline("Attention", "2.31×", "PyTorch's speed, forward"),
            Headline("GloVe epoch", "9.32×", "PyTorch's speed"),
        ],
        charts=[
            charted("LSTM", 4.1),
            charted("Transformer", 4.0),
            Chart("GloVe", "epoch", "mean cost", [Curve("", [(e, 0.02 / e**0.6) for e in range(1, 21)])]),
            charted("Classifier", 0.7),
        ],
        neighbours=[
            ("function", [("method", 0.81), ("callable", 0.74), ("functions", 0.72), ("argument", 0.63)]),
            ("error", [("exception", 0.84), ("errors", 0.77), ("raised", 0.7), ("OSError", 0.66)]),
            ("模型", [("语言", 0.8), ("训练", 0.75), ("参数", 0.71)]),
        ],
        word_map=WordVectors(words, torch.stack(vectors)),
        classification=Classification(labels, confusion, "The module that a docstring comes from."),
        samples=[
            Sample("LSTM", "return a list of", "return a list of the names of the modules in the given path."),
            Sample(
                "Transformer", "raise an error if", ' the <b>value</b> & its "type" don\'t match.\n如果 路径 不 存在。'
            ),
        ],
        kernels=[KernelSpeed(*s[:3], "float32", *s[3:], s[4] / s[3]) for s in speeds],
    )


class Elements(HTMLParser):
    """Checks that elements are closed in turn, and keeps their names, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.names, self.attributes, self.shown = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        self.shown.append(data)


@pytest.fixture(scope="module")
def page():
    return render(made_up())


def test_it_is_html_and_says_everything(page):
    shown = " ".join(" ".join(Elements(page).shown).split())
    for wanted in (
        *("lmengine quickstart", "1,204,511 to learn from", "AMD EPYC 9B14", "4 min 56 s", "93.5 s"),
        *("61.3", "unigram model: 402.7", "78.4%", "2.31×", "9.32×", "0.99×", "167 ms", "490 µs"),
        *("callable", "0.74", "模型", "语言", "loss (nats a token)", "mean cost", "validation", "asyncio"),
        *("return a list of", "the names of the modules", "如果 路径 不 存在。", "2654311 counts"),
    ):
        assert wanted in shown, wanted


def test_it_loads_nothing(page):
    elements = Elements(page)
    assert not {"script", "link", "img", "iframe", "object", "embed", "image", "base"} & set(elements.names)
    for tag, name, value in elements.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert value.startswith("#"), (tag, name, value)
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    assert set(re.findall(r"https?://[^\s\"'<>]+", page)) <= {"http://www.w3.org/1999/xlink"}


def test_text_is_escaped(tmp_path):
    nasty = '<script>alert("x")</script> & $\\frac$ \x00\x1b[31m'
    contents = Report(
        title=nasty,
        about=nasty,
        facts=[(nasty, nasty)],
        stages=[(nasty, 1.0)],
        headlines=[Headline(nasty, nasty, nasty)],
        charts=[Chart(nasty, nasty, nasty, [Curve(nasty, [(0, 1), (1, 2)]), Curve(nasty, [(0, 2), (1, 1)])])],
        neighbours=[(nasty, [(nasty, 0.5)])],
        word_map=WordVectors([nasty, "$a$", "&amp;", "b"], torch.randn(4, 8)),
        classification=Classification([nasty, "b"], [[1, 2], [0, 3]], nasty),
        samples=[Sample(nasty, nasty, nasty + nasty)],
        kernels=[KernelSpeed(nasty, nasty, nasty, nasty, 1e-3, 2e-3, 2.0)],
    )
    path = write_report(tmp_path / "run", contents)
    assert path == tmp_path / "run" / "report.html"
    written = path.read_text(encoding="utf-8")
    elements = Elements(written)
    assert "script" not in elements.names
    assert "\x00" not in written and "\x1b" not in written
    shown = " ".join(elements.shown)
    for word in ("$a$", "&amp;", '<script>alert("x")</script> & $\\frac$'):
        assert word in shown
    assert [f.name for f in path.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize("part", [name for name in Report.__dataclass_fields__ if name != "title"])
def test_any_part_may_be_absent(part):
    contents = made_up()
    few = WordVectors(contents.word_map.words[:9], contents.word_map.vectors[:9])
    contents = Report(**{**vars(contents), "word_map": few, "charts": contents.charts[2:3]})
    empty = Report("only a title")
    without = Report(**{**vars(contents), part: getattr(empty, part)})
    alone = Report(**{**vars(empty), part: getattr(contents, part)})
    for report in (without, alone):
        Elements(render(report))
    assert html.escape(contents.title) in render(without)
    assert "<section>" not in render(empty)


def test_the_same_contents_give_the_same_page(page):
    assert render(made_up()) == page


def test_confusion_and_vectors_must_fit_their_names():
    with pytest.raises(ValueError, match="confusion: expected 2 rows of 2 numbers"):
        Classification(["a", "b"], [[1, 2]])
    with pytest.raises(ValueError, match=r"vectors: expected shape \(2, dim\), got \(3, 4\)"):
        WordVectors(["a", "b"], torch.zeros(3, 4))


def test_scores_of_the_classifier():
    page = render(Report("t", classification=Classification(["a", "b", "never"], [[8, 2, 0], [4, 6, 0], [0, 0, 0]])))
    assert "14 of 20 right (70.0%)" in page
    scores = re.findall(r"<td class=score>([^<]*)", page)
    assert scores == ["67%", "80%", "73%", "10", "75%", "60%", "67%", "10", "0%", "0%", "0%", "0"]


@pytest.mark.parametrize(
    "seconds, said",
    [(200, "3 min 20 s"), (99.96, "100 s"), (12.4, "12.4 s"), (0.00325, "3.25 ms"), (0.00087, "870 µs"), (0, "0 µs")],
)
def test_duration(seconds, said):
    assert duration(seconds) == said


def test_tsne_keeps_neighbours_together():
    centres = torch.randn(4, 32) * 3
    group = torch.arange(80) % 4
    places = torch.from_numpy(tsne(centres[group] + torch.randn(80, 32)))
    assert places.shape == (80, 2) and places.isfinite().all()
    near = torch.cdist(places, places).fill_diagonal_(torch.inf).argmin(1)
    assert (group[near] == group).double().mean() > 0.9


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 30])
def test_tsne_of_few_or_equal_points(count):
    for vectors in (torch.randn(count, 6), torch.ones(count, 6), torch.zeros(count, 1)):
        places = tsne(vectors, steps=50)
        assert places.shape == (count, 2) and np.isfinite(places).all()


def test_labels_do_not_overlap():
    words = (" ".join(TOPICS.values())).split()
    middles = place_labels(np.random.randn(len(words), 2), words, 720, 560, 10)
    middles = torch.from_numpy(middles)
    half = torch.tensor([[text_width(word) * 5, 5.0] for word in words])
    apart = (middles[:, None] - middles[None]).abs()
    overlap = (apart < half[:, None] + half[None]).all(2).fill_diagonal_(False)
    assert overlap.sum() / 2 <= 2
    assert ((middles - half >= 0) & (middles + half <= torch.tensor([720, 560]))).all()
