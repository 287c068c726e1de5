"""The work that the kernels' speed is taken from: both sides of it give the same results."""

import pytest
import torch

import lmengine
from lmengine.ops.cooccurrence import cooccurrence
from lmengine.ops.embedding import glove_epoch, glove_schedule
from lmengine.tasks import speed
from lmengine.tasks.speed import Case, measure

pytestmark = pytest.mark.skipif(
    lmengine.backends.unusable("cpu") is not None, reason=str(lmengine.backends.unusable("cpu"))
)


@pytest.mark.parametrize("length, vocabulary_size, window_size", [(3000, 50, 10), (20_000, 50_000, 3), (5, 9, 10)])
def test_torchs_cooccurrence_counts_the_same(length, vocabulary_size, window_size):
    tokens = speed.zipf_tokens(length, vocabulary_size, seed=int(torch.randint(1000, ())))
    window_size = min(window_size, length - 1)
    rows, columns, values = cooccurrence(tokens, vocabulary_size, window_size)
    found = speed.torch_cooccurrence(tokens, vocabulary_size, window_size)
    assert torch.equal(found[0], rows) and torch.equal(found[1], columns)
    torch.testing.assert_close(found[2], values, rtol=1e-4, atol=1e-4)


def test_torchs_glove_epoch_with_batches_of_one_is_glove():
    tokens = speed.zipf_tokens(60, 12)
    rows, columns, values = cooccurrence(tokens, 12)
    order, stages = glove_schedule(rows, columns, 12, 1)
    counts = rows[order], columns[order], values[order]
    ours, theirs = speed.glove_parameters(12, 8), speed.glove_parameters(12, 8)
    cost = glove_epoch(*ours, *counts, stages)
    torch.testing.assert_close(speed.torch_glove_epoch(*theirs, *counts, batch_size=1), cost, rtol=1e-4, atol=0)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_torchs_glove_epoch_learns_as_fast_as_ours():
    tokens = speed.zipf_tokens(20_000, 500)
    counts = cooccurrence(tokens, 500)
    order, stages = glove_schedule(*counts[:2], 500)
    ours, theirs = speed.glove_parameters(500, 16), speed.glove_parameters(500, 16)
    shuffled = torch.randperm(len(order))
    for _ in range(5):
        mine = glove_epoch(*ours, *(x[order] for x in counts), stages)
        other = speed.torch_glove_epoch(*theirs, *(x[shuffled] for x in counts), batch_size=1024)
    assert other < 1.15 * mine


@pytest.mark.parametrize(
    "cases",
    [
        speed.attention_cases(2, 2, 9, 16),
        speed.attention_cases(1, 2, 9, 16, is_causal=False, dtype=torch.bfloat16),
        speed.lstm_cases(3, 5, 8),
    ],
    ids=["causal", "full", "lstm"],
)
def test_both_directions_do_the_same_work(cases):
    (forward, both) = cases
    assert (forward.direction, both.direction) == ("forward", "forward+backward")
    assert not forward.ours().requires_grad and forward.ours().shape == forward.theirs().shape
    mine, other = both.ours(), both.theirs()
    assert [x.shape for x in mine] == [x.shape for x in other] and all(x.any() for x in mine)


def test_attention_cases_agree():
    for case in speed.attention_cases(2, 3, 17, 32):
        mine, other = case.ours(), case.theirs()
        for x, y in zip(mine, other, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_measure_takes_turns_and_gives_medians(monkeypatch):
    clock, called = [0.0], []

    def work(name, times):
        def call():
            clock[0] += times[min(called.count(name), len(times) - 1)]
            called.append(name)

        return call

    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])
    case = Case("family", "forward", "shape", "float32", work("ours", [9, 1, 3, 2]), work("theirs", [99, 6, 4, 8]))
    steps = []
    (result,) = measure([case], seconds=5, progress=lambda *step: steps.append(step))
    assert called == ["ours", "theirs", "ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert (result.ours_seconds, result.torch_seconds, result.ratio) == (2, 6, 3)
    assert steps == [(0, 1, "family forward"), (1, 1, "")]


def test_a_slow_case_is_measured_once(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])

    def slow():
        clock[0] += 30

    (result,) = measure([Case("family", "forward", "shape", "float32", slow, slow)], seconds=0.5)
    assert result.ratio == 1 and clock[0] == 120


def test_main_cases_run():
    small = [
        speed.cooccurrence_case(speed.zipf_tokens(500, 20), 20),
        speed.glove_case(cooccurrence(speed.zipf_tokens(500, 20), 20), 20, 8),
    ]
    for result in measure(small, seconds=0.01):
        assert result.ours_seconds > 0 and result.ratio == result.torch_seconds / result.ours_seconds
