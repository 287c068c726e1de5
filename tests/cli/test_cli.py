"""The command line: exit status 2 and one clear line for a user's mistake, 130 when interrupted, never a traceback."""

import io
import json
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from lmengine.cli import main

QUICK = [
    "--vocabulary-size",
    "50",
    "--dim",
    "64",
    "--window-size",
    "3",
    "--glove-epochs",
    "2",
    "--batch-size",
    "4",
    "--length",
    "8",
    "--classifier-epochs",
    "1",
    "--no-kernels",
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """The default run folder is relative, and may hold a run where the tests are started."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for label in ("one", "two"):
        lines = [f"{label} {n % 7} and {n % 11} are {label} {n % 5} words [b]of[/b] text." for n in range(600)]
        (folder / f"{label}.txt").write_text("\n".join(lines))
    return folder


def test_info(capsys):
    assert main(["info"]) == 0
    assert "reference" in capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["backends"]["reference"] == "usable"
    assert set(found["backends"]) == {"cuda", "triton", "cpu", "reference"}


def test_trains_and_tells_what_it_found(corpus, tmp_path, capsys, monkeypatch):
    arguments = ["quickstart", "--corpus", str(corpus), "--out", str(tmp_path / "run"), "--lm-steps", "5", *QUICK]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for told in ("nearest neighbours", "validation perplexity", "unigram", "test accuracy", "report.html"):
        assert told in printed
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("done before") == 6

    model, classifier = str(tmp_path / "run" / "lstm"), str(tmp_path / "run" / "classifier")
    assert main(["generate", model, "One 1 and", "--max-tokens", "4", "--temperature", "0"]) == 0
    written = capsys.readouterr().out
    assert written.startswith("one 1 and ") and 4 <= len(written.split()) <= 7
    assert main(["classify", classifier, "one 3 are", "two"]) == 0
    assert [line.split("\t")[0] in ("one", "two") for line in capsys.readouterr().out.splitlines()] == [True, True]
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\nthree\n"))
    assert main(["classify", classifier]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    for wrong, told in (
        (["generate", classifier, "x"], "model: expected a language model"),
        (["classify", model, "x"], "model: expected a classifier"),
        (["generate", str(corpus), "x"], "config.json is missing"),
        (["generate", model, "x", "--top-k", "0"], "top_k: expected at least 1, got 0"),
    ):
        assert main(wrong) == 2
        assert told in capsys.readouterr().err

    assert main([*arguments, "--seed", "1"]) == 2
    assert (
        "holds a run with seed 0 and not 1: give --restart to replace it, or another --out" in capsys.readouterr().err
    )
    assert main([*arguments, "--seed", "1", "--restart"]) == 0
    assert "done before" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--corpus", "/does/not/exist"], "there is no file or folder '/does/not/exist'"),
        (["--corpus", "BAD"], "is not UTF-8: byte 0xff at offset 3"),
        (["--corpus", "SHORT"], "the text is too short"),
        (["--corpus", "EMPTY"], "there is no file in"),
        (["--corpus", "SHORT", "--out", "BAD"], "out: expected a folder, got the file"),
        (["--restart", "--out", "FULL"], "is not a run of this command (it has no metrics.json): nothing was removed"),
        (["--dim", "100"], "dim: expected a multiple of 64"),
        (["--seed", "many"], "many"),
        (["--unheard-of"], "--unheard-of"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments, told, tmp_path, capsys):
    (tmp_path / "BAD").write_bytes(b"abc\xff")
    (tmp_path / "SHORT").write_text("a few words only")
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "precious").write_text("kept")
    names = ("BAD", "SHORT", "EMPTY", "FULL")
    given = [str(tmp_path / argument) if argument in names else argument for argument in arguments]
    try:
        status = main(["quickstart", *given])
    except SystemExit as stop:  # the parser's
        status = stop.code
    printed = capsys.readouterr()
    assert status == 2
    assert told.split()[0] in printed.err and "Traceback" not in printed.err
    assert " ".join(told.split()) in " ".join(printed.err.replace("│", " ").split())
    assert (tmp_path / "FULL" / "precious").read_text() == "kept"


@pytest.mark.parametrize(
    ("backend", "told"),
    [
        ("abacus", "LMENGINE_BACKEND: expected one of auto, cuda, triton, cpu, reference, got 'abacus'"),
        pytest.param(
            "cuda",
            "LMENGINE_BACKEND: 'cuda' cannot be used here: ",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_a_wrong_backend_is_told(backend, told):
    command = [sys.executable, "-m", "lmengine", "quickstart"]
    environment = {**os.environ, "LMENGINE_BACKEND": backend}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"lmengine: {told}") and done.stderr.count("\n") == 1


def test_ctrl_c_stops_and_the_same_command_goes_on(corpus, tmp_path):
    command = [sys.executable, "-u", "-m", "lmengine", "quickstart", "--corpus", str(corpus), "--out",
               str(tmp_path / "run"), "--lm-steps", "5000", *QUICK]  # fmt: skip

    def run_and_interrupt(number):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        giving_up = threading.Timer(120, process.kill)
        giving_up.start()
        printed = []
        for line in process.stdout:
            printed.append(line)
            if "Language model: LSTM" in line:
                threading.Timer(1.0, process.send_signal, [number]).start()  # in the middle of training
        status = process.wait()
        giving_up.cancel()
        assert status == 130, "".join(printed)
        assert "stopped after step" in printed[-1] and "The same command goes on from there." in printed[-1]
        assert "Traceback" not in "".join(printed)
        return "".join(printed)

    checkpoint = tmp_path / "run" / "lstm" / "training.safetensors"
    assert "done before" not in run_and_interrupt(signal.SIGINT)
    stages = json.loads((tmp_path / "run" / "metrics.json").read_text())["stages"]
    assert list(stages) == ["corpus", "vectors"]
    first = checkpoint.read_bytes()
    assert run_and_interrupt(signal.SIGTERM).count("done before") == 2
    assert checkpoint.read_bytes() != first
