"""Documents to adapters with a tiny random pair: shapes, chunks, mismatches, independence of the batch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from hypernet.documents import DocumentError, DocumentText
from hypernet.fingerprint import fingerprint_folder
from hypernet.generate import CheckpointMismatch, GeneratedAdapter, GeneratedDocument, HypernetGenerator
from hypernet.lora import LoraAdapter, validate_folder
from hypernet.reader import NativeReader
from tests.hypernet.helpers import HIDDEN, INNER, LAYERS, deltas

SHORT = DocumentText("Lamp", "The lamp costs $4.20.")
OTHER = DocumentText("", "Room 214 is closed on Monday.\nAsk Marta Ellison.")
LONG = DocumentText("Lamps", " ".join(f"Lamp {i} stands in room {i}0 and costs {i} euros." for i in range(1, 9)))


@pytest.fixture(scope="module")
def generator(pair: tuple[Path, Path]) -> HypernetGenerator:
    return HypernetGenerator.load(pair[1], pair[0], max_rank=16, max_parts=1, threads=1)


def only(made: GeneratedDocument) -> GeneratedAdapter:
    part, = made.parts
    return part


def generate(generator: HypernetGenerator, documents: list[DocumentText]) -> list[GeneratedAdapter]:
    """Of documents of one part each."""
    return [only(made) for made in generator.generate(documents)]


def native(generator: HypernetGenerator) -> NativeReader:
    assert isinstance(generator.reader, NativeReader)
    return generator.reader


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for path, update in one.items():
        assert torch.allclose(update, other[path], atol=1e-5), path


def test_one_document(generator: HypernetGenerator, pair: tuple[Path, Path], tmp_path: Path) -> None:
    made, = generate(generator, [SHORT])
    assert made.lora.rank == made.lora.alpha == 4
    assert len(made.lora.tensors) == 2 * LAYERS and made.lora.target_modules == ("down_proj", "q_proj")
    a, b = made.lora.tensors["model.layers.1.mlp.down_proj"]
    assert a.shape == (4, INNER) and b.shape == (HIDDEN, 4)
    chunk, = made.chunks
    assert (chunk.index, chunk.start, chunk.end) == (0, 0, len(SHORT.text)) and 5 < chunk.tokens < 40
    assert all(seconds >= 0 for seconds in made.seconds.values()) and "hypernetwork" in made.seconds
    made.lora.save(tmp_path)
    validate_folder(tmp_path, AutoConfig.from_pretrained(pair[0]), max_rank=4)


def test_fingerprints(generator: HypernetGenerator, pair: tuple[Path, Path]) -> None:
    assert generator.base_fingerprint == fingerprint_folder(pair[0])
    assert generator.base_fingerprint == native(generator).network.config.base_fingerprint
    assert generator.fingerprint == fingerprint_folder(pair[1]) != generator.base_fingerprint


def test_batch_does_not_matter(generator: HypernetGenerator, pair: tuple[Path, Path]) -> None:
    together = generate(generator, [SHORT, LONG, OTHER])
    assert len({len(made.chunks) for made in together}) > 1
    single = HypernetGenerator.load(pair[1], pair[0], max_rank=16, batch_chunks=1, max_parts=1)
    for document, made in zip([SHORT, LONG, OTHER], together, strict=True):
        assert_same(deltas(made.lora), deltas(generate(generator, [document])[0].lora))
        assert_same(deltas(made.lora), deltas(generate(single, [document])[0].lora))
    one, other = deltas(together[0].lora), deltas(together[2].lora)
    assert max(float((one[path] - other[path]).abs().max()) for path in one) > 1e-3


def passes_of(generator: HypernetGenerator, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The chunks' lengths in each pass from now on."""
    passes: list[list[int]] = []
    adapters = generator.reader.adapters

    def count(chunks: Sequence[list[int]]) -> list[LoraAdapter]:
        passes.append([len(chunk) for chunk in chunks])
        return adapters(chunks)

    monkeypatch.setattr(generator.reader, "adapters", count)
    return passes


