"""What is compared: Imprint's router, and other ways to pick one of a tenant's documents."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from benchmarks.routing.documents import Page
from benchmarks.routing.questions import Question
from hypernet.documents import Chunk, DocumentText, TokenCounter, chunk_document
from hypernet.names import context, named_passages
from hypernet.parts import PartLimits, group
from router.calibrate import Example, Floats, features_of, fit
from router.centroids import document_centroids, passages
from router.decide import RouterSettings, decide
from router.embed import Encoder, Vectors
from router.index import AdapterEntry, Scored, TenantIndex
from router.shipped import shipped_calibration
from router.text import words

CHUNK_TOKENS = 200
"""Of the encoder, which reads 256 at once, title included."""
LIMITS = PartLimits(chunks=4, parts=256)
CENTROIDS = 4
LISTED = 5


@dataclass(frozen=True)
class Found:
    """What a system found for one question: documents, best first, the stated probability that the first one answers,
    and whether it would be used."""

    documents: tuple[str, ...]
    confidence: float
    routed: bool


class System(Protocol):
    """Built for one tenant's documents."""

    name: str

    def fit(self, questions: Sequence[Question]) -> None:
        """Learn from questions with known answers, where the system can."""
        ...

    def find(self, questions: Sequence[str]) -> list[Found]:
        """What answers each question, LISTED documents at most."""
        ...


@dataclass(frozen=True)
class Prepared:
    """One tenant's documents as the systems read them: cut into chunks, with the encoder for all."""

    tenant: str
    pages: Sequence[Page]
    chunks: Sequence[Sequence[Chunk]]
    encoder: Encoder

    @classmethod
    def of(cls, tenant: str, pages: Sequence[Page], encoder: Encoder, tokenizer: TokenCounter) -> Prepared:
        """Cut the pages into chunks."""
        chunks = [chunk_document(DocumentText(page.title, page.text), tokenizer, CHUNK_TOKENS, 2 * CHUNK_TOKENS,
                                 LIMITS.all_chunks) for page in pages]
        return cls(tenant, pages, chunks, encoder)

    def passages(self, number: int) -> list[str]:
        """What is embedded of one page: its title, and its chunks and sentences behind the title."""
        page = self.pages[number]
        return passages(page.title, [page.text[chunk.start: chunk.end] for chunk in self.chunks[number]])

    @cached_property
    def adapters(self) -> list[AdapterEntry]:
        """The adapters that the pages become."""
        return [entry for number in range(len(self.pages)) for entry in _entries(self, number)]


class Imprint:
    """This project's index and decision, with a calibration: the shipped one, or one fitted around it."""

    def __init__(self, prepared: Prepared, fitted: bool) -> None:
        self.name = "Imprint" if fitted else "Imprint, shipped calibration"
        self._fitted = fitted
        self._encoder = prepared.encoder
        self._shipped = shipped_calibration(prepared.encoder.id, prepared.encoder.version)
        self._calibration = self._shipped
        self.index = TenantIndex(prepared.tenant, prepared.encoder.dimension)
        self.index.update(prepared.adapters)

    def fit(self, questions: Sequence[Question]) -> None:
        """A tenant's calibration around the shipped one."""
        if self._fitted:
            examples = []
            for question, results in zip(questions, self._search([q.text for q in questions]), strict=True):
                right = results[0].entry.document_id in question.answers
                examples.append(Example(features_of(results[0], _lead(results)), right, results[0].entry.adapter_id))
            self._calibration = fit(examples, self._encoder.id, self._encoder.version, "", self._shipped, 1)

    def find(self, questions: Sequence[str]) -> list[Found]:
        """As a request is routed."""
        found = []
        for results in self._search(questions):
            decision = decide(results, RouterSettings(), calibration=self._calibration)
            # Without any calibration the score stands in for the probability that it is not.
            confidence = results[0].score if decision.confidence is None else decision.confidence
            documents = tuple(one.entry.document_id for one in results)
            found.append(Found(documents, confidence, decision.adapter_id is not None))
        return found

    def tenants(self, questions: Sequence[str]) -> list[set[str]]:
        """Whose adapters each question's candidates are."""
        return [{one.entry.tenant_id for one in results} for results in self._search(questions)]

    def _search(self, questions: Sequence[str]) -> list[list[Scored]]:
        vectors = self._encoder.embed(questions)
        return [self.index.search(vector, words(text), limit=LISTED)
                for vector, text in zip(vectors, questions, strict=True)]


