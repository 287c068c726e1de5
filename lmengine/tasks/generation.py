"""Text from a language model, token by token."""

from __future__ import annotations

import torch

from lmengine.data import WordTokenizer
from lmengine.models import LanguageModel


@torch.no_grad()
def generate(
    model: LanguageModel,
    tokenizer: WordTokenizer,
    prompt: str,
    max_tokens: int = 40,
    temperature: float = 0.8,
    top_k: int = 40,
    seed: int = 0,
) -> str:
    """Go on with a text.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        prompt: how the text begins; may be empty.
        max_tokens: stop after so many new tokens, or at the end of the text.
        temperature: scores are divided by it; 0 takes the likeliest token always.
        top_k: choose among the so many likeliest tokens. Unknown words are never chosen.
        seed: of the choice.

    Returns:
        The prompt and what follows it, as the tokenizer writes text.

    Raises:
        ValueError: an argument is out of its range.
    """
    if max_tokens < 0:
        raise ValueError(f"max_tokens: expected at least 0, got {max_tokens}")
    if not temperature >= 0:
        raise ValueError(f"temperature: expected at least 0, got {temperature}")
    if top_k < 1:
        raise ValueError(f"top_k: expected at least 1, got {top_k}")
    generator = torch.Generator().manual_seed(seed)
    device = model.output_bias.device
    start = torch.tensor([tokenizer.end])  # a text begins where another ended
    written = tokenizer.encode(prompt)
    scores, state = model.step(torch.cat((start, written))[None].to(device))
    words = tokenizer.split(prompt)
    for _ in range(max_tokens):
        allowed = scores[0].float().cpu()
        allowed[[tokenizer.pad, tokenizer.unknown]] = -torch.inf
        best = allowed.topk(min(top_k, len(allowed) - 2))
        if temperature == 0:
            token = int(best.indices[0])
        else:
            chances = (best.values / temperature).softmax(0)
            token = int(best.indices[torch.multinomial(chances, 1, generator=generator)])
        if token == tokenizer.end:
            break
        words.append(tokenizer.word(token))
        scores, state = model.step(torch.tensor([[token]], device=device), state)
    return tokenizer.join(words)
