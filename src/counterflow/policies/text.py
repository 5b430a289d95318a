"""Words as numbers: a fixed hashed embedding, the same on every machine, or a frozen sentence encoder.

The hashed one gives every word, and every pair of neighbours, a direction of its own, drawn from its hash, and adds them up:
texts that share words lie near each other ("black bowl", "white bowl"), and the pairs tell "bowl on plate" from "plate on
bowl". It knows no synonyms. Hashing words: Weinberger et al., arXiv 0902.2206.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from counterflow.checks import COUNT
from counterflow.errors import InvalidInputError, MissingDependencyError

HASHED = "hashed"
TRANSFORMERS = "transformers:"
PAIR = 0.5  # how much a pair of neighbours counts beside a word


def embed_texts(texts: Sequence[str], dim: int, encoder: str = HASHED) -> Tensor:
    """Embed texts as (N, dim), each with entries of variance about 1; an empty text is zero.

    Args:
        texts: N of them, any language; upper case and punctuation don't count in the hashed embedding.
        dim: how many numbers.
        encoder: "hashed", or "transformers:" and the folder or hub id of a sentence encoder (extra `lerobot` brings the library);
            its mean over the tokens is projected to `dim` numbers by a fixed random matrix.

    Raises:
        InvalidInputError: no such encoder, or a dimension that is not positive.
        MissingDependencyError: the encoder's library or weights are missing.
    """
    COUNT.check("the size of a text's embedding", dim)
    if encoder == HASHED:
        return torch.from_numpy(np.stack([_hashed(text, dim) for text in texts])) if texts else torch.zeros(0, dim)
    if encoder.startswith(TRANSFORMERS) and len(encoder) > len(TRANSFORMERS):
        return _encoded(tuple(texts), dim, encoder.removeprefix(TRANSFORMERS))
    raise InvalidInputError(
        f"the text encoder is {encoder!r}; expected 'hashed', or 'transformers:' and the folder of a sentence encoder."
    )


def _hashed(text: str, dim: int) -> npt.NDArray[np.float32]:
    words = re.findall(r"\w+", text.lower())
    total = np.zeros(dim)
    for word in words:
        total += _direction(word, dim)
    for pair in pairwise(words):
        total += PAIR * _direction(" ".join(pair), dim)
    length = np.linalg.norm(total)
    return (total if length == 0 else total * np.sqrt(dim) / length).astype(np.float32)


@lru_cache(maxsize=4096)
def _direction(token: str, dim: int) -> npt.NDArray[np.float64]:
    """Return a token's direction (dim,): normal numbers seeded by its hash."""
    seed = int.from_bytes(hashlib.sha256(token.encode()).digest()[:8], "little")
    direction: npt.NDArray[np.float64] = np.random.default_rng(seed).normal(size=dim)
    return direction


@lru_cache(maxsize=8)
def _encoded(texts: tuple[str, ...], dim: int, place: str) -> Tensor:
    try:
        from transformers import AutoModel, AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(place)
        model: Any = AutoModel.from_pretrained(place).eval()
    except ImportError as error:
        raise MissingDependencyError(
            f"a sentence encoder needs transformers ({error}): pip install transformers, or use the hashed embedding."
        ) from error
    except (OSError, ValueError) as error:
        raise MissingDependencyError(
            f"there is no sentence encoder at {place!r}: {error}. Give the folder of one, or use the hashed embedding."
        ) from error
    with torch.no_grad():
        tokens = tokenizer(list(texts), padding=True, return_tensors="pt")
        hidden = model(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None]
        mean = (hidden * mask).sum(1) / mask.sum(1)
    projection = torch.from_numpy(np.random.default_rng(0).normal(size=(mean.shape[1], dim))).float()
    embedded = torch.nn.functional.normalize(mean.float(), dim=1) @ projection
    return embedded.detach()