def _entries(prepared: Prepared, number: int) -> list[AdapterEntry]:
    """The adapters that a page becomes, as the server registers them."""
    page = prepared.pages[number]
    parts = group(list(prepared.chunks[number]), LIMITS)
    entries = []
    for part, chunks in enumerate(parts):
        spans = [(chunk.start, chunk.end) for chunk in chunks]
        several = len(parts) > 1
        texts = named_passages(page.text, spans) if several else [page.text[start:end] for start, end in spans]
        centroids = document_centroids(prepared.encoder, page.title, texts, CENTROIDS, part=several)
        entries.append(AdapterEntry.of_document(
            f"{page.path}#{part}", page.tenant, page.path, page.title, page.text, centroids,
            spans=spans if several else (), part=part, parts=len(parts),
            contexts=[context(page.text, start) for start, _ in spans] if several else ()))
    return entries


def _lead(results: Sequence[Scored]) -> float | None:
    return results[0].rank - results[1].rank if len(results) > 1 else None


class Calibrated:
    """A ranking by one score, whose probability is a logistic curve (Platt 1999) fitted to the calibration questions.

    `routed` where it is at least one half.
    """

    name = ""

    def __init__(self) -> None:
        self._curve: Any = None

    def rank(self, questions: Sequence[str]) -> list[list[tuple[str, float]]]:
        """Documents and scores, best first, of each question."""
        raise NotImplementedError

    def fit(self, questions: Sequence[Question]) -> None:
        """Fit the curve to the first document's score and whether it answers."""
        from sklearn.linear_model import LogisticRegression

        ranked = self.rank([question.text for question in questions])
        scores = np.array([[one[0][1]] for one in ranked])
        right = [one[0][0] in question.answers for one, question in zip(ranked, questions, strict=True)]
        self._curve = LogisticRegression(C=1e6, max_iter=1000).fit(scores, right)

    def find(self, questions: Sequence[str]) -> list[Found]:
        """Ranked, with the curve's probability."""
        ranked = self.rank(questions)
        confidence: Floats = self._curve.predict_proba(np.array([[one[0][1]] for one in ranked]))[:, 1]
        return [Found(tuple(name for name, _ in one), float(p), bool(p >= 0.5))
                for one, p in zip(ranked, confidence, strict=True)]


class NearestVector(Calibrated):
    """The document of the nearest vector, by cosine."""

    def __init__(self, name: str, encoder: Encoder, vectors: Vectors, owners: Sequence[str]) -> None:
        """`vectors` float32 [n, dimension], L2-normalised; `owners` their documents."""
        super().__init__()
        self.name = name
        self._encoder, self._vectors, self._owners = encoder, vectors, owners

    def rank(self, questions: Sequence[str]) -> list[list[tuple[str, float]]]:
        """By the best vector of each document."""
        ranked = []
        for row in self._encoder.embed(questions) @ self._vectors.T:
            best: dict[str, float] = {}
            for i in np.argsort(-row, kind="stable"):
                best.setdefault(self._owners[i], float(row[i]))
                if len(best) == LISTED:
                    break
            ranked.append(list(best.items()))
        return ranked


def nearest_centroid(prepared: Prepared) -> NearestVector:
    """One centroid for each document (ARIADNE, arXiv 2606.19079): the mean of what is embedded of it."""
    rows = []
    for number in range(len(prepared.pages)):
        mean = prepared.encoder.embed(prepared.passages(number)).mean(axis=0)
        rows.append(mean / np.linalg.norm(mean))
    return NearestVector("nearest centroid", prepared.encoder, np.stack(rows), [page.path for page in prepared.pages])


