"""A document as a few vectors: k-means over its sentences and its chunks, and over questions on it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from router.embed import Encoder, Vectors
from router.text import part_title, sentences

MAX_PASSAGES = 256
"""Passages embedded of one document (about a second on one core); longer ones are sampled evenly."""


def document_centroids(
    encoder: Encoder,
    title: str,
    chunks: Sequence[str],
    k: int,
    *,
    part: bool = False,
    questions: Sequence[str] = (),
    question_k: int = 0,
) -> Vectors:
    """Condense a document into float32 [n, dimension], 1 <= n <= k + question_k, rows L2-normalised.

    Each chunk and each sentence is embedded behind the title, since a sentence such as "It weighs 3 kg." alone does
    not say what it is about. With `part` the chunks are one part of several, which have the title in
    common: it stands before them where it is a name, and is no passage of its own. `questions` on the document become
    up to `question_k` vectors of their own, for questions do not embed like what answers them. Raises ValueError when
    k < 1, question_k < 0, or neither title nor chunks hold any text.
    """
    if k < 1 or question_k < 0:
        raise ValueError(f"k must be at least 1 and question_k at least 0, not {k} and {question_k}")
    texts = passages(title, chunks, part=part)
    if not texts:
        raise ValueError("a document without text has no centroids")
    asked = list(dict.fromkeys(question.strip() for question in questions if question.strip())) if question_k else []
    vectors = encoder.embed([*texts, *asked])
    of_text = _condensed(vectors[: len(texts)], k)
    return np.concatenate([of_text, _condensed(vectors[len(texts) :], question_k)]) if asked else of_text


def passages(title: str, chunks: Sequence[str], *, part: bool = False) -> list[str]:
    """The texts to embed: title, title with chunk, title with sentence; distinct, at most MAX_PASSAGES."""
    title = part_title(title) if part else title.strip()
    whole = [f"{title}\n{chunk.strip()}".strip() for chunk in chunks if chunk.strip()]
    single = [f"{title}: {sentence}" if title else sentence for chunk in chunks for sentence in sentences(chunk)]
    texts = list(dict.fromkeys([*([title] if title and not (part and whole) else []), *whole, *single]))
    if len(texts) <= MAX_PASSAGES:
        return texts
    return [texts[i] for i in np.linspace(0, len(texts) - 1, MAX_PASSAGES).astype(int)]


def _condensed(vectors: Vectors, k: int) -> Vectors:
    return vectors if len(vectors) <= k else _cluster(vectors, k)


def _cluster(vectors: Vectors, k: int) -> Vectors:
    from sklearn.cluster import KMeans

    # A repeated sentence in other letter case gives equal vectors, and k-means wants k distinct ones.
    vectors = np.unique(vectors, axis=0)
    if len(vectors) <= k:
        return vectors
    centers = KMeans(k, n_init=2, random_state=0).fit(vectors).cluster_centers_
    norms = np.linalg.norm(centers, axis=1, keepdims=True)
    # A centre of opposite vectors has no direction.
    return np.asarray((centers / np.maximum(norms, 1e-6))[norms[:, 0] > 1e-6], dtype=np.float32)
