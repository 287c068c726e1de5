"""Text as numbers of words, and back."""

import pytest
import torch

from lmengine.data import WordTokenizer


def test_words_unknown_words_and_ends():
    tokenizer = WordTokenizer(["the", "cat", "."])
    assert len(tokenizer) == 6
    assert tokenizer.encode("The dog. THE cat").tolist() == [3, tokenizer.unknown, 5, 3, 4]
    stream = tokenizer.encode_stream(["the cat", "", "cat"])
    assert stream.dtype == torch.int64
    assert stream.tolist() == [3, 4, tokenizer.end, tokenizer.end, 4, tokenizer.end]
    assert tokenizer.encode("").shape == tokenizer.encode_stream([]).shape == (0,)
    with pytest.raises(ValueError):
        WordTokenizer(["the", "the"])


@pytest.mark.parametrize(
    "text",
    [
        "the cat (a dog), it said: yes!",
        "今天天气很好，我们去公园。",
        "中文 and english",
        "one 3.14 two don't",
        ">>> x.__init__, y == z",
    ],
)
def test_reads_as_it_was_written(text):
    from lmengine.embeddings import tokenise

    tokenizer = WordTokenizer(sorted(set(tokenise(text))))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decodes_special_tokens():
    tokenizer = WordTokenizer(["a"])
    assert tokenizer.decode([3, tokenizer.end, 3, tokenizer.unknown, tokenizer.pad]) == "a\na <unk>"


def test_saves_and_loads(tmp_path):
    path = tmp_path / "new" / "words.json"
    WordTokenizer(["猫", "cat"]).save(path)
    assert WordTokenizer.load(path).words == ["猫", "cat"]
    assert [file.name for file in path.parent.iterdir()] == ["words.json"]
    for content in ("{", "[]", '{"words": [1]}', '{"words": ["a", "a"]}'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"words\.json: not a file of WordTokenizer"):
            WordTokenizer.load(path)
