"""How routing scales: 1,000 to 1,000,000 centroids over 1 to 10,000 tenants.

    python -m benchmarks.routing_scale

Texts are the documentation strings of Python's standard library, embedded by the shipped encoder. A document is one of
them with four centroids, which are perturbed copies of its vector (Gaussian noise of 0.6 of its length), and has its
words, of which three in ten are left out, and a name of its own. Questions are made of the same texts, and every second
one names a document. Everything is drawn with one seed.

Each row of the table is a process of its own, with one thread. Reference is the same search with no candidate left out.
Processor time is given beside wall time, since other work on the machine disturbs it less.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np

import router.search
from benchmarks.server import machine
from router.decide import RouterSettings, decide
from router.embed import MiniLmEncoder, Vectors
from router.index import AdapterEntry, Scored, TenantIndex
from router.text import words
from serve.registry import Registry, migrate

RESULTS = Path(__file__).parent / "results"
SEED = 5
ROWS = (1_000, 10_000, 100_000, 1_000_000)
TENANTS = (1, 100, 10_000)
PER_DOCUMENT = 4
NOISE = 0.6
MODULES = (
    "argparse ast asyncio calendar codecs collections configparser contextlib csv ctypes dataclasses datetime decimal "
    "difflib email enum fractions ftplib functools gettext gzip hashlib heapq html http.client http.server imaplib "
    "inspect io itertools json logging lzma mailbox math mimetypes multiprocessing operator os pathlib pickle platform "
    "queue random re sched secrets selectors shutil signal smtplib socket socketserver sqlite3 ssl statistics string "
    "struct subprocess tarfile tempfile textwrap threading timeit tokenize trace traceback types typing unittest "
    "urllib.parse urllib.request uuid warnings weakref xml.dom.minidom xml.etree.ElementTree zipfile zoneinfo"
).split()
MAX_TEXTS = 1500
MAX_TEXT = 300
GOALS = {"search p99 with a million": 5.0, "recall": 0.99, "decision p50": 1.0}
"""ms, share, ms"""


@dataclass(frozen=True)
class Seeds:
    """Real texts, their words, their vectors and those of a question on each: float32 [texts, dimension]."""

    words: list[list[str]]
    names: list[str]
    vectors: Vectors
    questions: Vectors


@dataclass(frozen=True)
class Latency:
    """Milliseconds."""

    p50: float
    p99: float
    cpu_p50: float
    cpu_p99: float


@dataclass(frozen=True)
class Row:
    """One case. Times in seconds but for latencies; `visible` is from the start of an insert to the end of a search
    that finds it; `recall` is the share of the ten nearest centroids, `same_best` and `same_five` how often the first
    document and all of the first five are those of the reference. `decision` is all but embedding and search."""

    rows: int
    tenants: int
    search: Latency
    decision: Latency
    while_inserting: Latency
    insert_visible: Latency
    recall: float
    same_best: float
    same_five: float
    probes: int
    index_bytes: int
    file_bytes: int
    rss_bytes: int
    load_s: float
    compact_s: float
    open_s: float


def texts() -> dict[str, str]:
    """Name -> documentation string, of public functions and classes of the standard library."""
    found: dict[str, str] = {}
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name, item in sorted(vars(module).items()):
            text = inspect.getdoc(item) if callable(item) and not name.startswith("_") else None
            if text and len(text) > 40 and text[:MAX_TEXT] not in found.values():
                found[f"{module_name}.{name}"] = text[:MAX_TEXT]
    return dict(list(found.items())[:MAX_TEXTS])


def make_seeds(path: Path) -> None:
    """Embed the texts and the questions."""
    encoder = MiniLmEncoder.load(threads=1)
    found = texts()
    names = list(found)
    np.savez(
        path,
        names=np.array(names),
        texts=np.array([found[name] for name in names]),
        vectors=encoder.embed([f"{name}\n{found[name]}" for name in names]),
        questions=encoder.embed([question(name) for name in names]),
    )


def question(name: str) -> str:
    """What is asked about a text."""
    module, _, item = name.rpartition(".")
    return f"How do I use {item} of the module {module}?"


def read_seeds(path: Path) -> Seeds:
    """What `make_seeds` wrote."""
    with np.load(path) as found:
        held = [sorted(words(text)) for text in found["texts"]]
        return Seeds(held, found["names"].tolist(), found["vectors"], found["questions"])


def perturbed(vectors: Vectors, rng: np.random.Generator) -> Vectors:
    """Copies with noise, L2-normalised."""
    noise = rng.standard_normal(vectors.shape, dtype=np.float32) * np.float32(NOISE / np.sqrt(vectors.shape[1]))
    made = vectors + noise
    return np.asarray(made / np.linalg.norm(made, axis=1, keepdims=True), np.float32)


def documents(seeds: Seeds, tenant: str, count: int, rng: np.random.Generator, first: int = 0) -> list[AdapterEntry]:
    """Documents `first` to `first + count`, each of one adapter."""
    chosen = rng.integers(len(seeds.names), size=count)
    vectors = perturbed(np.repeat(seeds.vectors[chosen], PER_DOCUMENT, axis=0), rng)
    made = []
    for i, seed in enumerate(chosen.tolist()):
        name = product(first + i)
        held = seeds.words[seed]
        kept = frozenset(np.array(held, object)[rng.random(len(held)) > 0.3].tolist()) if held else frozenset()
        heading = words(f"{seeds.names[seed]} {name}")
        made.append(AdapterEntry(
            adapter_id=f"adp_{first + i}", tenant_id=tenant, document_id=f"doc_{first + i}",
            title=f"{seeds.names[seed]} {name}", centroids=vectors[PER_DOCUMENT * i : PER_DOCUMENT * (i + 1)],
            words=kept | heading, heading_words=heading,
        ))
    return made


def product(number: int) -> str:
    """The name of a document."""
    return f"model{number}"


def queries(seeds: Seeds, count: int, per_tenant: int, rng: np.random.Generator) -> list[tuple[str, Vectors]]:
    """Questions as text and vector; every second names a document."""
    chosen = rng.integers(len(seeds.names), size=count).tolist()
    return [
        (question(seeds.names[seed]) + (f" ({product(int(rng.integers(per_tenant)))})" if i % 2 else ""),
         seeds.questions[seed])
        for i, seed in enumerate(chosen)
    ]


def timed(calls: Sequence[Callable[[], object]]) -> Latency:
    """What the calls took, one after the other."""
    wall, cpu = [], []
    for call in calls:
        begun, worked = time.perf_counter(), time.thread_time()
        call()
        cpu.append(time.thread_time() - worked)
        wall.append(time.perf_counter() - begun)
    numbers = [float(np.quantile(values, q) * 1e3) for values in (wall, cpu) for q in (0.5, 0.99)]
    return Latency(*numbers)


def exhaustive(index: TenantIndex, text: str, vector: Vectors) -> list[Scored]:
    """The search with every entry as a candidate."""
    limit = router.search.MAX_EXACT_ROWS
    router.search.MAX_EXACT_ROWS = sys.maxsize
    try:
        return index.search(vector, words(text))
    finally:
        router.search.MAX_EXACT_ROWS = limit


def recall_of(index: TenantIndex, vectors: Sequence[Vectors]) -> tuple[float, int]:
    """Of the ten nearest centroids, the share that is found in segments with an index of neighbours, and the cells that
    a search visits there; the others are compared one by one."""
    found, total, probes = 0, 0, 0
    for view in index._snapshot.views:
        neighbours, rows = view.segment.neighbours, view.segment.columns.vectors
        if neighbours is None:
            continue
        probes = max(probes, neighbours.probes)
        for vector in vectors:
            best = np.argpartition(-(rows @ vector), 10)[:10]
            found += len(set(best.tolist()) & set(neighbours.search(vector, router.search.NEAREST_ROWS).tolist()))
            total += 10
    return found / total if total else 1.0, probes


def overhead(registry: Registry, tenant: str, text: str, results: Sequence[Scored]) -> None:
    """What a decision takes beside embedding and search: the head of the change log, words, the choice."""
    registry.head(tenant)
    words(text)
    decide(results, RouterSettings())


def measure(seeds: Seeds, rows: int, tenants: int, count: int, folder: Path) -> Row:
    """One case."""
    faiss.omp_set_num_threads(1)
    rng = np.random.default_rng([SEED, rows, tenants])
    per_tenant = rows // tenants // PER_DOCUMENT
    dimension = seeds.vectors.shape[1]
    url = f"sqlite:///{folder}/registry.db"
    migrate(url)
    registry = Registry.open(url)
    tenant_id = registry.create_tenant("acme").id

    def batches(tenant: str) -> Iterator[list[AdapterEntry]]:
        for first in range(0, per_tenant, 2000):
            yield documents(seeds, tenant, min(2000, per_tenant - first), rng, first)

    indexes = []
    load_s = compact_s = 0.0
    for number in range(tenants):
        index = TenantIndex(tenant_id, dimension, folder / "index" / str(number), "minilm")
        begun = time.perf_counter()
        index.load(batches(tenant_id), seq=1)
        load_s += time.perf_counter() - begun
        begun = time.perf_counter()
        while index.wants_compaction:
            index.compact()
        compact_s += time.perf_counter() - begun
        indexes.append(index)
    asked = [(indexes[int(rng.integers(tenants))], text, vector)
             for text, vector in queries(seeds, count, per_tenant, rng)]
    for index, text, vector in asked[: count // 5]:
        index.search(vector, words(text))
    search = timed([partial(index.search, vector, words(text)) for index, text, vector in asked])
    results = [index.search(vector, words(text)) for index, text, vector in asked]
    decision = timed([partial(overhead, registry, tenant_id, text, found)
                      for (_, text, _), found in zip(asked, results, strict=True)])
    sample = asked[:: max(1, count // 100)]
    reference = [exhaustive(*one) for one in sample]
    pairs = [([one.entry.document_id for one in found], [one.entry.document_id for one in expected])
             for found, expected in zip(results[:: max(1, count // 100)], reference, strict=True)]
    recall, probes = recall_of(indexes[0], [vector for _, _, vector in sample])
    visible, inserting = inserts(seeds, indexes[0], asked, per_tenant, rng)
    files = sum(path.stat().st_size for path in (folder / "index").rglob("*") if path.is_file())
    begun = time.perf_counter()
    if files:
        assert TenantIndex(tenant_id, dimension, folder / "index" / "0", "minilm").open()
    open_s = time.perf_counter() - begun
    return Row(
        rows=rows, tenants=tenants, search=search, decision=decision, while_inserting=inserting, insert_visible=visible,
        recall=recall, same_best=float(np.mean([a[:1] == b[:1] for a, b in pairs])),
        same_five=float(np.mean([set(a) == set(b) for a, b in pairs])), probes=probes,
        index_bytes=sum(index.nbytes for index in indexes), file_bytes=files,
        rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, load_s=load_s, compact_s=compact_s,
        open_s=open_s,
    )


def inserts(
    seeds: Seeds, index: TenantIndex, asked: Sequence[tuple[TenantIndex, str, Vectors]], first: int,
    rng: np.random.Generator,
) -> tuple[Latency, Latency]:
    """How long an insert takes to be seen, and searches of one thread while another inserts 20 documents a second."""
    made = documents(seeds, index.tenant_id, 400, rng, first)

    def insert(one: AdapterEntry) -> None:
        index.update([one])
        found = index.search(one.centroids[0], one.words, limit=1)
        assert found[0].entry.adapter_id == one.adapter_id, "an insert is not seen by the next search"

    visible = timed([partial(insert, one) for one in made[:100]])
    done = threading.Event()

    def work() -> None:
        for one in made[100:]:
            if done.wait(0.05):
                return
            index.update([one])
            if index.wants_compaction:
                index.compact()

    writer = threading.Thread(target=work)
    writer.start()
    try:
        searched = timed([partial(index.search, vector, words(text)) for _, text, vector in asked])
    finally:
        done.set()
        writer.join()
    return visible, searched


def report(rows: Sequence[Row], load: float) -> str:
    """The results as Markdown."""
    lines = [
        "# Routing at scale", "",
        f"{machine()}; one core. Embeddings of {MAX_TEXTS} documentation strings of Python's standard library and "
        f"perturbed copies of them, seed {SEED}, {PER_DOCUMENT} centroids a document. Load of the machine during the "
        f"run (5 minutes' average): {load:.1f}; above about 1.5, other work shared its cores, which lengthens wall "
        "times and their tails above all.", "",
        "`python -m benchmarks.routing_scale`", "",
        "Goals: " + ", ".join(f"{name} {goal:g}" for name, goal in GOALS.items()) + " (ms, share, ms).", "",
        "Search is dense and lexical together with its scores, without embedding. The decision beside it is the head "
        "of the change log, the words of the question and the choice.", "",
        "| Centroids | Tenants | Search p50 / p99, ms | CPU p50 / p99, ms | Decision beside it p50 / p99, ms | "
        "Recall of 10 nearest centroids | Same best document | Same five |", "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.rows:,} | {row.tenants:,} | {row.search.p50:.2f} / {row.search.p99:.2f} | "
            f"{row.search.cpu_p50:.2f} / {row.search.cpu_p99:.2f} | {row.decision.p50:.2f} / {row.decision.p99:.2f} | "
            f"{row.recall:.4f} | {row.same_best:.3f} | {row.same_five:.3f} |"
        )
    lines += [
        "", "An insert is visible when a search that began after it finds it: the time is of both together. Search "
        "with inserts: while another thread of the process inserts 20 documents a second, merging segments included.",
        "", "| Centroids | Tenants | Insert visible p50 / p99, ms | Search with inserts p50 / p99, ms | "
        "Memory, MB | Mapped files, MB | Peak of the process, MB | Load, s | Merge, s | Open from disk, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.rows:,} | {row.tenants:,} | {row.insert_visible.p50:.1f} / {row.insert_visible.p99:.1f} | "
            f"{row.while_inserting.p50:.2f} / {row.while_inserting.p99:.2f} | {row.index_bytes / 1e6:.1f} | "
            f"{row.file_bytes / 1e6:.1f} | {row.rss_bytes / 1e6:.0f} | {row.load_s:.1f} | {row.compact_s:.1f} | "
            f"{row.open_s:.2f} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--tenants", type=int, nargs="+", default=list(TENANTS))
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=Path, help="vectors of the texts, made where the file is missing")
    parser.add_argument("--case", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        seeds: Path = options.seeds or Path(scratch) / "seeds.npz"
        if not seeds.exists():
            make_seeds(seeds)
        if options.case:
            count, tenants = options.case
            row = measure(read_seeds(seeds), count, tenants, options.queries, Path(scratch))
            print(json.dumps(asdict(row)))
            return
        rows: list[Row] = []
        for count in options.rows:
            for tenants in options.tenants:
                if count >= 10 * PER_DOCUMENT * tenants:
                    rows.append(in_a_process(count, tenants, options.queries, seeds))
                    print(rows[-1], file=sys.stderr)
                    write(rows, options.output)


def in_a_process(count: int, tenants: int, asked: int, seeds: Path) -> Row:
    """`measure` in a process of its own, with one thread. Raises CalledProcessError."""
    command = [sys.executable, "-m", "benchmarks.routing_scale", "--case", str(count), str(tenants), "--queries",
               str(asked), "--seeds", str(seeds)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    found: dict[str, Any] = json.loads(answer.stdout)
    for name in ("search", "decision", "while_inserting", "insert_visible"):
        found[name] = Latency(**found[name])
    return Row(**found)


def write(rows: Sequence[Row], folder: Path) -> None:
    """Both files; after each case, so that a run that is cut short leaves what it has."""
    load = os.getloadavg()[1]
    (folder / "routing_scale.md").write_text(report(rows, load))
    body = {"machine": machine(), "load": load, "seed": SEED, "rows": [asdict(row) for row in rows]}
    (folder / "routing_scale.json").write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
