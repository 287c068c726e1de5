"""Stages are done once, whatever happens between."""

import json

import pytest

from lmengine.tasks.run import OtherSettings, Run
from lmengine.tasks.view import View
from lmengine.training import Interrupted


def test_a_stage_is_done_once(tmp_path):
    calls = []
    for _ in range(2):
        run = Run(tmp_path / "run", {"seed": 1}, View())
        result = run.stage("a", "A", lambda: calls.append("a") or {"pairs": [(1, 2.5)]})
        assert result["pairs"] == [[1, 2.5]] and result["seconds"] >= 0
    assert calls == ["a"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.json"]


def test_an_interrupted_stage_is_not_done_and_its_time_counts(tmp_path):
    def interrupted():
        raise Interrupted("stopped")

    run = Run(tmp_path, {}, View())
    with pytest.raises(Interrupted):
        run.stage("a", "A", interrupted)
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert content["stages"] == {} and content["unfinished_seconds"]["a"] >= 0
    content["unfinished_seconds"]["a"] = 100.0
    (tmp_path / "metrics.json").write_text(json.dumps(content))
    assert Run(tmp_path, {}, View()).stage("a", "A", dict)["seconds"] >= 100


def test_a_failing_stage_is_not_done(tmp_path):
    run = Run(tmp_path, {}, View())
    with pytest.raises(ZeroDivisionError):
        run.stage("a", "A", lambda: {"x": 1 / 0})
    assert "a" not in run.stages and "a" not in Run(tmp_path, {}, View()).stages


def test_stops_between_stages(tmp_path):
    run = Run(tmp_path, {}, View(), should_stop=lambda: True)
    with pytest.raises(Interrupted, match="stopped before 'a'"):
        run.stage("a", "A", dict)


def test_other_settings_and_other_files_are_told(tmp_path):
    Run(tmp_path, {"seed": 1, "dim": 64}, View()).stage("a", "A", dict)
    with pytest.raises(OtherSettings, match="holds a run with seed 1 and not 2"):
        Run(tmp_path, {"seed": 2, "dim": 64}, View())
    for content in ("{", "[]", "{}"):
        (tmp_path / "metrics.json").write_text(content)
        with pytest.raises(ValueError, match=r"out: .*metrics\.json is not the record of a run"):
            Run(tmp_path, {"seed": 1}, View())
