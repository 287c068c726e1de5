"""The benchmark report: ratios of medians from recorded samples, and the figures in the README."""

import json
from pathlib import Path

import pytest

from bench import report

ROOT = Path(__file__).parent.parent.parent


def entry(implementation, samples, direction="forward", shape="b2"):
    return {
        "family": "attention",
        "implementation": implementation,
        "shape": shape,
        "dtype": "fp32",
        "direction": direction,
        "samples": samples,
    }


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    entries = [
        entry("torch", [0.004, 0.002, 0.100]),
        entry("torch compiled", [0.003]),
        entry("lmengine cpu", [0.001, 0.0015, 0.002]),
        entry("torch", [0.008], shape="b4"),
        entry("lmengine cpu", [0.001], shape="b4"),
    ]
    (tmp_path / "some-cpu").mkdir()
    (tmp_path / "some-cpu" / "attention.json").write_text(json.dumps({"entries": entries}))
    return tmp_path


def test_a_ratio_is_the_fastest_torch_median_over_ours(results):
    first, second = report.read("some-cpu")["attention"]
    assert first.medians == {"torch": 0.004, "torch compiled": 0.003, "lmengine cpu": 0.0015}
    assert first.ratio("lmengine cpu") == pytest.approx(2)
    assert second.ratio("lmengine cpu") == pytest.approx(8)


def test_the_tables_and_plots(results, capsys):
    assert report.main([]) == 0
    printed = capsys.readouterr().out
    assert "1.500 (2.00)" in printed
    assert "lmengine cpu: 4.00 times PyTorch's speed (geometric mean of 2, worst 2.00, best 8.00)" in printed
    assert "times as fast as PyTorch" in (results / "some-cpu" / "attention.svg").read_text()


def test_an_unknown_device_is_an_error(results, capsys):
    assert report.main(["--device", "h100"]) == 2
    assert "--device: expected one of some-cpu, got 'h100'" in capsys.readouterr().err


def test_without_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "missing")
    assert report.main([]) == 0
    assert "There are no results" in capsys.readouterr().out
    assert report.main(["--device", "h100"]) == 2
    assert "no results are recorded yet, got 'h100'" in capsys.readouterr().err
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}\nold\n{report.END}\n")
    assert report.main(["--readme", str(readme)]) == 0
    assert "old" not in readme.read_text()


def test_the_readme_is_written_between_the_markers(results, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    assert report.main(["--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| some-cpu | attention | cpu | fp32 | forward | 4.00 | 2.00 | 2 |" in text
    readme.write_text("no markers")
    assert report.main(["--readme", str(readme)]) == 2
    assert "lacks the markers" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_figures_in_the_readme_are_the_recorded_ones(name):
    recorded = report.summary({device: report.read(device) for device in report.devices()})
    assert recorded in (ROOT / name).read_text(encoding="utf-8")
