"""The models: what a position sees, generation step by step, word vectors as a start, folders."""

import json

import pytest
import torch

from lmengine.data import WordTokenizer
from lmengine.models import (
    Decoder,
    DecoderConfig,
    RecurrentConfig,
    RecurrentLM,
    SequenceClassifier,
    load_model,
    save_model,
)

VOCABULARY = 40


def make(name):
    torch.manual_seed(3)
    if name == "RecurrentLM":
        return RecurrentLM(RecurrentConfig(VOCABULARY, embedding_dim=32, hidden_size=48, num_layers=2)).eval()
    return Decoder(DecoderConfig(VOCABULARY, embedding_dim=64, num_layers=2, num_heads=2, context=24)).eval()


@pytest.fixture(params=["RecurrentLM", "Decoder"])
def model(request):
    return make(request.param)


def test_a_position_sees_what_stands_before_it_and_nothing_else(model):
    tokens = torch.randint(VOCABULARY, (3, 20))
    logits = model(tokens)
    assert logits.shape == (3, 20, VOCABULARY)
    changed = tokens.clone()
    changed[:, 12] = (tokens[:, 12] + 1) % VOCABULARY
    other = model(changed)
    torch.testing.assert_close(other[:, :12], logits[:, :12])
    assert ((other[:, 12:] - logits[:, 12:]).abs().amax((0, 2)) > 1e-6).all(), "a later position does not see it"
    torch.testing.assert_close(model(tokens[1:2])[0], logits[1], rtol=1e-4, atol=1e-5)  # no text sees another


def test_steps_give_what_the_whole_gives(model):
    tokens = torch.randint(VOCABULARY, (2, 15))
    whole = model(tokens)
    scores, state = model.step(tokens[:, :6])
    torch.testing.assert_close(scores, whole[:, 5], rtol=1e-4, atol=1e-5)
    for position in range(6, 15):
        scores, state = model.step(tokens[:, position : position + 1], state)
        torch.testing.assert_close(scores, whole[:, position], rtol=1e-4, atol=1e-5)


def test_a_decoder_steps_beyond_its_context_and_refuses_more_at_once():
    model = make("Decoder")
    tokens = torch.randint(VOCABULARY, (1, 30))
    scores, _ = model.step(tokens)
    torch.testing.assert_close(scores, model(tokens[:, -24:])[:, -1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="tokens: expected at most context = 24 of them, got 30"):
        model(tokens)
    with pytest.raises(ValueError, match="num_heads: expected a divisor of embedding_dim = 64, got 5"):
        DecoderConfig(VOCABULARY, embedding_dim=64, num_heads=5)


def test_every_parameter_learns(model):
    model.train()
    torch.nn.functional.cross_entropy(
        model(torch.arange(VOCABULARY).view(2, -1)).flatten(0, 1), torch.randint(VOCABULARY, (VOCABULARY,))
    ).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_starts_from_word_vectors(model):
    dim = model.embedding.embedding_dim
    before = model.embedding.weight.detach().clone()
    vectors = torch.randn(VOCABULARY - 3, dim) * 7 + 1
    model.start_from_vectors(vectors, torch.arange(3, VOCABULARY))
    weight = model.embedding.weight.detach()
    assert torch.equal(weight[:3], before[:3])
    assert weight[3:].std() == pytest.approx(before.std().item(), rel=1e-3)
    cosines = torch.cosine_similarity(weight[3:], vectors - vectors.mean(0))
    assert cosines.min() > 0.999
    with pytest.raises(ValueError, match=rf"vectors: expected shape \(2, {dim}\), got \(2, {dim - 1}\)"):
        model.start_from_vectors(torch.randn(2, dim - 1), torch.arange(2))


def test_compiles_whole(model):
    torch._dynamo.reset()
    tokens = torch.randint(VOCABULARY, (2, 10))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), model(tokens), rtol=1e-4, atol=1e-5)


def test_padding_does_not_change_a_class(model):
    classifier = SequenceClassifier(model, ["a", "b", "c"], pad=0).eval()
    short, long = torch.randint(1, VOCABULARY, (7,)), torch.randint(1, VOCABULARY, (16,))
    batch = torch.stack((torch.nn.functional.pad(short, (0, 9)), long))
    scores = classifier(batch)
    assert scores.shape == (2, 3)
    torch.testing.assert_close(scores[0], classifier(short[None])[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores[1], classifier(long[None])[0], rtol=1e-4, atol=1e-5)


def test_folders_hold_models_and_classifiers(model, tmp_path):
    tokenizer = WordTokenizer([f"w{number}" for number in range(VOCABULARY - 3)])
    tokens = torch.randint(VOCABULARY, (2, 9))
    for kept in (model, SequenceClassifier(model, ["甲", "b"], dropout=0.3)):
        folder = tmp_path / type(kept).__name__ / "deep"
        save_model(folder, kept, tokenizer)
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "words.json"]
        loaded, words = load_model(folder)
        assert type(loaded) is type(kept) and words.words == tokenizer.words and not loaded.training
        assert torch.equal(loaded(tokens), kept.eval()(tokens))
    assert loaded.labels == ["甲", "b"] and loaded.dropout == 0.3


def test_broken_folders_are_named(model, tmp_path):
    tokenizer = WordTokenizer(["a"])
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load_model(tmp_path)
    with pytest.raises(TypeError, match="model: expected one of RecurrentLM, Decoder, SequenceClassifier, got Linear"):
        save_model(tmp_path, torch.nn.Linear(1, 1), tokenizer)
    save_model(tmp_path, model, tokenizer)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors: not the parameters of this model"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    config = json.loads((tmp_path / "config.json").read_text())
    for change in ({"architecture": "GPT-9"}, {"unknown_size": 3}, {"embedding_dim": "much"}):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=r"config\.json: not the configuration of a model"):
            load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocabulary_size": 41}))
    with pytest.raises(ValueError, match=r"model\.safetensors: not the parameters of this model"):
        load_model(tmp_path)
