"""A sentence-transformers model run by ONNX Runtime, which takes half of torch's time for one question on a CPU
(`benchmarks/encoder_speed.py`)."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor

Vectors = npt.NDArray[np.float32]

_BATCH = 32
_LEAST_COSINE = 0.9999
_OUTPUT = "sentence_embedding"
_SAMPLES = ("Does it work?", "A second text, which is longer than the first one, so that that one is padded.", "Yes.")


_sessions: dict[tuple[str, int], onnxruntime.InferenceSession] = {}
"""The last one made, by version and threads: who loads the same encoder again has it at once."""


class NotTheSame(Exception):
    """The exported model gives other vectors than the model, or it cannot be exported."""


class OnnxModel:
    """All modules of a model, from tokens to vectors, as one graph. Not thread-safe."""

    def __init__(self, model: Any, version: str, threads: int) -> None:
        """`model` is a SentenceTransformer of text, loaded on the CPU, and `version` tells its weights from others.
        Only its tokenizer is used from then on, and its weights are let go. The first one of a version in a process
        takes some seconds. Raises NotTheSame, and leaves the model as it is."""
        self._model = model
        key = version, threads
        if key not in _sessions:
            self._session = _session(model, threads)
            self._compare()
            _sessions.clear()
            _sessions[key] = self._session
        self._session = _sessions[key]
        for weights in (*model.parameters(), *model.buffers()):
            weights.data = torch.empty(0)

    def encode(self, texts: Sequence[str]) -> Vectors:
        """One row for each text: float32 [texts, dimension], L2-normalised."""
        names = [one.name for one in self._session.get_inputs()]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # a batch is padded to its longest text
        made: list[Vectors] = []
        for start in range(0, len(order), _BATCH):
            given = _tokens(self._model, [texts[i] for i in order[start : start + _BATCH]])
            (vectors,) = self._session.run([_OUTPUT], {name: given[name].numpy() for name in names})
            made.append(vectors)
        rows = np.concatenate(made)
        result = np.empty_like(rows)
        result[order] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return result

    def _compare(self) -> None:
        wanted = self._model.encode(list(_SAMPLES), normalize_embeddings=True, show_progress_bar=False)
        together, alone = self.encode(_SAMPLES), np.concatenate([self.encode([text]) for text in _SAMPLES])
        cosine = min(float((vectors * wanted).sum(axis=1).min()) for vectors in (together, alone))
        if not cosine >= _LEAST_COSINE:
            raise NotTheSame(f"a vector's cosine to the model's own is {cosine:.6f}")


def _session(model: Any, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Texts of ever new lengths would make it keep memory for each.
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    try:
        graph = _exported(model, _tokens(model, _SAMPLES))
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise NotTheSame(f"it cannot be exported: {error}") from error


class _Vectors(torch.nn.Module):
    """A model as a function of its tensors alone."""

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        super().__init__()
        self._model, self._names = model, names

    def forward(self, *tensors: Tensor) -> Tensor:
        vectors: Tensor = self._model(dict(zip(self._names, tensors, strict=True)))[_OUTPUT]
        return vectors


def _tokens(model: Any, texts: Sequence[str]) -> Mapping[str, Tensor]:
    return {name: value for name, value in model.preprocess(list(texts)).items() if isinstance(value, Tensor)}


def _exported(model: Any, given: Mapping[str, Tensor]) -> bytes:
    """The graph with any number of texts and tokens, as ONNX."""
    names = list(given)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.inference_mode():
        # The newer exporter would need onnxscript, and takes ten times as long.
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            _Vectors(model, names).eval(),
            tuple(given.values()),
            path,
            dynamo=False,
            input_names=names,
            output_names=[_OUTPUT],
            dynamic_axes={name: {0: "texts", 1: "tokens"} for name in names} | {_OUTPUT: {0: "texts"}},
        )
        return path.read_bytes()
