"""Models on disk: a folder with config.json, model.safetensors and the tokenizer's words.json. No pickle."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from lmengine.data import WordTokenizer
from lmengine.files import PathLike, written_aside
from lmengine.models.classifier import SequenceClassifier
from lmengine.models.decoder import Decoder, DecoderConfig
from lmengine.models.language_model import LanguageModel
from lmengine.models.recurrent import RecurrentConfig, RecurrentLM

ARCHITECTURES: dict[str, tuple[type[Any], type[Any]]] = {
    "RecurrentLM": (RecurrentLM, RecurrentConfig),
    "Decoder": (Decoder, DecoderConfig),
}


def save_model(folder: PathLike, model: torch.nn.Module, tokenizer: WordTokenizer) -> None:
    """Write a model and its tokenizer to a folder, each file aside first and moved into place."""
    target = Path(folder)
    tokenizer.save(target / "words.json")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with written_aside(target / "model.safetensors") as aside:
        safetensors.torch.save_file(tensors, aside)
    with written_aside(target / "config.json") as aside:
        aside.write_text(json.dumps(_describe(model), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_model(folder: PathLike) -> tuple[torch.nn.Module, WordTokenizer]:
    """Read what `save_model` wrote; the model comes in evaluation mode.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file holds something else; the message names it and what is wrong.
    """
    source = Path(folder)
    for name in ("config.json", "model.safetensors", "words.json"):
        if not (source / name).is_file():
            raise FileNotFoundError(f"folder: expected a model, but {source / name} is missing")
    tokenizer = WordTokenizer.load(source / "words.json")
    try:
        model = _build(json.loads((source / "config.json").read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{source / 'config.json'}: not the configuration of a model: {error!r}") from error
    try:
        model.load_state_dict(safetensors.torch.load_file(source / "model.safetensors"))
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise ValueError(f"{source / 'model.safetensors'}: not the parameters of this model: {error}") from error
    return model.eval(), tokenizer


def _describe(model: torch.nn.Module) -> dict[str, Any]:
    if isinstance(model, SequenceClassifier):
        head = {"labels": model.labels, "pad": model.pad, "dropout": model.dropout}
        return {"architecture": "SequenceClassifier", **head, "backbone": _describe(model.backbone)}
    if type(model).__name__ not in ARCHITECTURES:
        known = ", ".join([*ARCHITECTURES, "SequenceClassifier"])
        raise TypeError(f"model: expected one of {known}, got {type(model).__name__}")
    return {"architecture": type(model).__name__, **asdict(model.config)}  # type: ignore[call-overload]


def _build(description: dict[str, Any]) -> torch.nn.Module:
    rest = {key: value for key, value in description.items() if key != "architecture"}
    if description["architecture"] == "SequenceClassifier":
        backbone = _build(rest.pop("backbone"))
        if not isinstance(backbone, LanguageModel):
            raise ValueError("backbone: expected a language model")
        return SequenceClassifier(backbone, **rest)
    model, config = ARCHITECTURES[description["architecture"]]
    return model(config(**rest))
