"""Bad input to the public functions and classes: an error that names the argument, what was expected and what came."""

import os

import numpy as np
import pytest
import torch

from lmengine.embeddings import Cooccurrence, GloVe, Vectors, Vocabulary, tokenise
from lmengine.ops.cooccurrence import cooccurrence
from lmengine.ops.embedding import glove_epoch, glove_schedule
from tests.embedding.test_glove_epoch import problem

TOKENS = torch.tensor([0, 1, 2, 1])
WORDS = torch.tensor([0, 1], dtype=torch.int32)


def counts(rows=(0, 1), columns=(1, 0), values=(1.0, 1.0), vocabulary_size=2) -> Cooccurrence:
    return Cooccurrence(torch.tensor(rows).int(), torch.tensor(columns).int(), torch.tensor(values), vocabulary_size)


def state(**changes) -> dict:
    return {**GloVe(2, dim=3).state_dict(), **changes}


def vectors() -> Vectors:
    return Vectors(["a", "b"], torch.eye(2))


def epoch_with(index, value, **options):
    arguments = problem()
    arguments[index] = value
    return glove_epoch(*arguments, **options)


CASES = {
    "tokenise": [
        (lambda: tokenise(5), TypeError, "text: expected a string, got 5"),
        (lambda: tokenise(b"a"), TypeError, "text: expected a string, got bytes b'a'"),
        (lambda: tokenise("a\ud800"), ValueError, "text: expected text, got half a surrogate pair at character 1"),
    ],
    "Vocabulary": [
        (lambda: Vocabulary("abc"), TypeError, "tokens: expected an iterable of strings, got one string"),
        (lambda: Vocabulary(3), TypeError, "tokens: expected an iterable of strings, got 3"),
        (lambda: Vocabulary(["a", 1]), TypeError, r"tokens\[1\]: expected a string, got 1"),
        (lambda: Vocabulary(["a", "a"]), ValueError, "tokens: 'a' stands twice"),
        (lambda: Vocabulary(["a"], [1.5]), TypeError, r"counts\[0\]: expected a whole number, got 1.5"),
        (lambda: Vocabulary(["a"], ["1"]), TypeError, r"counts\[0\]: expected a whole number, got '1'"),
        (lambda: Vocabulary(["a"], [-1]), ValueError, r"counts\[0\]: expected at least 0, got -1"),
        (lambda: Vocabulary.from_texts(None), TypeError, "texts: expected an iterable of strings, got None"),
        (lambda: Vocabulary.from_texts(["a", None]), TypeError, r"texts\[1\]: expected a string, got None"),
        (lambda: Vocabulary.from_texts([], "2"), TypeError, "min_count: expected a whole number, got '2'"),
        (lambda: Vocabulary.from_texts([], 0), ValueError, "min_count: expected at least 1, got 0"),
        (lambda: Vocabulary.from_texts([], max_size=0), ValueError, "max_size: expected at least 1, got 0"),
        (lambda: Vocabulary.from_texts([], max_entries=-1), ValueError, "max_entries: expected at least 1, got -1"),
        (lambda: Vocabulary.from_files(7), TypeError, "paths: expected a path or several, got 7"),
        (lambda: Vocabulary.from_files([7]), TypeError, "paths: expected strings or pathlib paths, got 7"),
        (lambda: Vocabulary.from_files("/absent"), FileNotFoundError, "paths: there is no file or folder '/absent'"),
        (lambda: Vocabulary.from_files([]), FileNotFoundError, r"paths: there is no file in \[\]"),
        (
            lambda: Vocabulary.from_files("/", errors="ignore"),
            ValueError,
            "errors: expected 'strict' or 'replace', got",
        ),
        (lambda: Vocabulary(["a"]).encode(3), TypeError, "texts: expected an iterable of strings, got 3"),
        (lambda: Vocabulary(["a"]).encode(["a", 3]), TypeError, r"texts\[1\]: expected a string, got 3"),
        (
            lambda: Vocabulary(["a"]).encode("a", None),
            ValueError,
            "breaks: expected 'line', 'paragraph' or 'file', got",
        ),
        (lambda: Vocabulary(["a"]).encode_files("/absent"), FileNotFoundError, "paths: there is no file or folder"),
        (
            lambda: Vocabulary(["a"]).encode_files("/", max_tokens=0),
            ValueError,
            "max_tokens: expected at least 1, got 0",
        ),
        (lambda: Vocabulary(["a"]).decode([0, 1]), ValueError, r"numbers\[1\]: expected .* to 0, got 1"),
        (
            lambda: Vocabulary(["a"]).decode(torch.zeros(1)),
            TypeError,
            r"numbers\[0\]: expected a whole number, got 0.0",
        ),
        (lambda: Vocabulary(["a"]).save(3), TypeError, "path: expected a string or a pathlib path, got 3"),
        (lambda: Vocabulary.load("/absent"), FileNotFoundError, "'/absent'"),
        (lambda: Vocabulary.load("/"), IsADirectoryError, "'/'"),
    ],
    "cooccurrence": [
        (lambda: cooccurrence([1], 2), TypeError, r"tokens: expected a tensor, got list \[1\]"),
        (lambda: cooccurrence(TOKENS, "3"), TypeError, "vocabulary_size: expected a whole number, got '3'"),
        (lambda: cooccurrence(TOKENS, 3, 1.5), TypeError, "window_size: expected a whole number, got 1.5"),
        (lambda: cooccurrence(TOKENS, 3, -1), ValueError, "window_size: expected 1 to 32767, got -1"),
        (lambda: cooccurrence(TOKENS, 3, symmetric="no"), TypeError, "symmetric: expected True or False, got 'no'"),
        (lambda: cooccurrence(TOKENS, 3, distance_weighting=None), TypeError, "distance_weighting: expected True or"),
    ],
    "Cooccurrence": [
        (lambda: Cooccurrence.from_tokens("abc", 3), TypeError, "tokens: expected a tensor or an iterable of tensors"),
        (lambda: Cooccurrence.from_tokens([1, 2], 3), TypeError, r"tokens: expected tensors of shape \(tokens,\)"),
        (
            lambda: Cooccurrence.from_tokens(torch.zeros(3), 3),
            TypeError,
            r"got a tensor of torch.float32 and shape \(3,\)",
        ),
        (
            lambda: Cooccurrence.from_tokens(TOKENS, 2),
            RuntimeError,
            "tokens below vocabulary_size = 2, got 2 at position 2",
        ),
        (lambda: Cooccurrence.from_tokens([], 0), ValueError, "vocabulary_size: expected 1 to 2147483647, got 0"),
        (
            lambda: Cooccurrence.from_tokens(TOKENS, 3, callback=1),
            TypeError,
            "callback: expected a function or None, got 1",
        ),
        (lambda: Cooccurrence([0], WORDS, WORDS, 2), TypeError, r"rows: expected a tensor, got list \[0\]"),
        (lambda: counts(vocabulary_size=0), ValueError, "vocabulary_size: expected 1 to 2147483647, got 0"),
        (lambda: counts(rows=(0, 2)), ValueError, "rows: expected 0 to 1, got 2 at entry 1"),
        (lambda: counts(columns=(-1, 0)), ValueError, "columns: expected 0 to 1, got -1 at entry 0"),
        (
            lambda: counts(values=(1.0, torch.nan)),
            ValueError,
            "values: expected finite numbers above 0, got nan at entry 1",
        ),
        (lambda: counts(values=(1.0,)), ValueError, r"values: expected shape \(entries,\) = \(2,\), got \(1,\)"),
        (lambda: counts().save("/"), IsADirectoryError, "path: expected a file to write, got the folder '/'"),
        (lambda: counts().save("/proc/none/c"), OSError, "path: cannot write there: .*'/proc/none/c'"),
        (lambda: Cooccurrence.load("/absent"), FileNotFoundError, "/absent"),
        (
            lambda: Cooccurrence.load("/"),
            IsADirectoryError,
            "path: expected a file of co-occurrence counts, got the folder",
        ),
        (lambda: Cooccurrence.load(3), TypeError, "path: expected a string or a pathlib path, got 3"),
    ],
    "glove_schedule": [
        (lambda: glove_schedule([0], WORDS, 2), TypeError, "rows: expected a tensor of int32 or int64, got list"),
        (
            lambda: glove_schedule(WORDS, WORDS.float(), 2),
            TypeError,
            "columns: expected .* got a tensor of torch.float32",
        ),
        (lambda: glove_schedule(WORDS, WORDS[:1], 2), ValueError, r"columns: expected shape \(entries,\) = \(2,\)"),
        (lambda: glove_schedule(WORDS, WORDS, 1), ValueError, "rows: expected 0 to 0, got 1 at entry 1"),
        (lambda: glove_schedule(WORDS, WORDS, 2, 0), ValueError, "partitions: expected 1 to 32767, got 0"),
        (lambda: glove_schedule(WORDS, WORDS, "2"), TypeError, "vocabulary_size: expected a whole number, got '2'"),
    ],
    "glove_epoch": [
        (lambda: epoch_with(0, None), TypeError, "parameters: expected a tensor, got None"),
        (lambda: epoch_with(4, [1.0]), TypeError, r"values: expected a tensor, got list \[1.0\]"),
        (
            lambda: epoch_with(2, WORDS.to("meta")),
            ValueError,
            "rows: expected a tensor on the parameters' cpu, got meta",
        ),
        (lambda: glove_epoch(*problem(), eta="0.1"), TypeError, "eta: expected a number, got '0.1'"),
        (lambda: glove_epoch(*problem(), eta=torch.nan), ValueError, "eta: expected a finite number above 0, got nan"),
        (
            lambda: glove_epoch(*problem(), x_max=torch.inf),
            ValueError,
            "x_max: expected a finite number above 0, got inf",
        ),
        (lambda: glove_epoch(*problem(), alpha=-1), ValueError, "alpha: expected a finite number above 0, got -1"),
        (lambda: glove_epoch(*problem(), grad_clip=0), ValueError, "grad_clip: expected a number above 0, got 0"),
    ],
    "GloVe": [
        (lambda: GloVe("5"), TypeError, "vocabulary_size: expected a whole number, got '5'"),
        (lambda: GloVe(5, dim=2.5), TypeError, "dim: expected a whole number, got 2.5"),
        (lambda: GloVe(5, dim=0), ValueError, "dim: expected at least 1, got 0"),
        (lambda: GloVe(5, x_max=torch.nan), ValueError, "x_max: expected a finite number above 0, got nan"),
        (lambda: GloVe(5, alpha="a"), TypeError, "alpha: expected a number, got 'a'"),
        (lambda: GloVe(5, eta=-0.1), ValueError, "eta: expected a finite number above 0, got -0.1"),
        (lambda: GloVe(5, grad_clip=None), TypeError, "grad_clip: expected a number, got None"),
        (lambda: GloVe(5, seed=-1), ValueError, "seed: expected 0 to .*, got -1"),
        (lambda: GloVe(5, partitions=40_000), ValueError, "partitions: expected 1 to 32767, got 40000"),
        (lambda: GloVe(5, device="gpu"), ValueError, "device: expected a device such as 'cpu' or 'cuda:0', got 'gpu'"),
        (lambda: GloVe(5).fit(TOKENS), TypeError, r"cooccurrence: expected counts \(Cooccurrence\), got a tensor"),
        (lambda: GloVe(2).fit(counts(), epochs=-1), ValueError, "epochs: expected at least 0, got -1"),
        (lambda: GloVe(2).fit(counts(), epochs="3"), TypeError, "epochs: expected a whole number, got '3'"),
        (lambda: GloVe(2).fit(counts(), 1, "print"), TypeError, "callback: expected a function or None, got 'print'"),
        (lambda: GloVe(2, dim=3).load_state_dict([]), TypeError, "state: expected a dict from state_dict, got list"),
        (
            lambda: GloVe(2, dim=3).load_state_dict({"seed": 1}),
            KeyError,
            "missing parameters, squared_gradients, epoch",
        ),
        (lambda: GloVe(2, dim=3).load_state_dict(state(parameters=1)), TypeError, r"state\['parameters'\]: .* got 1"),
        (lambda: GloVe(2, dim=3).load_state_dict(state(epoch=-1)), ValueError, r"state\['epoch'\]: .* got -1"),
        (
            lambda: GloVe(2, dim=3).load_state_dict(state(parameters=torch.full((2, 2, 4), torch.nan))),
            ValueError,
            r"state\['parameters'\]: expected finite numbers",
        ),
        (
            lambda: GloVe(2, dim=3).load_state_dict(state(squared_gradients=torch.zeros(2, 2, 4))),
            ValueError,
            r"state\['squared_gradients'\]: expected numbers above 0",
        ),
    ],
    "Vectors": [
        (lambda: Vectors("ab", torch.eye(2)), TypeError, "words: expected a sequence of strings, got 'ab'"),
        (lambda: Vectors(["a", 2], torch.eye(2)), TypeError, r"words\[1\]: expected a string, got 2"),
        (lambda: Vectors(["a"], [[1.0]]), TypeError, r"array: expected a tensor or a NumPy array of numbers, got list"),
        (lambda: Vectors(["a"], np.array([["x"]])), TypeError, "array: expected a tensor or a NumPy array of numbers"),
        (lambda: Vectors(["a"], torch.eye(2)), ValueError, r"array: expected shape \(1 words, dim\), got \(2, 2\)"),
        (lambda: Vectors(["a"], torch.tensor([[torch.nan]])), ValueError, "array: expected finite .* in row 0, of 'a'"),
        (lambda: vectors()["c"], KeyError, "word: 'c' has no vector"),
        (lambda: vectors().similarity("a", 3), KeyError, "word: 3 has no vector"),
        (lambda: vectors().nearest("a", -1), ValueError, "k: expected at least 0, got -1"),
        (lambda: vectors().nearest("a", "3"), TypeError, "k: expected a whole number, got '3'"),
        (lambda: vectors().nearest(3), TypeError, "word: expected a string or a tensor, got 3"),
        (lambda: vectors().nearest(torch.ones(3)), ValueError, r"word: expected shape \(2,\), got \(3,\)"),
        (lambda: vectors().nearest(torch.zeros(2)), ValueError, "word: expected a vector that points somewhere"),
        (lambda: vectors().save("/proc/none/v"), OSError, "path: cannot write there: .*'/proc/none/v'"),
        (lambda: Vectors.load("/absent"), FileNotFoundError, "'/absent'"),
    ],
}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [pytest.param(*case, id=f"{name}-{number}") for name, cases in CASES.items() for number, case in enumerate(cases)],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_folder_without_text(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").write_text("a")
    with pytest.raises(FileNotFoundError, match=f"paths: there is no file in '{tmp_path}'"):
        Vocabulary.from_files(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=r"path: cannot write there: Permission denied: .*counts'"):
        counts().save(tmp_path / "counts")


def test_path_through_a_file(tmp_path):
    (tmp_path / "file").write_text("kept")
    for thing in (counts(), vectors(), Vocabulary(["a"])):
        with pytest.raises(OSError, match=r"path: cannot write there: .*file/below'"):
            thing.save(tmp_path / "file" / "below")
        with pytest.raises(IsADirectoryError, match="path: expected a file to write, got the folder"):
            thing.save(tmp_path)
    assert (tmp_path / "file").read_text() == "kept" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("seed", range(20))
def test_corrupt_files(tmp_path, seed):
    """A file that is cut short or changed at one place is refused with its name, or gives sound contents."""
    generator = np.random.default_rng(seed)
    for thing in (counts(), vectors(), Vocabulary(["a", "b"], [2, 1])):
        path = tmp_path / "saved"
        thing.save(path)
        content = bytearray(path.read_bytes())
        at = int(generator.integers(len(content)))
        changed = bytes(content)
        changed = changed[:at] + bytes([changed[at] ^ int(generator.integers(1, 256))]) + changed[at + 1 :]
        for bad in (bytes(content[:at]), changed):
            path.write_bytes(bad)
            try:
                loaded = type(thing).load(path)
            except ValueError as error:
                assert str(path) in str(error)
            else:
                assert isinstance(loaded, type(thing))
                if isinstance(loaded, Cooccurrence) and len(loaded):
                    assert loaded.rows.max() < loaded.vocabulary_size and (loaded.values > 0).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "expected an object with the keys tokens and counts"),
        ('{"tokens": "ab", "counts": [1, 2]}', "expected a list of tokens and a list of counts"),
        ('{"tokens": ["a", 2], "counts": [1, 2]}', r"tokens\[1\]: expected a string, got 2"),
        ('{"tokens": ["a"], "counts": [NaN]}', r"counts\[0\]: expected a whole number, got nan"),
        ('{"tokens": ["a"], "counts": [1, 2]}', "counts: expected 1, one a token, got 2"),
    ],
)
def test_other_json(tmp_path, content, message):
    (tmp_path / "v.json").write_text(content)
    with pytest.raises(ValueError, match=f"v.json: not a vocabulary: {message}"):
        Vocabulary.load(tmp_path / "v.json")
