"""The main job: from text to word vectors, two language models, a classifier, and a report of it all."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from lmengine import backends
from lmengine.data import (
    ClassificationBatches,
    Document,
    LanguageModelBatches,
    WordTokenizer,
    held_out,
    python_corpus,
    read_corpus,
)
from lmengine.embeddings import Cooccurrence, GloVe, Vectors, Vocabulary
from lmengine.files import written_aside
from lmengine.models import (
    Decoder,
    DecoderConfig,
    LanguageModel,
    RecurrentConfig,
    RecurrentLM,
    SequenceClassifier,
    load_model,
    save_model,
)
from lmengine.tasks import quickstart_report
from lmengine.tasks.generation import generate
from lmengine.tasks.quickstart_report import LANGUAGE_MODELS
from lmengine.tasks.run import Run
from lmengine.tasks.speed import measure
from lmengine.tasks.view import View
from lmengine.training import (
    History,
    Interrupted,
    TrainingConfig,
    class_scores,
    finetune,
    pretrain,
    unigram_perplexity,
)

PYTHON_PROMPTS = ("return a list of", "the following example", "raise an error if")
MAX_VALIDATION = 100_000  # tokens: enough for the perplexity's third digit
UNRECORDED = {"out", "corpus", "prompts", "kernels"}  # settings that may differ when a run goes on, or told elsewise
FUNCTION_WORDS = set(
    [
        "about",
        "after",
        "also",
        "because",
        "been",
        "before",
        "being",
        "between",
        "could",
        "does",
        "each",
        "from",
        "have",
        "into",
        "more",
        "most",
        "must",
        "only",
        "other",
        "same",
        "should",
        "some",
        "such",
        "than",
        "that",
        "their",
        "them",
        "then",
        "there",
        "these",
        "they",
        "this",
        "those",
        "through",
        "under",
        "used",
        "using",
        "very",
        "were",
        "what",
        "when",
        "where",
        "whether",
        "which",
        "while",
        "will",
        "with",
        "without",
        "would",
        "your",
    ]
)


@dataclass(frozen=True)
class Settings:
    """Sizes and lengths of the main job; the defaults take some minutes on two cores."""

    corpus: Path | None = None
    """A text file or a folder of text, UTF-8. Left out: the texts that this Python carries."""
    out: Path = Path("runs/quickstart")
    """The folder for everything that comes out."""
    seed: int = 0
    """Of all that is random. The same seed on the same backend gives the same numbers."""
    errors: Literal["strict", "replace"] = "strict"
    """What to do with bytes that are not UTF-8: stop, or read them as U+FFFD."""
    vocabulary_size: int = 8000
    """Words that get a vector, the most frequent ones."""
    dim: int = 128
    """Size of a word vector, and of the models' embeddings."""
    window_size: int = 10
    """Words at most so far apart co-occur."""
    glove_epochs: int = 20
    """How often GloVe goes over the counts."""
    lm_steps: int = 1000
    """Batches that each language model learns from."""
    batch_size: int = 32
    """Windows a batch."""
    length: int = 64
    """Words a window."""
    classifier_epochs: int = 5
    """How often the classifier goes over its texts."""
    max_classes: int = 10
    """Classes that the classifier tells apart, the largest ones."""
    kernels: bool = True
    """Measure the kernels beside PyTorch's operators, some ten seconds."""
    prompts: tuple[str, ...] = ()
    """What the language models are to go on with. Left out: beginnings of texts."""

    def __post_init__(self) -> None:
        for name, least in {
            "vocabulary_size": 10, "dim": 4, "window_size": 1, "glove_epochs": 1, "lm_steps": 1, "batch_size": 1,
            "length": 2, "classifier_epochs": 1, "max_classes": 2, "seed": 0,
        }.items():  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.dim % 64:
            raise ValueError(f"dim: expected a multiple of 64 (4 heads of at least 16), got {self.dim}")
        if self.length > 1024:
            raise ValueError(f"length: expected at most 1024, got {self.length}")