def nearest_chunk(prepared: Prepared) -> NearestVector:
    """Each chunk has a vector, behind the title."""
    texts, owners = [], []
    for page, chunks in zip(prepared.pages, prepared.chunks, strict=True):
        texts += [f"{page.title}\n{page.text[chunk.start: chunk.end].strip()}".strip() for chunk in chunks]
        owners += [page.path] * len(chunks)
    return NearestVector("nearest chunk", prepared.encoder, prepared.encoder.embed(texts), owners)


class Bm25(Calibrated):
    """Okapi BM25 (Robertson and Zaragoza 2009) over whole documents, k1 1.5 and b 0.75, with all scores at once."""

    name = "BM25"

    def __init__(self, prepared: Prepared) -> None:
        from sklearn.feature_extraction.text import CountVectorizer

        super().__init__()
        self._documents = [page.path for page in prepared.pages]
        self._words = CountVectorizer(token_pattern=r"\w+")
        counts = self._words.fit_transform(f"{page.title}\n{page.text}" for page in prepared.pages).tocoo()
        lengths = np.bincount(counts.row, counts.data, len(self._documents))
        held = np.bincount(counts.col, minlength=counts.shape[1])
        rarity = np.log(1 + (len(self._documents) - held + 0.5) / (held + 0.5))
        norm = 1.5 * (0.25 + 0.75 * lengths / lengths.mean())
        counts.data = rarity[counts.col] * counts.data * 2.5 / (counts.data + norm[counts.row])
        self._weights = counts.tocsr()

    def rank(self, questions: Sequence[str]) -> list[list[tuple[str, float]]]:
        """By the sum over the question's distinct words."""
        asked = self._words.transform(questions)
        asked.data[:] = 1
        scores: npt.NDArray[np.float64] = (asked @ self._weights.T).toarray()
        return [[(self._documents[i], float(row[i])) for i in np.argsort(-row, kind="stable")[:LISTED]]
                for row in scores]


class SemanticRouter:
    """The package semantic-router: a route for each document, what is embedded of it as its utterances.

    Its own settings otherwise (five nearest utterances, mean for each route, Platt), with this benchmark's encoder.
    """

    def __init__(self, prepared: Prepared, packages: str) -> None:
        """``packages``: a folder that holds the package and what it needs beyond Imprint's environment."""
        if packages not in sys.path:
            sys.path.append(packages)
        package = import_module("semantic_router")
        dense: Any = import_module("semantic_router.encoders").DenseEncoder
        routers = import_module("semantic_router.routers")
        encoder = prepared.encoder

        class Shared(dense):
            """The benchmark's encoder."""

            def __call__(self, docs: list[str]) -> list[Vectors]:
                return list(encoder.embed(docs))

            async def acall(self, docs: list[str]) -> list[Vectors]:
                return self(docs)

        self.name = f"semantic-router {package.__version__}"
        routes = [package.Route(name=page.path, utterances=prepared.passages(number))
                  for number, page in enumerate(prepared.pages)]
        self._router = routers.IndexedRouter(encoder=Shared(name="minilm"), routes=routes, confidence_threshold=0.5)

    def fit(self, questions: Sequence[Question]) -> None:
        """Its own Platt fit; None marks questions without a route. Of several answers the first counts."""
        self._router.fit([q.text for q in questions], [min(q.answers) if q.answers else None for q in questions])

    def find(self, questions: Sequence[str]) -> list[Found]:
        """One call for each question."""
        found = []
        for text in questions:
            choices = self._router(text, limit=LISTED, threshold=0.0)
            first = choices[0]
            found.append(Found(tuple(one.name for one in choices), first.confidence, first.confidence >= 0.5))
        return found


def build(prepared: Prepared, packages: str = "") -> list[System]:
    """All systems for one tenant; semantic-router where ``packages`` says where it is."""
    systems: list[System] = [Imprint(prepared, fitted=True)]
    if shipped_calibration(prepared.encoder.id, prepared.encoder.version):
        systems.append(Imprint(prepared, fitted=False))
    systems += [nearest_centroid(prepared), nearest_chunk(prepared), Bm25(prepared)]
    if packages:
        systems.append(SemanticRouter(prepared, packages))
    return systems

