"""Training: it learns, it goes on as if nothing had happened, and it says what is wrong."""

import math

import pytest
import safetensors.torch
import torch

from lmengine.data import ClassificationBatches, LanguageModelBatches
from lmengine.models import Decoder, DecoderConfig, RecurrentConfig, RecurrentLM, SequenceClassifier
from lmengine.training import (
    Interrupted,
    TrainingConfig,
    class_scores,
    finetune,
    fit,
    negative_log_likelihood,
    pretrain,
    unigram_perplexity,
)


def make(name="lstm", vocabulary=20):
    torch.manual_seed(0)
    if name == "lstm":
        return RecurrentLM(RecurrentConfig(vocabulary, embedding_dim=32, hidden_size=64, dropout=0.1))
    return Decoder(DecoderConfig(vocabulary, embedding_dim=64, num_layers=2, num_heads=2, context=32))


def counting_text(length):
    """A walk in which the next token follows from the last."""
    return torch.tensor([n * 7 % 20 for n in range(length)])


@pytest.mark.parametrize(("name", "learning_rate"), [("lstm", 1e-2), ("transformer", 3e-3)])
def test_a_language_model_learns_a_rule(name, learning_rate):
    text = counting_text(4000)
    model = make(name)
    data = LanguageModelBatches(text[:3500], batch_size=8, length=20)
    config = TrainingConfig(150, learning_rate=learning_rate, warmup=10, evaluate_every=50)
    history = pretrain(model, data, text[3500:], config)
    assert [step for step, _ in history.losses] == [step for step, _ in history.evaluations] == [50, 100, 150]
    assert history.evaluations[-1][1]["perplexity"] < 1.5 < unigram_perplexity(text[:3500], text[3500:], 20)
    assert not model.training


def test_a_classifier_learns():
    torch.manual_seed(5)
    labels = torch.arange(60) % 3
    texts = [torch.randint(3, 17, (int(n),)) for n in torch.randint(4, 12, (60,))]
    for text, label in zip(texts, labels, strict=True):
        text[int(torch.randint(len(text), ()))] = 17 + int(label)  # one word tells the class
    data = ClassificationBatches(texts, labels, batch_size=8, max_length=12, pad=0)
    model = SequenceClassifier(make(), ["a", "b", "c"])
    history = finetune(model, data, data, TrainingConfig(160, learning_rate=1e-2, warmup=10, evaluate_every=80))
    assert history.evaluations[-1][1]["accuracy"] > 0.9
    scores = class_scores(model, data)
    assert scores.shape == (60, 3)
    assert (scores.argmax(1) == labels).double().mean() == pytest.approx(history.evaluations[-1][1]["accuracy"])


@pytest.mark.parametrize("name", ["lstm", "transformer"])
@pytest.mark.parametrize("at", [1, 7, 10, 19])
def test_goes_on_as_if_nothing_had_happened(name, at, tmp_path):
    text = counting_text(900)
    data = LanguageModelBatches(text[:800], batch_size=4, length=16)
    config = TrainingConfig(20, warmup=5, evaluate_every=5, checkpoint_every=10, seed=4)
    whole = make(name)
    wanted = pretrain(whole, data, text[800:], config)

    checkpoint = tmp_path / "deep" / "training.safetensors"
    done = []
    options = dict(checkpoint=checkpoint, on_step=lambda step, loss: done.append(step))
    with pytest.raises(Interrupted, match=f"stopped after step {at} of 20"):
        pretrain(make(name), data, text[800:], config, should_stop=lambda: len(done) == at, **options)
    again = make(name)
    found = pretrain(again, data, text[800:], config, **options)
    assert done == list(range(1, 21))
    assert found == wanted
    for (key, one), other in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), key
    assert [path.name for path in checkpoint.parent.iterdir()] == ["training.safetensors"]


def test_a_finished_checkpoint_has_nothing_left_to_do(tmp_path):
    text = counting_text(500)
    data = LanguageModelBatches(text, batch_size=2, length=8)
    config = TrainingConfig(6, evaluate_every=3)
    first = pretrain(make(), data, text, config, checkpoint=tmp_path / "c")
    steps = []
    again = pretrain(make(), data, text, config, checkpoint=tmp_path / "c", on_step=lambda *_: steps.append(1))
    assert again == first and steps == []


def test_a_wrong_checkpoint_is_named(tmp_path):
    text = counting_text(500)
    data = LanguageModelBatches(text, batch_size=2, length=8)
    path = tmp_path / "c"
    config = TrainingConfig(2)
    pretrain(make(), data, text, config, checkpoint=path)
    with pytest.raises(ValueError, match=r"checkpoint: .* does not fit this model and optimizer"):
        pretrain(make("transformer"), data, text, config, checkpoint=path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"checkpoint: .* does not fit"):
        pretrain(make(), data, text, config, checkpoint=path)
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"checkpoint: .* does not fit"):
        pretrain(make(), data, text, config, checkpoint=path)


def test_a_loss_that_is_no_number_stops_training():
    model = torch.nn.Linear(1, 1)
    with pytest.raises(FloatingPointError, match="the loss of step 2 is nan"):
        fit(
            model,
            lambda step: model(torch.full((1, 1), math.nan if step == 2 else 1.0)).sum(),
            dict,
            TrainingConfig(5),
        )


def test_the_learning_rate_rises_and_falls():
    config = TrainingConfig(100, learning_rate=1.0, warmup=10)
    rates = [config.rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.1)


def test_likelihood_counts_every_token_but_the_first():
    model = make().eval()
    tokens = torch.randint(20, (53,))
    for length in (7, 52, 100):
        expected = 0.0
        for begin in range(0, 52, length):
            window = tokens[begin : begin + length + 1]
            logs = model(window[None, :-1]).log_softmax(-1)[0]
            expected -= logs.gather(1, window[1:, None]).sum().item()
        assert negative_log_likelihood(model, tokens, length) == pytest.approx(expected / 52, rel=1e-5)
    with pytest.raises(ValueError, match="tokens: expected at least 2, got 1"):
        negative_log_likelihood(model, tokens[:1], 5)


def test_unigram_perplexity():
    train, validation = torch.tensor([0, 0, 1]), torch.tensor([2, 0, 1])
    assert unigram_perplexity(train, validation, 3) == pytest.approx(1 / math.sqrt(3 / 6 * 2 / 6))
