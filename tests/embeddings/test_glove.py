"""From counts to vectors: counting in pieces, training, going on after an interruption, files."""

import numpy as np
import pytest
import torch

from lmengine import _corpus
from lmengine.embeddings import Cooccurrence, GloVe, Vectors, Vocabulary
from lmengine.ops.cooccurrence import cooccurrence


def topics(words: int = 20, sentences: int = 400) -> Cooccurrence:
    """Sentences that keep to one half of the words."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randint(0, 2, (sentences, 1), generator=generator) * (words // 2)
    text = half + torch.randint(0, words // 2, (sentences, 8), generator=generator)
    tokens = torch.cat([text, torch.full((sentences, 1), -1)], dim=1).flatten()
    return Cooccurrence.from_tokens(tokens, words, window_size=4)


@pytest.mark.parametrize("breaks", ["line", "file"])
def test_counting_in_pieces(tmp_path, breaks):
    """Pieces of a stream are counted exactly like the whole text."""
    generator = torch.Generator().manual_seed(0)
    lines = [" ".join(f"w{i}" for i in torch.randint(0, 30, (12,), generator=generator).tolist()) for _ in range(99)]
    path = tmp_path / "text.txt"
    path.write_text("\n".join(lines))
    vocabulary = Vocabulary.from_files(path)
    whole = vocabulary.encode(path.read_text(), breaks=breaks)
    rows, columns, values = cooccurrence(whole, len(vocabulary), 5)
    for pieces in (vocabulary.encode_files(path, breaks=breaks, max_tokens=100), whole.split(37), [whole]):
        counted = Cooccurrence.from_tokens(pieces, len(vocabulary), 5)
        assert torch.equal(counted.rows, rows) and torch.equal(counted.columns, columns)
        torch.testing.assert_close(counted.values, values, rtol=1e-6, atol=0)
    assert len(Cooccurrence.from_tokens([], 5)) == 0


def random_counts(vocabulary: int, entries: int) -> tuple[torch.Tensor, ...]:
    keys = torch.randint(0, vocabulary**2, (entries,)).unique()
    return (keys // vocabulary).int(), (keys % vocabulary).int(), torch.rand(len(keys), dtype=torch.float64) + 0.1


@pytest.mark.parametrize("entries", [(0, 0), (1, 0), (0, 70), (300, 300), (200_000, 5), (150_000, 300_000)])
@pytest.mark.parametrize("threads", [1, 3])
def test_adding_counts(entries, threads):
    """Two sorted lists are added entry by entry, whichever is longer, in one part and in several."""
    one, other = (random_counts(1000, number) for number in entries)
    arrays = [tuple(tensor.numpy() for tensor in counts) for counts in (one, other)]
    rows, columns, values = map(torch.from_numpy, _corpus.add_counts(*arrays, threads))
    dense = torch.zeros(1000, 1000, dtype=torch.float64)
    for counts in (one, other):
        dense[counts[0].long(), counts[1].long()] += counts[2]
    right = dense.nonzero()
    assert torch.equal(rows, right[:, 0].int()) and torch.equal(columns, right[:, 1].int())
    assert torch.equal(values, dense[right[:, 0], right[:, 1]])


@pytest.mark.parametrize("breaks", [True, False])
def test_counting_a_long_text(monkeypatch, breaks):
    """A text in memory is cut at breaks, says how far it is, and gives the counts of the whole."""
    monkeypatch.setattr("lmengine.embeddings.cooccurrence.PIECE_TOKENS", 1000)
    tokens = torch.randint(0, 50, (20_000,))
    if breaks:
        tokens[torch.rand(20_000) < 0.1] = -1
    said = []
    counted = Cooccurrence.from_tokens(tokens, 50, 5, callback=said.append)
    rows, columns, values = cooccurrence(tokens, 50, 5)
    assert torch.equal(counted.rows, rows) and torch.equal(counted.columns, columns)
    torch.testing.assert_close(counted.values, values, rtol=2e-7, atol=0)
    assert said == sorted(said) and said[-1] == 20_000
    assert 16 <= len(said) <= 17 if breaks else len(said) == 1


def test_progress_of_a_stream():
    said = []
    pieces = [torch.tensor([1, 2]), torch.tensor([-1, 3]), torch.tensor([0, -1, -1]), torch.tensor([2])]
    Cooccurrence.from_tokens(iter(pieces), 5, callback=said.append)
    assert said == [3, 7, 8]


def test_save_and_load_counts(tmp_path):
    counts = topics()
    counts.save(tmp_path / "counts.safetensors")
    loaded = Cooccurrence.load(tmp_path / "counts.safetensors")
    assert loaded.vocabulary_size == 20
    for name in ("rows", "columns", "values"):
        assert torch.equal(getattr(loaded, name), getattr(counts, name))
    content = (tmp_path / "counts.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-5])
    with pytest.raises(ValueError, match=r"cut.safetensors: not a file of co-occurrence counts"):
        Cooccurrence.load(tmp_path / "cut.safetensors")
    with pytest.raises(TypeError, match=r"values: expected dtype torch.float32, got torch.float64"):
        Cooccurrence(counts.rows, counts.columns, counts.values.double(), 20)


def test_words_of_a_topic_come_together():
    costs = []
    model = GloVe(20, dim=8, seed=1).fit(topics(), epochs=30, callback=lambda epoch, cost: costs.append((epoch, cost)))
    assert [epoch for epoch, _ in costs] == list(range(1, 31))
    assert costs[-1][1] < costs[0][1] / 3
    vectors = Vectors([f"w{i}" for i in range(20)], model.vectors)
    for word in range(20):
        near = [int(other[1:]) // 10 for other, _ in vectors.nearest(f"w{word}", 5)]
        assert near == [word // 10] * 5


def test_same_numbers_every_time():
    """Neither another run nor another number of threads changes a bit."""
    counts = topics()
    first = GloVe(20, dim=9, seed=3).fit(counts, 3)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert torch.equal(GloVe(20, dim=9, seed=3).fit(counts, 3).parameters, first.parameters)
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(GloVe(20, dim=9, seed=4).fit(counts, 3).parameters, first.parameters)


def test_interrupted_training_goes_on(tmp_path):
    counts = topics()
    whole = GloVe(20, dim=6, seed=5).fit(counts, 5)
    half = GloVe(20, dim=6, seed=5).fit(counts, 2)
    torch.save(half.state_dict(), tmp_path / "state.pt")
    resumed = GloVe(20, dim=6)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.epoch == 2
    resumed.fit(counts, 3)
    assert torch.equal(resumed.parameters, whole.parameters)
    assert torch.equal(resumed.squared_gradients, whole.squared_gradients)
    with pytest.raises(ValueError, match=r"state\['parameters'\]: expected shape \(2, 20, 8\), got \(2, 20, 7\)"):
        GloVe(20, dim=7).load_state_dict(half.state_dict())


def test_bad_arguments():
    with pytest.raises(ValueError, match="dim: expected at least 1, got 0"):
        GloVe(5, dim=0)
    with pytest.raises(ValueError, match="cooccurrence: expected counts of 5 words, got 20"):
        GloVe(5).fit(topics())
    with pytest.raises(ValueError, match="cooccurrence: expected at least one count, got none"):
        GloVe(5).fit(Cooccurrence.from_tokens([], 5))


def test_vectors():
    vectors = Vectors(["a", "b", "c", "none"], np.array([[1, 0], [2, 0.1], [0, 3], [0, 0]], np.float32))
    assert [word for word, _ in vectors.nearest("a", 1)] == ["b"]
    assert [word for word, _ in vectors.nearest(torch.tensor([0.0, 1.0]), 1)] == ["c"]
    assert len(vectors.nearest("a", 99)) == 3
    assert vectors.similarity("a", "c") == 0 and vectors.similarity("a", "none") == 0
    assert vectors["c"].tolist() == [0, 3] and "a" in vectors
    with pytest.raises(KeyError, match="'d' has no vector"):
        vectors.nearest("d")


@pytest.mark.parametrize("header", [True, False])
def test_text_format(tmp_path, header):
    generator = torch.Generator().manual_seed(0)
    vectors = Vectors(["the", "我", "don't", "3"], torch.randn(4, 7, generator=generator) * 1e-3)
    vectors.save(tmp_path / "vectors.txt", header=header)
    loaded = Vectors.load(tmp_path / "vectors.txt")
    assert loaded.words == vectors.words
    assert torch.equal(loaded.array, vectors.array)
    assert (tmp_path / "vectors.txt").read_text("utf-8").startswith("4 7\n") == header


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"2 3\na 1 2 3\nb 1 2\n", "line 3: expected a word and 3 numbers, got 3 parts"),
        (b"a 1 2 3\nb 1 x 3\n", "line 2: could not convert string to float: 'x'"),
        (b"3 2\na 1 2\n", "line 1 promises 3 words, but 1 follow"),
        (b"a 1 2\n\xff 1 2\n", "line 2: not UTF-8"),
        (b"word\n", "line 1: expected a word and 1 numbers, got 1 parts"),
    ],
)
def test_bad_text_format(tmp_path, content, message):
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"bad.txt: {message}"):
        Vectors.load(tmp_path / "bad.txt")


def test_word_that_the_format_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="words: the text format cannot hold 'new york'"):
        Vectors(["new york"], torch.ones(1, 2)).save(tmp_path / "vectors.txt")
    assert not list(tmp_path.iterdir())
