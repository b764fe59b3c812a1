"""Which part adapter of a document answers a question, chosen by the router's own scoring as the server does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hypernet.documents import Chunk, DocumentText
from hypernet.names import context, named_passages
from router.centroids import document_centroids
from router.embed import MiniLmEncoder
from router.index import AdapterEntry, TenantIndex
from router.text import words
from serve.config import RouterConfig

_TENANT = "benchmark"
Spans = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Divided:
    """A document and the spans of its text, in characters, that each of its part adapters was made from."""

    document: DocumentText
    parts: Sequence[Spans]

    @classmethod
    def by_plan(cls, document: DocumentText, plan: Sequence[Sequence[Chunk]]) -> Divided:
        """As `HypernetGenerator.plan` divides it."""
        return cls(document, [[(chunk.start, chunk.end) for chunk in part] for part in plan])

    def text(self, part: int) -> str:
        """The text of one part."""
        return "\n".join(self.document.text[start:end] for start, end in self.parts[part])


class PartRouter:
    """One tenant's index over all parts of the given documents. `encoder` may be replaced by another of its kind."""

    def __init__(self, encoder: MiniLmEncoder, documents: Sequence[Divided]) -> None:
        self.encoder = encoder
        self._index = TenantIndex(_TENANT, encoder.dimension)
        self._index.update([self._entry(i, part, one) for i, one in enumerate(documents)
                            for part in range(len(one.parts))])

    def _entry(self, i: int, part: int, one: Divided) -> AdapterEntry:
        title, text = one.document.title, one.document.text
        spans, several = one.parts[part], len(one.parts) > 1
        passages = named_passages(text, spans) if several else [text[start:end] for start, end in spans]
        return AdapterEntry.of_document(
            adapter_id=f"{i}-{part}", tenant_id=_TENANT, document_id=str(i), title=title, text=text,
            centroids=document_centroids(self.encoder, title, passages, RouterConfig().centroids_per_adapter,
                                         part=several),
            spans=spans, part=part, parts=len(one.parts),
            contexts=[context(text, start) for start, _ in spans] if several else ())

    def within(self, document: int, question: str) -> int:
        """The part that answers where the client has named the document."""
        vector = self.encoder.embed([question])[0]
        return self._index.search_parts(str(document), vector, words(question), limit=1)[0].entry.part

    def among(self, question: str) -> tuple[int, int]:
        """The document and its part that fit best of all, whatever the score: nothing is left to the base here."""
        entry = self._index.search(self.encoder.embed([question])[0], words(question), limit=1)[0].entry
        return int(entry.document_id), entry.part
