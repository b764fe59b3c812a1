"""What an index holds and what a search of it sees and gives."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from router.embed import Vectors
from router.text import heading, part_title, words

Span = tuple[int, int]


class State(StrEnum):
    """Whether an adapter may answer. One that may not stays in the index: the next best would answer about another
    document, or another part."""

    READY = "ready"
    DEGRADED = "degraded"
    """It failed the quality gate."""
    STALE = "stale"
    """It was made for another base model or generator."""


@dataclass(frozen=True, slots=True)
class IndexedAdapter:
    """One adapter as searches name it: it covers part `part` (from 0) of `parts` of its document."""

    adapter_id: str
    tenant_id: str
    document_id: str
    title: str
    collection_id: str | None = None
    state: State = State.READY
    part: int = 0
    parts: int = 1


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class AdapterEntry(IndexedAdapter):
    """One adapter to put in: its centroids (float32 [n, dimension], L2-normalised) and the words of what it was made
    from. `part_words` are the words to compare with those of other parts, a subset of `words`.
    """

    centroids: Vectors = field(repr=False)
    words: frozenset[str] = field(repr=False)
    heading_words: frozenset[str] = field(repr=False)
    part_words: frozenset[str] = field(default=frozenset(), repr=False)

    @classmethod
    def of_document(
        cls,
        adapter_id: str,
        tenant_id: str,
        document_id: str,
        title: str,
        text: str,
        centroids: Vectors,
        collection_id: str | None = None,
        state: State = State.READY,
        spans: Sequence[Span] = (),
        part: int = 0,
        parts: int = 1,
        contexts: Sequence[str] = (),
    ) -> AdapterEntry:
        """An entry with the words of a document's title and of its text, or of those `spans` of the text alone.

        The heading is the document's in any case, as all its parts are about what it names. `contexts` are names that
        belong to the spans though they stand before them.
        """
        covered = "\n".join([*contexts, *(text[start:end] for start, end in spans)]) if spans else text
        held = words(f"{title}\n{covered}")
        return cls(
            adapter_id=adapter_id,
            tenant_id=tenant_id,
            document_id=document_id,
            title=title,
            centroids=centroids,
            words=held,
            heading_words=words(heading(title, text)),
            # The same text without the title, so only the bound on the number of words could tell more.
            part_words=words(f"{part_title(title)}\n{covered}") & held if parts > 1 else frozenset(),
            collection_id=collection_id,
            state=state,
            part=part,
            parts=parts,
        )


@dataclass(frozen=True, slots=True)
class Scope:
    """What a search may see; None: everything of the tenant."""

    collection_id: str | None = None
    adapter_ids: Collection[str] | None = None
    document_id: str | None = None

    @property
    def everything(self) -> bool:
        """Whether no entry can be outside."""
        return self.collection_id is None and self.adapter_ids is None and self.document_id is None


@dataclass(frozen=True, slots=True)
class Scored:
    """A search result. `score` in -1..1 says how well the query fits, and `rank` orders the results."""

    entry: IndexedAdapter
    score: float
    similarity: float
    word_share: float
    rank: float
