"""A map of word vectors in the plane: t-SNE (van der Maaten and Hinton 2008), and places for labels that keep apart.

n: words, D: size of a vector.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

import numpy as np
from torch import Tensor


def tsne(vectors: Tensor, perplexity: float = 12.0, steps: int = 750) -> np.ndarray:
    """Places in the plane where near neighbours of `vectors`, by cosine, stay near: (n, 2) float64 from (n, D).

    The exact method, for up to some thousand points. It starts from the two principal components, so that the same
    vectors always give the same map.
    """
    points = vectors.detach().cpu().double().numpy()
    count = len(points)
    unit = points / np.linalg.norm(points, axis=1, keepdims=True).clip(min=1e-12)
    places = _principal_components(unit)
    if count < 4:
        return places
    joint = _joint_probabilities(2 - 2 * unit @ unit.T, min(perplexity, (count - 1) / 3))
    places *= 1e-4 / max(places.std(), 1e-12)
    velocity, gains = np.zeros_like(places), np.ones_like(places)
    for step in range(steps):
        early = step < steps // 3
        near = 1 / (1 + _squared_distances(places))
        np.fill_diagonal(near, 0)
        pull = ((12.0 if early else 1.0) * joint - near / near.sum()) * near  # (n, n)
        gradient = 4 * (pull.sum(1, keepdims=True) * places - pull @ places)
        same = np.sign(gradient) == np.sign(velocity)
        gains = np.where(same, gains * 0.8, gains + 0.2).clip(min=0.01)
        velocity = (0.5 if early else 0.8) * velocity - max(count / 12, 50) * gains * gradient
        places = places + velocity
        places -= places.mean(0)
    return places


def _squared_distances(places: np.ndarray) -> np.ndarray:
    return ((places[:, None] - places[None]) ** 2).sum(2)


def _principal_components(vectors: np.ndarray) -> np.ndarray:
    left, size, right = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    places = left[:, :2] * size[:2]
    largest = np.take_along_axis(right[:2], np.abs(right[:2]).argmax(1)[:, None], 1)[:, 0]
    places = places * np.where(largest < 0, -1, 1)  # SVD leaves the signs open
    return np.pad(places, ((0, 0), (0, 2 - places.shape[1])))


def _joint_probabilities(squared_distances: np.ndarray, perplexity: float) -> np.ndarray:
    """The width of each point's Gaussian by bisection, so that the entropy of its neighbours is log(perplexity)."""
    count = len(squared_distances)
    precision, low, high = (np.full((count, 1), value) for value in (1.0, 0.0, np.inf))
    conditional = np.zeros_like(squared_distances)
    for _ in range(60):
        logits = -squared_distances * precision
        np.fill_diagonal(logits, -np.inf)
        conditional = np.exp(logits - logits.max(1, keepdims=True))
        conditional /= conditional.sum(1, keepdims=True)
        entropy = -(conditional * np.log(conditional.clip(min=1e-300))).sum(1, keepdims=True)
        wide = entropy > math.log(perplexity)
        low, high = np.where(wide, precision, low), np.where(wide, high, precision)
        precision = np.minimum(np.where(np.isinf(high), precision * 2, (low + high) / 2), 1e6)
    return ((conditional + conditional.T) / (2 * count)).clip(min=1e-12)


def text_width(text: str) -> float:
    """The width of a text in ems, about: Chinese, Japanese and Korean characters are twice as wide as others."""
    return sum(1.0 if unicodedata.east_asian_width(letter) in "WF" else 0.56 for letter in text)


def place_labels(places: np.ndarray, labels: Sequence[str], width: float, height: float, size: float) -> np.ndarray:
    """Places for labels on a canvas: as the points lie, but pushed apart where they would overlap.

    Args:
        places: (n, 2).
        labels: n texts, of `size` points each.
        width, height: of the canvas, in points.

    Returns:
        the middles of the labels, (n, 2), y upwards.
    """
    half = np.array([[text_width(label) * size / 2 + 3, size * 0.62] for label in labels])
    canvas = np.array([width, height])
    margin = np.minimum(half.max(0) + size, canvas / 3)
    low, high = places.min(0), places.max(0)
    middles = margin + (places - low) / (high - low).clip(min=1e-9) * (canvas - 2 * margin)
    reach = half[:, None] + half[None]  # (n, n, 2)
    number = np.arange(len(labels))
    turn = np.sign(number[:, None] - number[None])[..., None]  # which way two labels of one place part
    for _ in range(1500):
        apart = middles[:, None] - middles[None]
        overlap = reach - np.abs(apart)
        hit = (overlap > 0).all(2)
        np.fill_diagonal(hit, False)
        if not hit.any():
            break
        sign = np.where(apart == 0, turn, np.sign(apart))
        upwards = overlap[..., 0] / reach[..., 0] > overlap[..., 1] / reach[..., 1]  # where they are apart already
        axis = np.stack([~upwards, upwards], axis=2)
        push = (overlap * sign * axis * hit[..., None]).sum(1)
        middles = middles + 0.2 * push.clip(-size, size)
        middles = np.minimum(np.maximum(middles, half), np.maximum(canvas - half, half))
    return middles