@dataclass
class Corpus:
    """The text, numbered and cut into what is learned from and what is held out."""

    documents: list[Document]
    is_held_out: list[bool]
    tokenizer: WordTokenizer
    train: Tensor  # (tokens,), the prose that is learned from, texts one after another
    validation: Tensor  # (tokens,), the prose that is held out, or the beginning of it
    facts: dict[str, Any] = field(default_factory=dict)


def open_job(settings: Settings, view: View | None = None, should_stop: Callable[[], bool] = lambda: False) -> Job:
    """Read the text, and what `settings.out` holds of an earlier run; `Job.finish` does the work.

    Raises:
        OSError: the corpus is missing or cannot be read.
        ValueError: the corpus is not UTF-8 or too small, or `out` holds something else.
    """
    view = view or View()
    if settings.out.exists() and not settings.out.is_dir():
        raise NotADirectoryError(f"out: expected a folder, got the file {str(settings.out)!r}")
    documents, fingerprint = read_documents(settings, view)
    given = {name: value for name, value in asdict(settings).items() if name not in UNRECORDED}
    given |= {"text": fingerprint, "prompts": list(settings.prompts), "backend": backends.forced_backend() or "auto"}
    run = Run(settings.out, given, view, should_stop)
    return Job(settings, run, prepare(documents, settings, view))


def read_documents(settings: Settings, view: View) -> tuple[list[Document], str]:
    """The documents, and a fingerprint of them that tells whether a run goes on with the same text."""
    with view.progress("reading", 0, "files") as advance:
        note = lambda done, total: advance(done, total=total)  # noqa: E731
        if settings.corpus is None:
            documents = python_corpus(note)
        else:
            documents = read_corpus(settings.corpus, settings.errors, note)
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.name}\0{document.text}\0".encode("utf-8", "surrogatepass"))
    return documents, digest.hexdigest()[:16]


def prepare(documents: list[Document], settings: Settings, view: View) -> Corpus:
    """Hold out a tenth of the documents, count the words of the others, and number all."""
    out = held_out(len(documents), settings.seed)
    learned = [document.text for document, held in zip(documents, out, strict=True) if not held]
    vocabulary = Vocabulary.from_texts(
        view.track(learned, "counting words", len(learned), "texts"), min_count=2, max_size=settings.vocabulary_size
    )
    tokenizer = WordTokenizer(vocabulary.tokens)
    prose = [(d.text, held) for d, held in zip(documents, out, strict=True) if d.prose]
    train = tokenizer.encode_stream(text for text, held in prose if not held)
    validation = tokenizer.encode_stream(text for text, held in prose if held)[:MAX_VALIDATION]
    least = 4 * settings.length
    if len(train) <= least or len(validation) < 2:
        raise ValueError(
            f"corpus: expected more than {least} words to learn from and some to hold out, got {len(train)} and "
            f"{len(validation)}: the text is too short"
        )
    facts = {
        "source": "this Python's documentation and library" if settings.corpus is None else str(settings.corpus),
        "documents": len(documents),
        "held_out_documents": sum(out),
        "characters": sum(len(document.text) for document in documents),
        "vocabulary": len(vocabulary),
        "words": sum(vocabulary.counts),
        "prose_tokens": len(train),
        "validation_tokens": len(validation),
        "unknown_share": (validation == tokenizer.unknown).double().mean().item(),
    }
    return Corpus(documents, out, tokenizer, train, validation, facts)