def test_a_pass_holds_few_tokens_or_one_chunk(generator: HypernetGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [SHORT, OTHER, LONG, SHORT]
    wanted = generate(generator, documents)
    passes = passes_of(generator, monkeypatch)
    monkeypatch.setattr("hypernet.generate.BATCH_TOKENS", 60)
    found = generate(generator, documents)
    assert sum(map(len, passes)) == sum(len(made.chunks) for made in found)
    assert all(len(lengths) == 1 or len(lengths) * max(lengths) <= 60 for lengths in passes)
    assert 1 < len(passes) < sum(map(len, passes))
    for one, other in zip(wanted, found, strict=True):
        assert_same(deltas(one.lora), deltas(other.lora))


def test_only_chunks_of_like_length_share_a_pass(generator: HypernetGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their order; the adapters are those of chunks that are made alone, or all in one pass."""
    documents = [DocumentText("", "The lamp costs 4 euros. " * count) for count in (1, 3, 1, 2, 3, 1)]
    alone = [generate(generator, [document])[0] for document in documents]
    passes = passes_of(generator, monkeypatch)
    found = generate(generator, documents)
    assert len(passes) > 1 and max(map(len, passes)) > 1
    assert all(max(lengths) <= 2 * min(lengths) for lengths in passes)
    passes.clear()
    monkeypatch.setattr("hypernet.generate.MAX_SPREAD", 100.0)
    together = generate(generator, documents)
    assert len(passes) == 1 and max(passes[0]) > 2 * min(passes[0])
    for one, two, three in zip(alone, found, together, strict=True):
        assert one.chunks == two.chunks == three.chunks
        assert_same(deltas(one.lora), deltas(two.lora))
        assert_same(deltas(one.lora), deltas(three.lora))


def test_several_chunks_concatenate_ranks(generator: HypernetGenerator) -> None:
    made, = generate(generator, [LONG])
    assert 1 < len(made.chunks) <= generator.limits.all_chunks == 4
    assert made.lora.rank == 4 * len(made.chunks)
    assert [chunk.index for chunk in made.chunks] == list(range(len(made.chunks)))
    parts = [DocumentText("", chunk.text) for plan in generator.plan(LONG) for chunk in plan]
    alone = generate(generator, parts)
    assert all(len(part.chunks) == 1 for part in alone)
    updates = [deltas(part.lora) for part in alone]
    assert_same(deltas(made.lora), {path: torch.stack([update[path] for update in updates]).sum(0)
                                    for path in updates[0]})


def test_all_chunks_fit_the_hypernetwork(generator: HypernetGenerator) -> None:
    words = DocumentText("Lamps", "lamp " * 60)
    for made in generate(generator, [LONG, words, DocumentText("x" * 30, "y" * 90)]):
        most = native(generator).network.config.max_tokens
        assert all(chunk.tokens <= most for chunk in made.chunks)


def test_generating_twice_gives_the_same(generator: HypernetGenerator) -> None:
    first, second = (generate(generator, [LONG])[0] for _ in range(2))
    assert all(torch.equal(update, deltas(second.lora)[path]) for path, update in deltas(first.lora).items())


def test_known_chunks_are_not_cut_again(generator: HypernetGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [LONG, SHORT]
    plain, plans = generate(generator, documents), [generator.plan(document) for document in documents]
    monkeypatch.delattr(HypernetGenerator, "plan")
    for one, other in zip(plain, map(only, generator.generate(documents, plans)), strict=True):
        assert_same(deltas(one.lora), deltas(other.lora))
        assert one.chunks == other.chunks and "chunk" in one.seconds and "chunk" not in other.seconds


VERY_LONG = DocumentText("Lamps", " ".join(f"Lamp {i} stands in room {i}0 and costs {i} euros." for i in range(1, 40)))


def test_a_long_document_becomes_parts(pair: tuple[Path, Path], generator: HypernetGenerator) -> None:
    """Each within the rank cap, each as its chunks alone would give, together covering all of the text in order."""
    parted = HypernetGenerator.load(pair[1], pair[0], max_rank=16, chunks_per_part=2, max_parts=20)
    short, made, other = parted.generate([SHORT, VERY_LONG, OTHER])
    assert len(short.parts) == len(other.parts) == 1 and len(made.parts) > 5
    assert {len(part.chunks) for part in made.parts} <= {1, 2}
    assert all(part.lora.rank == 4 * len(part.chunks) and part.kept_energy is None for part in made.parts)
    chunks = [chunk for part in made.parts for chunk in part.chunks]
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert "".join(VERY_LONG.text[chunk.start:chunk.end] for chunk in chunks) == VERY_LONG.text
    for planned, part in zip(parted.plan(VERY_LONG), made.parts, strict=True):
        alone = generate(generator, [DocumentText("", chunk.text) for chunk in planned])
        updates = [deltas(one.lora) for one in alone]
        assert_same(deltas(part.lora), {path: torch.stack([update[path] for update in updates]).sum(0)
                                        for path in updates[0]})


def test_where_parts_are_few_chunks_grow(pair: tuple[Path, Path]) -> None:
    few, many = (HypernetGenerator.load(pair[1], pair[0], max_rank=16, chunks_per_part=4, max_parts=most)
                 for most in (4, 20))
    plan = few.plan(VERY_LONG)
    assert len(plan) <= 4 < len(many.plan(VERY_LONG)) and all(len(part) <= 4 for part in plan)


def test_beyond_all_parts_a_document_is_refused(pair: tuple[Path, Path]) -> None:
    two = HypernetGenerator.load(pair[1], pair[0], max_rank=16, chunks_per_part=2, max_parts=2)
    with pytest.raises(DocumentError, match=r"^text: is too long: .* a document may have 2 parts of 2 chunks$"):
        two.plan(DocumentText("", VERY_LONG.text * 2))


def test_merging_keeps_one_adapter_within_the_rank(pair: tuple[Path, Path], generator: HypernetGenerator) -> None:
    merging = HypernetGenerator.load(pair[1], pair[0], max_rank=16, max_parts=20, long_documents="merge")
    made, fits = generate(merging, [VERY_LONG, LONG])
    assert len(made.chunks) > 8 and made.lora.rank == 16
    assert made.kept_energy is not None and 0.2 < made.kept_energy < 1
    assert fits.kept_energy is None
    assert_same(deltas(fits.lora), deltas(generate(generator, [LONG])[0].lora))
    whole, kept = 0.0, 0.0
    alone = generate(generator, [DocumentText("", chunk.text) for chunk in merging.plan(VERY_LONG)[0]])
    updates = [deltas(one.lora) for one in alone]
    for path, merged in deltas(made.lora).items():
        values = torch.linalg.svdvals(torch.stack([update[path] for update in updates]).sum(0))
        whole, kept = whole + float(values.square().sum()), kept + float(values[:16].square().sum())
        assert torch.allclose(torch.linalg.svdvals(merged)[:16], values[:16], rtol=1e-3, atol=1e-4)
    assert made.kept_energy == pytest.approx((kept / whole) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("setting", [{"chunks_per_part": 0}, {"chunks_per_part": 5}, {"max_parts": 0},
                                     {"batch_chunks": 0}, {"long_documents": "cut"}])
def test_settings_out_of_range_are_refused(pair: tuple[Path, Path], setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(setting))}: is .*(allowed|needed)"):
        HypernetGenerator.load(pair[1], pair[0], max_rank=16, **setting)


def test_no_documents(generator: HypernetGenerator) -> None:
    assert generator.generate([]) == []


def test_unfit_documents(generator: HypernetGenerator) -> None:
    for document, message in ((DocumentText("Lamp", " \n "), "is empty"),
                              (DocumentText("", "The lamp is red. " * 300), "tokens")):
        with pytest.raises(DocumentError, match=message):
            generator.plan(document)
        with pytest.raises(DocumentError, match=message):
            generator.generate([SHORT, document])


def test_another_base_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    changed = tmp_path / "base"
    shutil.copytree(pair[0], changed)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    with pytest.raises(CheckpointMismatch, match="was trained for base"):
        HypernetGenerator.load(pair[1], changed)


def test_too_small_a_rank_is_refused(pair: tuple[Path, Path]) -> None:
    with pytest.raises(CheckpointMismatch, match="max_lora_rank 2 is below"):
        HypernetGenerator.load(pair[1], pair[0], max_rank=2)


def test_unknown_kinds_of_checkpoint_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(pair[1], tmp_path / "hypernetwork")
    config = tmp_path / "hypernetwork" / "config.json"
    for kind, message in (("later-kind", "'later-kind'.*cannot run"), ("text-to-lora", "task descriptions")):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"format": kind}))
        with pytest.raises(CheckpointMismatch, match=message):
            HypernetGenerator.load(tmp_path / "hypernetwork", pair[0])


def test_missing_folders(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        HypernetGenerator.load(tmp_path / "none", pair[0])
    with pytest.raises(FileNotFoundError):
        HypernetGenerator.load(pair[1], tmp_path)
