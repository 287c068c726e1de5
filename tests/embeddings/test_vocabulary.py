"""Reading text: tokens, counts, numbers, and what goes wrong."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmengine import _corpus
from lmengine.embeddings import Vocabulary, tokenise


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Don't pay 3.14 or 1,000!", ["don't", "pay", "3.14", "or", "1,000", "!"]),
        ("It’s 'quoted'.", ["it's", "'", "quoted", "'", "."]),
        ("end 5. 6,a B2B 7.x", ["end", "5", ".", "6", ",", "a", "b2b", "7", ".", "x"]),
        ("我爱北京。GPU加速", ["我", "爱", "北", "京", "。", "gpu", "加", "速"]),
        ("ÜBER Дом ΑΘΗΝΑ naïve", ["über", "дом", "αθηνα", "naïve"]),
        ("हिन्दी co\u00adop\u200bx \ufeffy", ["हिन्दी", "coopx", "y"]),
        ("𠀀a😀b", ["𠀀", "a", "😀", "b"]),
        ("well-known (x)", ["well", "-", "known", "(", "x", ")"]),
        (" \t\r\n", []),
        ("", []),
    ],
)
def test_tokenise(text, tokens):
    assert tokenise(text) == tokens


@settings(max_examples=200, deadline=None)
@given(st.text(), st.integers(1, 7))
def test_pieces_of_a_file_do_not_matter(text, seed):
    """A token or a character that is cut by the end of a read is put together again (the cut is made by padding)."""
    assert "".join(tokenise(text)).count(" ") == 0
    padded = "x " * 3 + text
    assert tokenise(padded)[3:] == tokenise(text)


def test_characters_across_reads(tmp_path):
    """Reads end inside of words and of characters of every length."""
    generator = random.Random(0)
    words = ["naïve", "我", "𠀀", "don't", "3.14", "straße", "a"]
    text = " ".join(generator.choice(words) for _ in range(400_000))
    path = tmp_path / "long.txt"
    path.write_text(text, "utf-8")
    vocabulary = Vocabulary.from_files(path)
    counts = dict(zip(vocabulary.tokens, vocabulary.counts, strict=True))
    assert counts == {word: text.split().count(word) for word in words}
    numbers = torch.cat(list(vocabulary.encode_files(path, max_tokens=1000)))
    assert vocabulary.decode(numbers) == text.split()


def test_counts_and_order():
    vocabulary = Vocabulary.from_texts(["b a b c", "b c 中 中 中 中"])
    assert vocabulary.tokens == ["中", "b", "c", "a"]
    assert vocabulary.counts == [4, 3, 2, 1]
    assert vocabulary["c"] == 2 and "c" in vocabulary and "d" not in vocabulary and len(vocabulary) == 4
    assert Vocabulary.from_texts(["b a b c", "b c"], min_count=2).tokens == ["b", "c"]
    assert Vocabulary.from_texts(["b a b c", "b c"], max_size=1).tokens == ["b"]
    assert len(Vocabulary.from_texts([])) == 0


def test_encode():
    vocabulary = Vocabulary(["a", "b"])
    text = "a b\nx\n\nB c a\n\n\n"
    assert vocabulary.encode(text).tolist() == [0, 1, -1, 1, 0]
    assert vocabulary.encode(text, breaks="line").tolist() == [0, 1, -1, 1, 0]
    assert vocabulary.encode("a\nb", breaks="line").tolist() == [0, -1, 1]
    assert vocabulary.encode("a\nb\r\n \r\nb").tolist() == [0, 1, -1, 1]
    assert vocabulary.encode(text, breaks="file").tolist() == [0, 1, 1, 0]
    assert vocabulary.encode(["a", "zzz", "b a"]).tolist() == [0, -1, 1, 0]
    assert vocabulary.encode("").tolist() == [] and vocabulary.encode("").dtype == torch.int32
    assert vocabulary.decode(torch.tensor([0, -1, 1])) == ["a", "b"]
    with pytest.raises(ValueError, match="breaks: expected 'line', 'paragraph' or 'file', got 'page'"):
        vocabulary.encode("a", breaks="page")


def test_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("b a")
    (tmp_path / "sub" / "c.txt").write_text("c")
    (tmp_path / ".hidden").write_bytes(b"\xff")
    vocabulary = Vocabulary.from_files(tmp_path)
    assert vocabulary.tokens == ["a", "b", "c"]
    assert torch.cat(list(vocabulary.encode_files(tmp_path))).tolist() == [1, 0, -1, 2, -1]
    assert Vocabulary.from_files([tmp_path / "b.txt", tmp_path / "b.txt"]).counts == [2, 2]
    with pytest.raises(FileNotFoundError, match=r"no file or folder '.*absent'"):
        Vocabulary.from_files(tmp_path / "absent")


@pytest.mark.parametrize(
    ("content", "offset"),
    [
        (b"ab\xffcd", 2),
        (b"\xc3", 0),
        ("naïve".encode()[:3] + b" x", 2),
        (b"a\xe0\x80\x80", 1),
        (b"a \xed\xa0\x80", 2),
        (b"\xf5\x80\x80\x80", 0),
        (b"\xc0\xaf", 0),
        (b"x" * (1 << 20) + b"\xe6\x88", 1 << 20),
        (b"x" * ((1 << 20) - 1) + b"\xe6x\x88", (1 << 20) - 1),
    ],
)
def test_not_utf8(tmp_path, content, offset):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad.txt: not UTF-8 at byte {offset}$"):
        Vocabulary.from_files(path)
    with pytest.raises(ValueError, match=rf"bad.txt: not UTF-8 at byte {offset}$"):
        list(Vocabulary(["x"]).encode_files(path))
    counted = Vocabulary.from_files(path, errors="replace")
    expected = Vocabulary.from_texts([content.decode("utf-8", errors="replace")])
    assert counted == expected


def test_bounded_memory():
    texts = [f"often w{i}" for i in range(1000)]
    with pytest.raises(ValueError, match="with max_entries this small, up to 10 occurrences of a token may be missing"):
        Vocabulary.from_texts(texts, max_entries=100)
    assert Vocabulary.from_texts(texts, min_count=100, max_entries=100).tokens == ["often"]
    with pytest.raises(ValueError, match="max_entries: expected at least 1, got 0"):
        Vocabulary.from_texts(texts, max_entries=0)


def test_save_and_load(tmp_path):
    vocabulary = Vocabulary.from_texts(['我 爱 爱 "quoted" don\'t'])
    vocabulary.save(tmp_path / "new" / "vocabulary.json")
    assert Vocabulary.load(tmp_path / "new" / "vocabulary.json") == vocabulary
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["vocabulary.json"]
    (tmp_path / "half.json").write_text((tmp_path / "new" / "vocabulary.json").read_text()[:20])
    with pytest.raises(ValueError, match=r"half.json: not a vocabulary in JSON"):
        Vocabulary.load(tmp_path / "half.json")
    (tmp_path / "other.json").write_text('{"tokens": ["a", "a"], "counts": [1, 1]}')
    with pytest.raises(ValueError, match=r"other.json: not a vocabulary: tokens: 'a' stands twice, again at number 1"):
        Vocabulary.load(tmp_path / "other.json")


def test_errors():
    with pytest.raises(ValueError, match="min_count: expected at least 1, got 0"):
        Vocabulary.from_texts(["a"], min_count=0)
    with pytest.raises(TypeError, match="texts: expected an iterable of strings, got one string"):
        Vocabulary.from_texts("a b")
    with pytest.raises(ValueError, match="counts: expected 2, one a token, got 1"):
        Vocabulary(["a", "b"], [1])
    counter = _corpus.Counter(10)
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '/absent/file'"):
        counter.add_file("/absent/file", "strict")
    with pytest.raises(ValueError, match="errors: expected 'strict' or 'replace', got 'ignore'"):
        counter.add_file("/absent/file", "ignore")
