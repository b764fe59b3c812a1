"""How a long document is spread over adapters: chunks in order, grouped into parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hypernet.documents import Chunk

LongDocuments = Literal["parts", "merge"]
"""What becomes of a document with more chunks than one part holds: several part adapters, of which the router selects
one for each question, or one adapter of all chunks, cut down to the rank cap."""


@dataclass(frozen=True)
class PartLimits:
    """How much one document may take: at most `parts` parts of at most `chunks` chunks each."""

    chunks: int
    parts: int

    @property
    def all_chunks(self) -> int:
        """The most chunks of one document."""
        return self.chunks * self.parts


def group(chunks: list[Chunk], limits: PartLimits) -> list[list[Chunk]]:
    """The chunks of each part, in order: as few parts as hold them, of sizes that differ by one chunk at most.

    Raises ValueError where there are more chunks than the limits allow.
    """
    if len(chunks) > limits.all_chunks:
        raise ValueError(f"{len(chunks)} chunks; at most {limits.all_chunks} are allowed")
    count = -(-len(chunks) // limits.chunks)
    edges = [i * len(chunks) // count for i in range(count)] + [len(chunks)]
    return [chunks[first:last] for first, last in zip(edges, edges[1:], strict=False)]
