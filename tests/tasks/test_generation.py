"""Generation and classification from trained models."""

import pytest
import torch

from lmengine.data import LanguageModelBatches, WordTokenizer
from lmengine.models import RecurrentConfig, RecurrentLM, SequenceClassifier
from lmengine.tasks.classification import classify
from lmengine.tasks.generation import generate
from lmengine.training import TrainingConfig, pretrain

WORDS = ["one", "two", "three", "four", "five", "six", "seven"]


@pytest.fixture(scope="module")
def tokenizer():
    return WordTokenizer(WORDS)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    text = tokenizer.encode_stream([" ".join(WORDS)] * 300)
    model = RecurrentLM(RecurrentConfig(len(tokenizer), embedding_dim=32, hidden_size=32, dropout=0.0))
    pretrain(model, LanguageModelBatches(text, 8, 16), text[:100], TrainingConfig(120, learning_rate=1e-2, warmup=5))
    return model


def test_goes_on_as_it_learned_and_stops_at_the_end(model, tokenizer):
    assert generate(model, tokenizer, "one two", temperature=0) == " ".join(WORDS)
    assert generate(model, tokenizer, "", temperature=0) == " ".join(WORDS)
    assert generate(model, tokenizer, "three", max_tokens=2, top_k=1) == "three four five"
    assert generate(model, tokenizer, "three", max_tokens=0) == "three"


def test_the_seed_decides(model, tokenizer):
    def write(seed):
        return generate(model, tokenizer, "one", temperature=50.0, seed=seed)

    assert write(1) == write(1)
    assert len({write(seed) for seed in range(8)}) > 1
    assert not any("<" in write(seed) for seed in range(30)), "a special token was chosen"


def test_bad_arguments(model, tokenizer):
    for name, value in (("max_tokens", -1), ("temperature", -0.5), ("temperature", float("nan")), ("top_k", 0)):
        with pytest.raises(ValueError, match=f"{name}: expected at least"):
            generate(model, tokenizer, "one", **{name: value})


def test_classifies_texts_of_any_length(model, tokenizer):
    classifier = SequenceClassifier(model, ["a", "b"]).eval()
    texts = ["one", "", "two three " * 100]
    found = classify(classifier, tokenizer, texts)
    assert [label in ("a", "b") and 0.5 <= p <= 1 for label, p in found] == [True] * 3
    assert found[:1] == [
        pytest.approx(one) if isinstance(one, float) else one for one in classify(classifier, tokenizer, texts[:1])
    ]
    assert classify(classifier, tokenizer, []) == []
    with pytest.raises(TypeError, match="texts: expected a sequence of strings, got one string"):
        classify(classifier, tokenizer, "one")
