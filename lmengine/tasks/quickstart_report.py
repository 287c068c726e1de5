"""The report of the main job: what its stages have found, put into words and charts."""

from __future__ import annotations

import resource
import statistics
from pathlib import Path
from typing import Any

from lmengine import backends
from lmengine.embeddings import Vectors
from lmengine.tasks.charts import Chart, Curve
from lmengine.tasks.report import Classification, Headline, Report, Sample, WordVectors, write_report
from lmengine.tasks.run import Run
from lmengine.tasks.speed import KernelSpeed

LANGUAGE_MODELS = {"lstm": "LSTM", "transformer": "Transformer"}
STAGES = {
    "corpus": "Text",
    "vectors": "Word vectors",
    "lstm": "LSTM",
    "transformer": "Transformer",
    "classifier": "Classifier",
    "samples": "Generated text",
    "kernels": "Kernels beside PyTorch",
}
MAPPED_WORDS = 150


def write(run: Run) -> Path:
    """Write the report of a run whose stages are done into its folder, and return its path."""
    stages = run.stages
    vectors = Vectors.load(run.folder / "vectors" / "vectors.txt")
    telling = [row for row, word in enumerate(vectors.words) if len(word) > 2 or "\u4e00" <= word <= "\u9fff"]
    mapped = telling[:MAPPED_WORDS]
    classifier = stages["classifier"]
    return write_report(
        run.folder,
        Report(
            title="From text to trained models",
            about=f"Word vectors, two language models and a classifier, trained on {stages['corpus']['source']}.",
            facts=_facts(run),
            stages=[(STAGES[name], result["seconds"]) for name, result in stages.items()],
            headlines=_headlines(stages),
            charts=_charts(stages),
            neighbours=list(stages["vectors"]["neighbours"].items()),
            word_map=WordVectors([vectors.words[row] for row in mapped], vectors.array[mapped]),
            classification=None
            if "left_out" in classifier
            else Classification(
                classifier["labels"],
                classifier["confusion"],
                f"Fine-tuned from the {LANGUAGE_MODELS[classifier['backbone']]}, on {classifier['train_texts']:,} texts.",
            ),
            samples=[Sample(LANGUAGE_MODELS[s["model"]], s["prompt"], s["text"]) for s in stages["samples"]["samples"]],
            kernels=[KernelSpeed(**kernel) for kernel in stages.get("kernels", {}).get("kernels", [])],
        ),
    )


def _facts(run: Run) -> list[tuple[str, str]]:
    corpus, machine = run.stages["corpus"], backends.info()
    return [
        ("corpus", corpus["source"]),
        ("documents", f"{corpus['documents']:,}, {corpus['held_out_documents']:,} of them held out"),
        ("words", f"{corpus['words']:,} learned from, {corpus['vocabulary']:,} different ones in the vocabulary"),
        ("prose", f"{corpus['prose_tokens']:,} tokens learned from, {corpus['validation_tokens']:,} held out"),
        ("unknown words", f"{corpus['unknown_share']:.2%} of the held-out prose"),
        ("co-occurrence counts", f"{run.stages['vectors']['entries']:,}"),
        ("seed", str(run.settings["seed"])),
        ("backend", run.settings["backend"]),
        (
            "machine",
            f"{machine['processor']}, {machine['threads']} threads, {machine['instruction set'] or 'no kernels'}",
        ),
        ("memory", f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB at most"),
        ("GPUs", ", ".join(machine["GPUs"]) or "none"),
        ("versions", f"lmengine {machine['lmengine']}, PyTorch {machine['torch']}, Python {machine['python']}"),
    ]


def _headlines(stages: dict[str, dict[str, Any]]) -> list[Headline]:
    found = [
        Headline(
            f"Validation perplexity, {LANGUAGE_MODELS[name]}",
            f"{stages[name]['perplexity']:.1f}",
            f"unigram model: {stages[name]['unigram_perplexity']:.1f}",
        )
        for name in LANGUAGE_MODELS
    ]
    classifier = stages["classifier"]
    if "left_out" not in classifier:
        found.append(
            Headline(
                "Test accuracy, classifier",
                f"{classifier['accuracy']:.1%}",
                f"majority class: {classifier['majority_accuracy']:.1%}",
            )
        )
    ratios = [kernel["ratio"] for kernel in stages.get("kernels", {}).get("kernels", [])]
    if ratios:
        mean = statistics.geometric_mean(ratios)
        between = f"times PyTorch's speed; from {min(ratios):.1f} to {max(ratios):.1f}"
        found.append(Headline("Kernels, geometric mean", f"{mean:.1f}", between))
    return found


def _charts(stages: dict[str, dict[str, Any]]) -> list[Chart]:
    charts = [Chart("GloVe", "epoch", "cost", [Curve("cost", list(enumerate(stages["vectors"]["costs"], start=1)))])]
    for name in (*LANGUAGE_MODELS, "classifier"):
        if "losses" in stages[name]:
            validation = [(step, result["loss"]) for step, result in stages[name]["evaluations"]]
            curves = [Curve("training", stages[name]["losses"]), Curve("held out", validation)]
            charts.append(Chart(STAGES[name], "step", "cross-entropy", curves))
    return charts
