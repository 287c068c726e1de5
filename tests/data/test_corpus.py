"""Where text comes from."""

import pytest

from lmengine.data import Document, held_out, python_corpus, read_corpus
from lmengine.data.corpus import PASSAGE, passages


@pytest.fixture(scope="module")
def corpus():
    return python_corpus()


def test_the_default_corpus_is_the_reference_the_docstrings_and_the_sources(corpus):
    from pydoc_data.topics import topics

    texts = {document.text for document in corpus}
    assert len(texts) == len(corpus), "a text stands twice"
    assert topics["assignment"] in texts
    docstrings = [document for document in corpus if document.label]
    assert len(docstrings) > 3000 and all(document.prose for document in docstrings)
    assert {"asyncio", "email", "logging"} <= {document.label for document in docstrings}
    sources = [document for document in corpus if not document.prose]
    assert len(sources) > 300
    textwrap = next(document for document in sources if document.name == "textwrap.py")
    assert "class TextWrapper" in textwrap.text
    assert "Object for wrapping/filling text" not in textwrap.text, "a docstring stands in the source still"
    assert any(d.label == "textwrap" and "Object for wrapping/filling text" in d.text for d in docstrings)


def test_the_default_corpus_tells_how_far_it_is():
    calls = []
    python_corpus(lambda done, total: calls.append((done, total)))
    assert [done for done, _ in calls] == list(range(1, calls[0][1] + 1))


def test_a_folder_is_labelled_by_its_first_level(tmp_path):
    for name in ("sport/a.txt", "sport/deep/b.txt", "news.txt", ".hidden/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}\n")
    found = read_corpus(tmp_path)
    assert found == [
        Document("news.txt 1", "text of news.txt", "news"),
        Document("sport/a.txt 1", "text of sport/a.txt", "sport"),
        Document("sport/deep/b.txt 1", "text of sport/deep/b.txt", "sport"),
    ]


def test_a_file_has_no_labels_and_is_cut_into_passages(tmp_path):
    lines = [f"第 {number} 行 of the text, which is long enough" for number in range(400)]
    path = tmp_path / "a.txt"
    path.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    found = read_corpus(path)
    assert len(found) > 5 and all(document.label is None for document in found)
    assert "\n".join(document.text for document in found).split("\n") == lines
    assert all(PASSAGE <= len(document.text) + 1 < 2 * PASSAGE for document in found[:-1])


@pytest.mark.parametrize("blank", [" ", ""])
def test_a_very_long_line_is_cut(blank):
    text = (("word" + blank) * 5000).strip()
    pieces = list(passages(text))
    assert all(len(piece) <= 2 * PASSAGE for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())


def test_bad_bytes_are_named_or_replaced(tmp_path):
    path = tmp_path / "bad.txt"
    path.write_bytes(b"good \xff bad")
    with pytest.raises(ValueError, match=r"corpus: .*bad\.txt is not UTF-8: byte 0xff at offset 5"):
        read_corpus(path)
    assert read_corpus(path, errors="replace")[0].text == "good \ufffd bad"
    with pytest.raises(ValueError, match="errors: expected strict or replace, got 'ignore'"):
        read_corpus(path, errors="ignore")


def test_no_file_and_no_text(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        read_corpus(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="there is no file in"):
        read_corpus(tmp_path)
    (tmp_path / "blank.txt").write_text("  \n\n ")
    with pytest.raises(ValueError, match="corpus: there is no text in"):
        read_corpus(tmp_path)


def test_a_tenth_is_held_out_and_the_seed_says_which():
    assert sum(held_out(1000, seed=1)) == 100
    assert held_out(1000, seed=1) == held_out(1000, seed=1) != held_out(1000, seed=2)
    assert [sum(held_out(count, seed=0)) for count in (0, 1, 2, 9)] == [0, 0, 1, 1]
