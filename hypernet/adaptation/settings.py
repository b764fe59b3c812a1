"""What a training is asked to do, and what may not change when it is resumed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

QUESTION_SOURCES = ("auto", "base", "templates")
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "float32", "bfloat16")
_MAY_CHANGE = {"out", "base", "documents", "steps", "warmup_steps", "learning_rate", "evaluate_every", "save_every",
               "accumulation", "workers", "device", "precision", "log_every"}


class TrainingInputError(ValueError):
    """The training cannot start; the message names the setting, what is wrong and what is allowed."""


@dataclass(frozen=True)
class AdaptationSettings:
    """One training. Tokens are the base's own; a step is one update of the hypernetwork by all workers together.

    Data: documents are cut into passages of about `chunk_tokens` tokens. For each, `questions` questions are written
    (`question_source`: by the base, by templates, or "auto": by templates where the base gives too few) and answered by
    the base in at most `answer_tokens` tokens. A share `held_out` of the documents is never trained on.

    Network: the sizes of `hypernet.perceiver.Hypernetwork`, and the modules that get a LoRA.

    Steps: `batch_chunks` passages and up to `questions_a_group` questions for each adapter in a pass of a worker,
    `accumulation` passes in a step. Adapters are of one passage for the first `single_share` of the steps, then half
    of them of 2 to `most_chunks`, as in Doc-to-LoRA (80% and up to 8; arXiv 2602.15902). `top_k` and `l1` are the
    terms of the loss, see `hypernet.adaptation.losses`.
    """

    base: str
    documents: tuple[str, ...]
    out: str
    chunk_tokens: int = 256
    questions: int = 6
    answer_tokens: int = 48
    question_source: str = "auto"
    held_out: float = 0.1
    targets: tuple[str, ...] = ("down_proj",)
    rank: int = 8
    width: int = 512
    heads: int = 8
    reader_blocks: int = 2
    perceiver_blocks: int = 4
    steps: int = 20_000
    warmup_steps: int = 200
    learning_rate: float = 3e-4
    batch_chunks: int = 8
    questions_a_group: int = 4
    accumulation: int = 2
    single_share: float = 0.8
    most_chunks: int = 4
    top_k: int = 16
    l1: float = 0.1
    evaluate_every: int = 500
    evaluate_passages: int = 64
    save_every: int = 200
    log_every: int = 10
    seed: int = 0
    workers: int = 1
    device: str = "auto"
    precision: str = "auto"

    def __post_init__(self) -> None:
        """Raises TrainingInputError for the first setting that is out of range."""
        for name in ("chunk_tokens", "questions", "answer_tokens", "rank", "width", "heads", "perceiver_blocks",
                     "steps", "batch_chunks", "questions_a_group", "accumulation", "most_chunks", "top_k",
                     "evaluate_every", "save_every", "log_every", "workers"):
            if getattr(self, name) < 1:
                raise TrainingInputError(f"{name}: is {getattr(self, name)}; at least 1 is needed")
        for name in ("targets", "documents"):
            if not getattr(self, name):
                raise TrainingInputError(f"{name}: is empty; at least one is needed")
        if self.chunk_tokens < 16:
            raise TrainingInputError(f"chunk_tokens: is {self.chunk_tokens}; at least 16 is needed")
        if self.evaluate_passages < 2:
            raise TrainingInputError(f"evaluate_passages: is {self.evaluate_passages}; at least 2 are needed, since "
                                     "adapters of other documents are compared too")
        if not 0 < self.held_out <= 0.5:
            raise TrainingInputError(f"held_out: is {self.held_out}; above 0 and at most 0.5 is allowed")
        if not 0 <= self.single_share <= 1:
            raise TrainingInputError(f"single_share: is {self.single_share}; 0 to 1 is allowed")
        if not self.learning_rate > 0:
            raise TrainingInputError(f"learning_rate: is {self.learning_rate}; above 0 is needed")
        if self.width % self.heads:
            raise TrainingInputError(f"width: {self.width} is no multiple of heads, {self.heads}")
        for name, allowed in (("question_source", QUESTION_SOURCES), ("device", DEVICES), ("precision", PRECISIONS)):
            if getattr(self, name) not in allowed:
                raise TrainingInputError(f"{name}: is '{getattr(self, name)}'; {', '.join(allowed)} are allowed")

    @property
    def folder(self) -> Path:
        """Where the trained hypernetwork goes."""
        return Path(self.out)

    @property
    def work(self) -> Path:
        """Where the run keeps what it needs to go on: settings, questions, state and curves."""
        return Path(self.out) / "training"

    def differences(self, other: AdaptationSettings) -> list[str]:
        """Settings that make this another training than `other`, each with both values."""
        return [f"{field.name} ({getattr(other, field.name)} before, {getattr(self, field.name)} now)"
                for field in fields(self)
                if field.name not in _MAY_CHANGE and getattr(self, field.name) != getattr(other, field.name)]

    def write(self, path: Path) -> None:
        """To a JSON file."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @staticmethod
    def read(path: Path) -> AdaptationSettings:
        """From a JSON file. Raises TrainingInputError where it is no such file."""
        try:
            values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value
                                      for key, value in json.loads(path.read_text()).items()}
            return AdaptationSettings(**values)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise TrainingInputError(f"{path}: cannot be read as the settings of a training: {error}") from error