@dataclass
class Job:
    """The stages. What one leaves for the next lies in files of the run folder."""

    settings: Settings
    run: Run
    corpus: Corpus

    def finish(self) -> Path:
        """Do all that is left, and return the path of the report.

        Raises:
            Interrupted: `should_stop` said so; the same call goes on from there.
        """
        run = self.run
        run.stage("corpus", "Text", self.describe_corpus)
        run.stage("vectors", "Word vectors: co-occurrence counts and GloVe", self.train_vectors)
        run.stage("lstm", "Language model: LSTM", lambda: self.train_language_model("lstm"))
        run.stage("transformer", "Language model: Transformer", lambda: self.train_language_model("transformer"))
        run.stage("classifier", "Classifier", self.train_classifier)
        run.stage("samples", "Generated text", self.write_samples)
        if self.settings.kernels:
            run.stage("kernels", "Kernels beside PyTorch", self.measure_kernels)
        return quickstart_report.write(run)

    def describe_corpus(self) -> dict[str, Any]:
        facts = self.corpus.facts
        self.run.view.say(
            f"{facts['source']}: {facts['documents']:,} documents, {facts['characters']:,} characters; "
            f"{facts['vocabulary']:,} words in the vocabulary"
        )
        self.run.view.say(
            f"{facts['prose_tokens']:,} tokens of prose to learn from, {facts['validation_tokens']:,} held out"
        )
        return facts

    # ---- word vectors ------------------------------------------------------------------------------------------

    def train_vectors(self) -> dict[str, Any]:
        settings, view = self.settings, self.run.view
        folder = self.run.folder / "vectors"
        counts = self._counts(folder / "cooccurrence.safetensors")
        glove = GloVe(len(self.corpus.tokenizer.words), settings.dim, seed=settings.seed)
        state = folder / "glove.safetensors"
        costs = _load_glove(state, glove) if state.exists() else []
        with view.progress("GloVe", settings.glove_epochs, "epochs") as advance:
            advance(len(costs))

            def after_epoch(epoch: int, cost: float) -> None:
                costs.append(cost)
                advance(epoch, note=f"cost {cost:.4f}")
                if epoch < settings.glove_epochs and self.run.should_stop():
                    _save_glove(state, glove, costs)
                    raise Interrupted(f"stopped after epoch {epoch} of {settings.glove_epochs}")

            glove.fit(counts, settings.glove_epochs - len(costs), after_epoch)
        vectors = Vectors(self.corpus.tokenizer.words, glove.vectors)
        vectors.save(folder / "vectors.txt")
        with self._events("vectors") as events:
            for epoch, cost in enumerate(costs, start=1):
                events.add_scalar("glove/cost", cost, epoch)
        for file in (state, folder / "cooccurrence.safetensors"):
            file.unlink(missing_ok=True)
        shown = words_to_show(vectors.words)
        neighbours = {word: vectors.nearest(word, 6) for word in shown}
        rows = [(word, ", ".join(near for near, _ in found)) for word, found in neighbours.items()]
        view.table("nearest neighbours", ("word", "neighbours"), rows)
        return {"entries": len(counts), "costs": costs, "neighbours": neighbours}

    def _counts(self, path: Path) -> Cooccurrence:
        if path.exists():
            return Cooccurrence.load(path)
        view, corpus = self.run.view, self.corpus
        learned = [d.text for d, held in zip(corpus.documents, corpus.is_held_out, strict=True) if not held]
        vocabulary = Vocabulary(corpus.tokenizer.words)
        pieces = [learned[begin : begin + 256] for begin in range(0, len(learned), 256)]
        encoded = (vocabulary.encode(piece, breaks="file") for piece in pieces)
        tokens = torch.cat([t for piece in encoded for t in (piece, torch.tensor([-1], dtype=torch.int32))])
        with view.progress("counting pairs", len(tokens), "tokens") as advance:
            counts = Cooccurrence.from_tokens(tokens, len(vocabulary), self.settings.window_size, callback=advance)
        counts.save(path)
        view.say(f"{len(counts):,} pairs of words co-occur, in {len(tokens):,} tokens")
        return counts

    # ---- language models ---------------------------------------------------------------------------------------

    def train_language_model(self, name: str) -> dict[str, Any]:
        settings, corpus, view = self.settings, self.corpus, self.run.view
        torch.manual_seed(settings.seed)
        model = self._new_model(name)
        vectors = Vectors.load(self.run.folder / "vectors" / "vectors.txt")
        first = len(corpus.tokenizer) - len(vectors)
        model.start_from_vectors(vectors.array, torch.arange(first, len(corpus.tokenizer)))
        batch_size = min(settings.batch_size, (len(corpus.train) - 1) // settings.length)
        batches = LanguageModelBatches(corpus.train, batch_size, settings.length)
        config = TrainingConfig(
            settings.lm_steps,
            learning_rate={"lstm": 4e-3, "transformer": 2e-3}[name],
            warmup=min(100, settings.lm_steps // 10),
            evaluate_every=max(1, settings.lm_steps // 10),
            checkpoint_every=max(1, settings.lm_steps // 5),
            seed=settings.seed,
        )
        history = self._train(name, pretrain, model, batches, corpus.validation, config, "perplexity")
        save_model(self.run.folder / name, model, corpus.tokenizer)
        unigram = unigram_perplexity(corpus.train, corpus.validation, len(corpus.tokenizer))
        perplexity = history.evaluations[-1][1]["perplexity"]
        view.say(f"validation perplexity {perplexity:.1f}; that of a unigram model is {unigram:.1f}")
        (self.run.folder / name / "training.safetensors").unlink()
        return {
            "perplexity": perplexity,
            "unigram_perplexity": unigram,
            "parameters": sum(p.numel() for p in model.parameters()),
            **asdict(history),
        }

    def _new_model(self, name: str) -> LanguageModel:
        size, dim = len(self.corpus.tokenizer), self.settings.dim
        if name == "lstm":
            return RecurrentLM(RecurrentConfig(size, dim, hidden_size=2 * dim))
        return Decoder(DecoderConfig(size, dim, context=max(128, self.settings.length)))

    def _train(
        self, name: str, train: Callable[..., History], model: Any, data: Any, held: Any, config: TrainingConfig,
        shown: str,
    ) -> History:  # fmt: skip
        """Train with a progress bar, a checkpoint and TensorBoard events."""
        with self.run.view.progress("training", config.steps, "steps") as advance:
            latest = ""

            def on_step(step: int, loss: float) -> None:
                advance(step, note=f"loss {loss:.3f}{latest}")

            def on_evaluation(step: int, result: dict[str, float]) -> None:
                nonlocal latest
                latest = f", {shown} {result[shown]:.4g}"
                advance(step, note=latest.removeprefix(", "))

            checkpoint = self.run.folder / name / "training.safetensors"
            options: dict[str, Any] = dict(on_step=on_step, on_evaluation=on_evaluation)
            history = train(
                model, data, held, config, checkpoint=checkpoint, should_stop=self.run.should_stop, **options
            )
        with self._events(name) as events:
            for step, loss in history.losses:
                events.add_scalar("loss/train", loss, step)
            for step, result in history.evaluations:
                events.add_scalar("loss/validation", result["loss"], step)
                events.add_scalar(shown, result[shown], step)
        return history

    def _events(self, name: str) -> SummaryWriter:
        folder = self.run.folder / "tensorboard" / name
        for old in folder.glob("events.*"):  # of a stage that was cut off while it wrote them
            old.unlink()
        return SummaryWriter(str(folder))

    # ---- classifier --------------------------------------------------------------------------------------------

    def train_classifier(self) -> dict[str, Any]:
        settings, corpus, view = self.settings, self.corpus, self.run.view
        labelled = [
            (d, held) for d, held in zip(corpus.documents, corpus.is_held_out, strict=True) if d.prose and d.label
        ]
        tests, trains = (Counter(d.label for d, held in labelled if held is side) for side in (True, False))
        enough = [(label, count) for label, count in trains.most_common() if label and count >= 8 and tests[label] >= 1]
        labels = sorted(label for label, _ in enough[: settings.max_classes])
        if len(labels) < 2:
            reason = "the text has no two labels of 8 documents or more (a folder's files or subfolders are labels)"
            view.say(f"left out: {reason}")
            return {"left_out": reason}
        chosen = min(LANGUAGE_MODELS, key=lambda name: self.run.stages[name]["perplexity"])
        backbone, tokenizer = load_model(self.run.folder / chosen)
        assert isinstance(backbone, LanguageModel)
        torch.manual_seed(settings.seed)
        model = SequenceClassifier(backbone, labels, tokenizer.pad)

        def batches(held: bool) -> ClassificationBatches:
            found = [d for d, h in labelled if h is held and d.label in labels]
            end = torch.tensor([tokenizer.end])
            texts = [torch.cat((tokenizer.encode(d.text)[:127], end)) for d in found]
            classes = torch.tensor([labels.index(d.label or "") for d in found])
            return ClassificationBatches(texts, classes, 32, 128, tokenizer.pad)

        train, test = batches(False), batches(True)
        steps = settings.classifier_epochs * len(train)
        config = TrainingConfig(
            steps, learning_rate=1e-3, warmup=max(1, steps // 10), evaluate_every=len(train),
            checkpoint_every=max(1, steps // 3), seed=settings.seed,
        )  # fmt: skip
        history = self._train("classifier", finetune, model, train, test, config, "accuracy")
        save_model(self.run.folder / "classifier", model, tokenizer)
        accuracy = history.evaluations[-1][1]["accuracy"]
        majority = int(train.labels.bincount(minlength=len(labels)).argmax())
        baseline = (test.labels == majority).double().mean().item()
        view.say(
            f"test accuracy {accuracy:.1%} over {len(labels)} classes and {len(test.texts)} texts; always saying "
            f"{labels[majority]!r} gets {baseline:.1%}"
        )
        said = class_scores(model, test).argmax(1)
        confusion = torch.bincount(test.labels * len(labels) + said, minlength=len(labels) ** 2)
        (self.run.folder / "classifier" / "training.safetensors").unlink()
        return {
            "backbone": chosen,
            "accuracy": accuracy,
            "majority_accuracy": baseline,
            "labels": labels,
            "train_texts": len(train.texts),
            "test_texts": len(test.texts),
            "confusion": confusion.view(len(labels), len(labels)).tolist(),
            **asdict(history),
        }

    # ---- text, kernels, report -----------------------------------------------------------------------------------

    def write_samples(self) -> dict[str, Any]:
        prompts = list(self.settings.prompts) or (
            list(PYTHON_PROMPTS) if self.settings.corpus is None else self._beginnings()
        )
        samples = []
        for name in LANGUAGE_MODELS:
            model, tokenizer = load_model(self.run.folder / name)
            assert isinstance(model, LanguageModel)
            for number, prompt in enumerate(prompts):
                text = generate(model, tokenizer, prompt, seed=self.settings.seed + number)
                samples.append({"model": name, "prompt": prompt, "text": text})
                self.run.view.say(f"{LANGUAGE_MODELS[name]}: {text}")
        return {"samples": samples}

    def _beginnings(self) -> list[str]:
        """The first words of some texts that were held out."""
        held = [d.text for d, h in zip(self.corpus.documents, self.corpus.is_held_out, strict=True) if h and d.prose]
        return [WordTokenizer.join(WordTokenizer.split(text)[:4]) for text in held[:3]]

    def measure_kernels(self) -> dict[str, Any]:
        with self.run.view.progress("measuring", 0, "kernels") as advance:
            measured = measure(progress=lambda done, total, name: advance(done, total=total, note=name))
        rows = [
            (f"{kernel.family}, {kernel.direction}", kernel.shape, f"{kernel.ratio:.2f} x PyTorch's speed")
            for kernel in measured
        ]
        self.run.view.table("", ("kernel", "shape", ""), rows)
        return {"kernels": [asdict(kernel) for kernel in measured]}


def words_to_show(words: list[str], count: int = 8) -> list[str]:
    """The most frequent words that mean something by themselves, as far as their letters tell."""

    def tells(word: str) -> bool:
        han = "\u4e00" <= word <= "\u9fff"
        return han or (len(word) >= 5 and word.isalpha() and word not in FUNCTION_WORDS)

    return [word for word in words if tells(word)][:count]


def _save_glove(path: Path, glove: GloVe, costs: list[float]) -> None:
    tensors = {"parameters": glove.parameters, "squared_gradients": glove.squared_gradients}
    with written_aside(path) as aside:
        safetensors.torch.save_file(tensors, aside, {"costs": json.dumps(costs)})


def _load_glove(path: Path, glove: GloVe) -> list[float]:
    """Put a state that `_save_glove` wrote into `glove`, and return the costs of its epochs."""
    with safetensors.safe_open(path, "pt") as file:
        costs = [float(cost) for cost in json.loads(file.metadata()["costs"])]
        state = glove.state_dict() | {name: file.get_tensor(name) for name in ("parameters", "squared_gradients")}
    glove.load_state_dict(state | {"epoch": len(costs)})
    return costs
