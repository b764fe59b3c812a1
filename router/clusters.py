"""Questions grouped by likeness."""

from __future__ import annotations

import numpy as np

from router.embed import Vectors

LIKE = 0.55
"""Mean cosine of questions on one subject, at least; MiniLM gives two of unlike subjects about 0.1 to 0.3."""


def clusters(vectors: Vectors, like: float = LIKE) -> list[list[int]]:
    """Rows of L2-normalised vectors (float32 [n, dimension]) in groups, the largest first, each with its most typical
    row first: agglomerative clustering with average linkage, until no two groups have a mean cosine of `like`.
    """
    if len(vectors) < 2:
        return [[row] for row in range(len(vectors))]
    from sklearn.cluster import AgglomerativeClustering

    method = AgglomerativeClustering(None, metric="cosine", linkage="average", distance_threshold=1 - like)
    labels = method.fit_predict(np.asarray(vectors, dtype=np.float64))
    groups = []
    for label in range(labels.max() + 1):
        rows = np.flatnonzero(labels == label)
        typical = vectors[rows] @ vectors[rows].mean(axis=0)
        groups.append([int(row) for row in rows[np.argsort(-typical, kind="stable")]])
    return sorted(groups, key=lambda group: (-len(group), group[0]))
