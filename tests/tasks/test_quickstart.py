"""The main job on a small text: what it leaves, and that it goes on where it was stopped."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lmengine.embeddings import Vectors
from lmengine.models import SequenceClassifier, load_model
from lmengine.tasks import quickstart
from lmengine.tasks.quickstart import Settings, open_job
from lmengine.tasks.run import OtherSettings
from lmengine.training import Interrupted

SMALL = dict(
    vocabulary_size=60,
    dim=64,
    window_size=3,
    glove_epochs=3,
    lm_steps=6,
    batch_size=4,
    length=8,
    classifier_epochs=1,
    kernels=False,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three kinds of text, which share half of their words."""
    random.seed(1)
    path = tmp_path_factory.mktemp("corpus")
    for label in ("farm", "sea", "天"):
        words = [f"{label}{number}" for number in range(15)] + [f"common{number}" for number in range(10)]
        for file in range(2):
            lines = [" ".join(random.choices(words, k=30)) + "." for _ in range(80)]
            (path / label).mkdir(exist_ok=True)
            (path / label / f"{file}.txt").write_text("\n".join(lines), encoding="utf-8")
    return path


def numbers(out: Path):
    """What a run has found, without the times that it took."""
    stages = json.loads((out / "metrics.json").read_text())["stages"]
    return {name: {k: v for k, v in result.items() if k != "seconds"} for name, result in stages.items()}


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, open_job(Settings(corpus=folder, out=out, **SMALL)).finish()


def test_it_leaves_models_vectors_metrics_events_and_a_report(finished):
    out, report = finished
    stages = numbers(out)
    assert list(stages) == ["corpus", "vectors", "lstm", "transformer", "classifier", "samples"]
    vectors = Vectors.load(out / "vectors" / "vectors.txt")
    assert vectors.array.shape == (stages["corpus"]["vocabulary"], 64)
    assert len(stages["vectors"]["costs"]) == 3 and stages["vectors"]["costs"][-1] < stages["vectors"]["costs"][0]
    for name in ("lstm", "transformer"):
        model, tokenizer = load_model(out / name)
        assert len(tokenizer) == len(vectors) + 3
        assert stages[name]["parameters"] == sum(p.numel() for p in model.parameters())
        assert [step for step, _ in stages[name]["evaluations"]] == [1, 2, 3, 4, 5, 6]
        assert stages[name]["perplexity"] == stages[name]["evaluations"][-1][1]["perplexity"]
        assert list((out / "tensorboard" / name).glob("events.*"))
    classifier, _ = load_model(out / "classifier")
    assert isinstance(classifier, SequenceClassifier)
    assert classifier.labels == stages["classifier"]["labels"] == ["farm", "sea", "天"]
    assert sum(map(sum, stages["classifier"]["confusion"])) == stages["classifier"]["test_texts"]
    assert 0 < stages["classifier"]["majority_accuracy"] < 1
    assert len(stages["samples"]["samples"]) == 6
    assert report == out / "report.html" and report.is_file()
    left = [str(path.relative_to(out)) for path in out.rglob("*") if "training" in path.name or "new" in path.name]
    assert left == [], "files of unfinished work are left"


def test_the_models_begin_with_the_word_vectors(finished, folder, monkeypatch):
    out, _ = finished
    seen = []
    monkeypatch.setattr(quickstart, "pretrain", lambda model, *args, **options: seen.append(model) or 1 / 0)
    job = open_job(Settings(corpus=folder, out=out, **SMALL))
    with pytest.raises(ZeroDivisionError):
        job.train_language_model("lstm")
    vectors = Vectors.load(out / "vectors" / "vectors.txt").array
    rows = seen[0].embedding.weight.detach()[3:]
    assert torch.cosine_similarity(rows, vectors - vectors.mean(0)).min() > 0.999


def test_a_finished_run_is_not_done_again(finished, folder, monkeypatch):
    out, _ = finished
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "report.html"}
    monkeypatch.setattr(quickstart, "pretrain", None)
    open_job(Settings(corpus=folder, out=out, **SMALL)).finish()
    assert {path: path.read_bytes() for path in before} == before


def test_the_same_seed_gives_the_same_and_another_something_else(finished, folder, tmp_path):
    out, _ = finished
    open_job(Settings(corpus=folder, out=tmp_path / "same", **SMALL)).finish()
    assert numbers(tmp_path / "same") == numbers(out)
    open_job(Settings(corpus=folder, out=tmp_path / "other", seed=1, **SMALL)).finish()
    other = numbers(tmp_path / "other")
    for name in ("vectors", "lstm", "transformer"):
        assert other[name] != numbers(out)[name]


def test_it_goes_on_wherever_it_was_stopped(finished, folder, tmp_path):
    out, _ = finished
    stops = 0
    while True:
        asked = 0

        def should_stop():
            nonlocal asked
            asked += 1
            return asked == 3  # of every sitting: within GloVe, within training, between stages

        try:
            open_job(Settings(corpus=folder, out=tmp_path, **SMALL), should_stop=should_stop).finish()
            break
        except Interrupted:
            stops += 1
    assert stops >= 5
    assert numbers(tmp_path) == numbers(out)
    for name in ("lstm", "transformer", "classifier"):
        one, other = (load_file(path / name / "model.safetensors") for path in (out, tmp_path))
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    assert (tmp_path / "vectors" / "vectors.txt").read_bytes() == (out / "vectors" / "vectors.txt").read_bytes()


def test_another_text_or_setting_does_not_overwrite_a_run(finished, folder, tmp_path):
    out, _ = finished
    with pytest.raises(OtherSettings, match="holds a run with lm_steps 6 and not 7"):
        open_job(Settings(corpus=folder, out=out, **{**SMALL, "lm_steps": 7}))
    (tmp_path / "a.txt").write_text("other words here. " * 2000)
    with pytest.raises(OtherSettings, match="holds a run with text "):
        open_job(Settings(corpus=tmp_path, out=out, **SMALL))


def test_a_single_chinese_file_has_no_classes(tmp_path):
    text = "\n".join(f"第{n}天,今天天气很好,我们一起去公园看花。明天可能下雨,后天又是晴天。" for n in range(300))
    (tmp_path / "中文.txt").write_text(text, encoding="utf-8")
    open_job(Settings(corpus=tmp_path / "中文.txt", out=tmp_path / "run", **SMALL)).finish()
    stages = numbers(tmp_path / "run")
    assert "no two labels" in stages["classifier"]["left_out"]
    assert "天" in stages["vectors"]["neighbours"]
    assert all("<" not in sample["text"] for sample in stages["samples"]["samples"])


def test_a_text_that_is_too_short(tmp_path):
    (tmp_path / "a.txt").write_text("hardly anything")
    with pytest.raises(ValueError, match="corpus: expected more than 32 words to learn from"):
        open_job(Settings(corpus=tmp_path / "a.txt", out=tmp_path / "run", **SMALL))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [("dim", 100, "a multiple of 64"), ("lm_steps", 0, "at least 1"), ("length", 5000, "at most 1024"),
     ("vocabulary_size", 3, "at least 10"), ("seed", -1, "at least 0")],
)  # fmt: skip
def test_settings_out_of_range(name, value, told):
    with pytest.raises(ValueError, match=f"{name}: expected {told}"):
        Settings(**{name: value})
