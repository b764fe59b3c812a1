"""A tenant's adapters, searched."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from router.centroids import document_centroids
from router.embed import MiniLmEncoder
from router.index import AdapterEntry, Scope, Scored, TenantIndex
from router.text import words

DIMENSION = 4


def axis(*values: float) -> np.ndarray:
    """A normalised vector of DIMENSION numbers."""
    vector = np.array([*values, *[0.0] * (DIMENSION - len(values))], dtype=np.float32)
    return vector / np.linalg.norm(vector)


def entry(name: str, *rows: np.ndarray, text: str = "", title: str = "", **fields: Any) -> AdapterEntry:
    document_id = fields.pop("document_id", f"doc_{name}")
    return AdapterEntry.of_document(
        name, fields.pop("tenant_id", "ten_a"), document_id, title, text, np.stack(rows), **fields
    )


def index_of(*entries: AdapterEntry) -> TenantIndex:
    index = TenantIndex("ten_a", DIMENSION)
    index.update(entries)
    return index


def names(results: list[Scored]) -> list[str]:
    return [result.entry.adapter_id for result in results]


X, Y, Z, W = axis(1), axis(0, 1), axis(0, 0, 1), axis(0, 0, 0, 1)


def test_an_adapter_counts_once_with_its_best_centroid() -> None:
    index = index_of(entry("a", X, Y, axis(1, 0.1)), entry("b", axis(1, 1)))
    results = index.search(X, ())
    assert names(results) == ["a", "b"]
    assert results[0].similarity == pytest.approx(1)
    assert results[1].similarity == pytest.approx(0.5**0.5)
    assert names(index.search(Y, ())) == ["a", "b"]


def test_an_empty_index_gives_nothing() -> None:
    assert TenantIndex("ten_a", DIMENSION).search(X, {"word"}) == []


def test_add_replace_remove() -> None:
    index = index_of(entry("a", X))
    index.add(entry("b", Y))
    assert len(index) == 2 and "b" in index
    index.add(entry("a", Z, W))
    assert len(index) == 2
    assert index.search(X, ())[0].similarity == pytest.approx(0)
    assert names(index.search(Z, (), limit=1)) == ["a"]
    index.remove("a")
    index.remove("never there")
    assert names(index.search(Z, ())) == ["b"] and "a" not in index
    index.remove("b")
    assert index.search(X, ()) == []


def test_update_removes_before_it_adds() -> None:
    index = index_of(entry("a", X), entry("b", Y))
    index.update([entry("a", Z)], remove=["a", "b"])
    assert names(index.search(Z, ())) == ["a"]


def test_a_changed_index_scores_like_a_fresh_one() -> None:
    index = index_of(entry("a", X, text="corvo red"), entry("b", Y, text="corvo blue"), entry("c", Z, text="lumen"))
    index.add(entry("a", W, text="aster red"))
    index.update([entry("d", X, text="lumen blue"), entry("d", Y, text="heron")], remove=["b"])
    fresh = index_of(entry("c", Z, text="lumen"), entry("a", W, text="aster red"), entry("d", Y, text="heron"))
    query = words("red blue corvo lumen heron")
    assert [(r.entry.adapter_id, r.score) for r in index.search(X, query)] == [
        (r.entry.adapter_id, r.score) for r in fresh.search(X, query)
    ]


def test_bad_entries_change_nothing() -> None:
    index = index_of(entry("a", X))
    nan = X.copy()
    nan[1] = np.nan
    bad = [
        entry("nan", nan),
        entry("inf", np.full(DIMENSION, np.inf, dtype=np.float32)),
        entry("wide", np.ones(DIMENSION + 1, dtype=np.float32)),
        AdapterEntry.of_document("none", "ten_a", "d", "", "", np.empty((0, DIMENSION), dtype=np.float32)),
        entry("foreign", X, tenant_id="ten_b"),
    ]
    for one in bad:
        with pytest.raises(ValueError, match=one.adapter_id):
            index.update([entry("good", Y), one], remove=["a"])
    assert names(index.search(X, ())) == ["a"]


@pytest.mark.parametrize(
    "vector", [np.full(DIMENSION, np.nan), np.full(DIMENSION, np.inf), np.ones(3), np.ones((1, 4))]
)
def test_bad_query_vectors(vector: np.ndarray) -> None:
    with pytest.raises(ValueError, match="finite numbers"):
        index_of(entry("a", X)).search(vector, ())


def test_shared_words_tell_near_misses_apart() -> None:
    index = index_of(*(entry(name, X, text=f"The {name} weighs 3 kg.") for name in ("aster", "corvo", "lumen")))
    best, second, _ = index.search(X, words("How heavy is the Corvo?"))
    assert best.entry.adapter_id == "corvo"
    assert best.rank > second.rank + 0.1
    assert best.similarity == second.similarity


def test_common_words_hardly_count() -> None:
    index = index_of(*(entry(name, X, text=f"Norvia {name}") for name in ("aster", "corvo", "lumen")))
    results = {r.entry.adapter_id: r.word_share for r in index.search(X, words("norvia corvo"))}
    assert results["corvo"] == pytest.approx(1)
    assert results["aster"] == results["lumen"] < 0.4


def test_a_name_within_a_name_is_told_apart_by_the_heading() -> None:
    titles = ["Corvo Mini", "Corvo Max", "Corvo", "Corvo Pro", "Lumen", "Lumen Mini", "Lumen Max", "Lumen Pro"]
    index = index_of(*(entry(title, X, title=title, text="It weighs 3 kg.") for title in titles))
    for title in titles:
        assert names(index.search(X, words(f"How heavy is the {title}?")))[0] == title


def test_scores_stay_within_bounds() -> None:
    index = index_of(entry("a", X, text="corvo"), entry("b", -X, text="lumen"))
    best, worst = index.search(X, {"corvo"})
    assert best.score == pytest.approx(1)
    assert worst.score == pytest.approx(-0.6)


def test_equal_results_keep_a_fixed_order() -> None:
    assert names(index_of(entry("c", X), entry("a", X), entry("b", X)).search(X, ())) == ["a", "b", "c"]


def test_scope_is_applied_before_the_search() -> None:
    # More better ones outside the scope than the search keeps: filtering afterwards would leave nothing.
    others = [entry(f"other{i}", X, X, text="corvo", collection_id="col_other") for i in range(50)]
    mine = [entry(f"mine{i}", Y, Z, text=f"word{i}", collection_id="col_mine") for i in range(2)]
    index = index_of(*others, *mine, entry("loose", X))
    assert names(index.search(X, {"corvo"}, Scope(collection_id="col_mine"))) == ["mine0", "mine1"]
    assert names(index.search(X, (), Scope(adapter_ids={"mine1", "other3"}))) == ["other3", "mine1"]
    assert names(index.search(X, (), Scope("col_mine", ["mine1", "other3"]))) == ["mine1"]
    assert index.search(X, (), Scope("col_absent")) == []
    assert index.search(X, (), Scope(adapter_ids=())) == []


def test_what_is_outside_the_scope_does_not_influence_scores() -> None:
    mine = [entry(f"mine{i}", X, title=f"Sheet {i}", text=f"corvo part{i}", collection_id="col") for i in range(4)]
    outside = [entry(f"o{i}", X, text="corvo part1 part2", collection_id="else") for i in range(9)]
    query = words("corvo part1 part7")

    def scores(index: TenantIndex, scope: Scope | None) -> list[tuple[str, float, float]]:
        return [(r.entry.adapter_id, r.score, r.rank) for r in index.search(X, query, scope, limit=9)]

    assert scores(index_of(*mine, *outside), Scope("col")) == scores(index_of(*mine), None)


CORVO_MANUAL = "The corvo weighs 3 kg. The corvo runs on kerosene. The corvo sleeps in a crate."


def parts_of(name: str, text: str, rows: list[np.ndarray], title: str = "", **fields: Any) -> list[AdapterEntry]:
    """A document with a part for each sentence."""
    ends = [i + 1 for i, mark in enumerate(text) if mark == "."]
    spans = list(zip([0, *ends], ends, strict=False))
    assert len(spans) == len(rows)
    return [
        entry(f"{name}{i}", row, text=text, title=title, document_id=f"doc_{name}", spans=[span], part=i,
              parts=len(spans), **fields)
        for i, (span, row) in enumerate(zip(spans, rows, strict=True))
    ]


def test_a_part_has_the_words_of_its_own_spans_and_the_heading_of_its_document() -> None:
    text = "# Corvo manual\n\nIt weighs 3 kg. It runs on kerosene. It sleeps in a crate."
    spans = [(text.index("It runs"), text.index(" It sleeps")), (text.index("crate"), len(text))]
    part = entry("a", X, text=text, spans=spans, part=1, parts=2)
    assert part.words == words("It runs on kerosene. crate.")
    assert part.heading_words == words("Corvo manual")
    titled = entry("a", X, text=text, title="Corvo guide", spans=spans)
    assert titled.words == part.words | words("Corvo guide")
    assert titled.heading_words == words("Corvo guide")
    assert entry("a", X, text=text).words == words(text)


def test_a_document_counts_once_with_its_best_part() -> None:
    index = index_of(*parts_of("a", CORVO_MANUAL, [X, Y, Z]), entry("b", W, text="lumen"))
    results = index.search(Y, words("What does the corvo run on, kerosene?"))
    assert [(r.entry.document_id, r.entry.part) for r in results] == [("doc_a", 1), ("doc_b", 0)]
    # By words alone, where the vector says nothing.
    assert index.search(axis(1, 1, 1), words("Where is the crate?"))[0].entry.part == 2
    # Five parts of one document must not push all others out.
    many = [entry(f"m{i}", X, text="corvo", document_id="doc_m", part=i, parts=20) for i in range(20)]
    index.update(many)
    assert {r.entry.document_id for r in index.search(X, {"corvo"}, limit=3)} == {"doc_a", "doc_b", "doc_m"}


def test_a_name_that_all_parts_share_does_not_pass_for_a_common_word() -> None:
    """Nine of twelve adapters hold "corvo", but only one of four documents."""
    sentences = " ".join(f"The corvo has part {i}." for i in range(9))
    index = index_of(
        *parts_of("corvo", sentences, [X] * 9, title="Corvo manual"),
        *(entry(name, X, title=f"{name} manual", text=f"The {name} has part 3.")
          for name in ("aster", "lumen", "heron")),
    )
    alone = index_of(
        *(entry(name, X, title=f"{name} manual", text=f"The {name} has part 3.")
          for name in ("corvo", "aster", "lumen", "heron")),
    )
    query = words("Which part has the corvo?")
    best, second = index.search(X, query, limit=2)
    assert best.entry.document_id == "doc_corvo"
    expected, other = alone.search(X, query, limit=2)
    assert best.score == pytest.approx(expected.score) and best.rank == pytest.approx(expected.rank)
    assert best.rank - second.rank == pytest.approx(expected.rank - other.rank)


def test_parts_of_a_named_document() -> None:
    index = index_of(*parts_of("a", CORVO_MANUAL, [X, Y, Z]), *parts_of("b", CORVO_MANUAL, [X, X, X]))
    query = words("Where does the corvo sleep, in a crate?")
    assert names(index.search_parts("doc_a", Z, query)) == ["a2", "a0", "a1"]
    assert {r.entry.document_id for r in index.search_parts("doc_a", Z, query, limit=9)} == {"doc_a"}
    assert len(index.search_parts("doc_a", Z, query, limit=2)) == 2
    assert index.search_parts("doc_absent", Z, query) == []
    assert [e.adapter_id for e in index.parts("doc_b")] == ["b0", "b1", "b2"] and index.parts("doc_absent") == []
    with pytest.raises(ValueError, match="finite numbers"):
        index.search_parts("doc_a", np.ones(3, dtype=np.float32), query)


def test_the_name_of_a_document_is_no_evidence_between_its_parts() -> None:
    """The second part names the corvo again, the first says what was asked for; vectors tell nothing."""
    text = "It runs on kerosene. The corvo sleeps."
    index = index_of(*parts_of("a", text, [X, X], title="The corvo"), entry("b", W, text="lumen"))
    query = words("Does the corvo run on kerosene?")
    assert index.search(X, query)[0].entry.part == 0
    untitled = index_of(*parts_of("a", text, [X, X], contexts=["Corvo"]), entry("b", W, text="lumen"))
    assert untitled.search(X, query)[0].entry.part == untitled.search_parts("doc_a", X, query)[0].entry.part == 0
    titled = parts_of("a", text, [X, X], title="It runs on kerosene.")
    assert titled[1].part_words == words("The corvo sleeps.")
    kerosene = index_of(*titled).search_parts("doc_a", X, words("What runs on kerosene?"))
    assert names(kerosene) == ["a0", "a1"] and kerosene[0].rank > kerosene[1].rank


def test_the_score_of_a_document_is_that_of_its_best_part() -> None:
    index = index_of(*parts_of("a", CORVO_MANUAL, [X, Y, Z]), entry("b", W, text="lumen"))
    query = words("Where does the corvo sleep, in a crate?")
    result = index.search(axis(1, 0.9, 0.9), query)[0]
    parts = index._search(axis(1, 0.9, 0.9), query, Scope()).parts("doc_a")
    assert len(parts) == 3 and result.score == max(one.score for one in parts)


def test_all_parts_of_a_document_are_replaced_at_once() -> None:
    index = index_of(*parts_of("a", CORVO_MANUAL, [X, Y, Z]), entry("b", W, text="lumen"))
    new = [entry("new", X, text="The corvo weighs 4 kg.", document_id="doc_a")]
    index.update(new, documents=["doc_a", "doc_never_there"])
    assert sorted(names(index.search(X, ()))) == ["b", "new"] and len(index) == 2
    fresh = index_of(entry("b", W, text="lumen"), *new)
    query = words("kerosene corvo 4 lumen")
    assert [(r.entry.adapter_id, r.score) for r in index.search(X, query)] == [
        (r.entry.adapter_id, r.score) for r in fresh.search(X, query)
    ]
    index.update(documents=["doc_a"])
    assert names(index.search(X, ())) == ["b"]


def test_a_part_that_goes_leaves_the_words_that_other_parts_hold() -> None:
    index = index_of(*parts_of("a", CORVO_MANUAL, [X, Y, Z]), entry("b", W, text="lumen"))
    index.remove("a1")
    left = [one for one in parts_of("a", CORVO_MANUAL, [X, Y, Z]) if one.adapter_id != "a1"]
    fresh = index_of(*left, entry("b", W, text="lumen"))
    query = words("kerosene corvo lumen crate")
    assert [(r.entry.adapter_id, r.score) for r in index.search(X, query)] == [
        (r.entry.adapter_id, r.score) for r in fresh.search(X, query)
    ]


def test_searches_see_whole_changes_only() -> None:
    """Each change replaces all adapters by those of the next generation; no search may see a mixture or nothing."""
    rng = np.random.default_rng(0)

    def generation(number: int) -> list[AdapterEntry]:
        rows = rng.normal(size=(5, 2, DIMENSION)).astype(np.float32)
        rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
        return [entry(f"g{number}-{i}", *rows[i], text=f"generation{number}") for i in range(5)]

    index = index_of(*generation(0))
    failures: list[object] = []
    every = [f"g{number}-{i}" for number in range(150) for i in range(5)]
    done = threading.Event()

    def search() -> None:
        try:
            while not done.is_set():
                for scope in (None, Scope(adapter_ids=every)):
                    found = {name.split("-")[0] for name in names(index.search(X, {"generation1"}, scope, limit=9))}
                    if len(found) != 1:
                        failures.append(found)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(1, 150):
        index.update(generation(number), remove=[f"g{number - 1}-{i}" for i in range(5)])
    done.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sorted(names(index.search(X, (), limit=9))) == [f"g149-{i}" for i in range(5)]


def test_concurrent_changes_are_all_kept() -> None:
    index = TenantIndex("ten_a", DIMENSION)

    def add(prefix: str) -> None:
        for i in range(30):
            index.add(entry(f"{prefix}{i}", X))

    threads = [threading.Thread(target=add, args=(prefix,)) for prefix in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(index) == 120


def test_data_sheets_of_one_company(encoder: MiniLmEncoder) -> None:
    """Forty products that differ in name only: nearly every question finds its own sheet."""
    index = TenantIndex("ten_a", encoder.dimension)
    families = ["Aster", "Borea", "Corvo", "Delfin", "Estrel", "Garnet", "Heron", "Lumen"]
    products = [f"Norvia {family}{variant}" for family in families for variant in ("", " Mini", " Pro", " 2", " Max")]
    for i, product in enumerate(products):
        title = f"{product} data sheet"
        text = f"The {product} weighs {2 + i / 10:.1f} kg. It costs {100 + i} euros. Its battery lasts {i + 3} hours."
        matrix = document_centroids(encoder, title, [text], 4)
        index.add(AdapterEntry.of_document(product, "ten_a", product, title, text, matrix))
    right = total = 0
    for product in products:
        for question in (f"How heavy is the {product}?", f"what does the {product.lower()} cost?"):
            total += 1
            right += index.search(encoder.embed([question])[0], words(question))[0].entry.adapter_id == product
    assert right / total >= 0.95
