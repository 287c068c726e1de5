"""Batches are a function of the step and the seed, and an epoch holds everything once."""

import pytest
import torch

from lmengine.data import ClassificationBatches, LanguageModelBatches


def test_an_epoch_holds_every_window_once():
    tokens = torch.arange(1000)
    batches = LanguageModelBatches(tokens, batch_size=4, length=16)
    assert len(batches) == 15
    for epoch in (0, 3):
        seen = []
        for step in range(epoch * 15, epoch * 15 + 15):
            inputs, targets = batches.batch(step, seed=1)
            assert inputs.shape == targets.shape == (4, 16)
            assert torch.equal(targets, inputs + 1)
            seen += inputs.flatten().tolist()
        assert len(set(seen)) == len(seen) == 15 * 64
    first, again, other = (batches.batch(2, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first, batches.batch(17, seed=1)[0]), "every epoch has the same order"


def test_too_little_text():
    with pytest.raises(ValueError, match="tokens: expected at least 65 for a batch of windows, got 64"):
        LanguageModelBatches(torch.arange(64), batch_size=4, length=16)
    assert len(LanguageModelBatches(torch.arange(65), batch_size=4, length=16)) == 1


def test_classification_batches_are_padded_and_cut():
    texts = [torch.full((length,), length) for length in (3, 5, 1, 9, 2)]
    data = ClassificationBatches(texts, torch.tensor([0, 1, 2, 3, 4]), batch_size=2, max_length=6, pad=0)
    assert len(data) == 3
    seen = []
    for step in range(3):
        padded, labels = data.batch(step, seed=7)
        for row, label in zip(padded, labels.tolist(), strict=True):
            wanted = texts[label][:6]
            assert torch.equal(row[: len(wanted)], wanted) and not row[len(wanted) :].any()
            seen.append(label)
    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert data.collate([3])[0].shape == (1, 6)
