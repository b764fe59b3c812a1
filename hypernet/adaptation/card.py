"""The model card: what the hypernetwork in a folder is, what it was trained on, what it does, what it cannot do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hypernet.adaptation.evaluate import Evaluation, Ways
from hypernet.adaptation.settings import AdaptationSettings

_WAYS = (("document in the prompt", "in_context"), ("its adapter", "matched"), ("adapter of another document", "wrong"),
         ("base alone", "base"), ("adapter joined of {several} passages", "several"))


@dataclass(frozen=True)
class Data:
    """What was trained on, counted. `sources`: questions by who wrote them."""

    documents: int
    training: int
    held_out: int
    by_document: bool
    short: int
    sources: Mapping[str, int]


def _figure(ways: Ways, name: str) -> str:
    return f"{getattr(ways, name):.3f}"


def card(settings: AdaptationSettings, base_model: str, fingerprint: str, parameters: int, data: Data, steps: int,
         evaluation: Evaluation, warnings: list[str]) -> str:
    """The card as Markdown."""
    s = settings
    share = "-" if evaluation.recovered is None else f"{evaluation.recovered:.2f}"
    rows = [f"| {title.format(several=s.most_chunks)} | {_figure(evaluation.log_probability, name)} | "
            f"{_figure(evaluation.agreement, name)} |" for title, name in _WAYS
            if getattr(evaluation.agreement, name) is not None]
    split = "whole documents" if data.by_document else "passages of the documents that are trained on too"
    warned = "\n".join(f"- **Warning**: {text}." for text in warnings) or "- No warning came up."
    spread = (f"{s.single_share:.0%} of the steps one passage an adapter, then half of the passes with 2 to "
              f"{s.most_chunks}" if s.most_chunks > 1 and s.single_share < 1 else "one passage an adapter")
    return f"""# Hypernetwork for {base_model}

Turns a document into a LoRA adapter of {base_model} in one forward pass. Made by `imprint train`.

| | |
|---|---|
| base | {base_model}, fingerprint `{fingerprint}`; no other base can use it |
| adapters | rank {s.rank} for each passage of about {s.chunk_tokens} tokens, on {', '.join(s.targets)} |
| size | {parameters:,} parameters |
| documents | {data.documents}: {data.training} passages for training, {data.held_out} held out ({split}); \
{data.short} too short and left out |
| questions | {data.sources.get('base', 0)} written by the base, {data.sources.get('templates', 0)} by templates; all \
answers by the base with the passage in its prompt |
| training | {steps} of {s.steps} steps, {s.batch_chunks * s.accumulation * s.workers} passages a step, learning rate \
{s.learning_rate:g}, {spread} |
| loss | KL to the base with the passage in its prompt, on its {s.top_k} likeliest tokens, plus {s.l1:g} (mean abs A + \
mean abs B) (arXiv 2602.15902) |

## Figures

{evaluation.questions} questions on {evaluation.passages} held-out passages, closed book unless said otherwise. The \
reference is the base's own answer with the passage in its prompt.

| | mean log-probability of a token | share of tokens predicted |
|---|---|---|
{chr(10).join(rows)}

The adapter gives {share} of what the document in the prompt gives. It is {evaluation.margin:+.3f} nats a token better
than the adapter of another document.

{warned}

## Limits

- The figures are of predicted tokens, not of free answers, and of documents like those trained on. Ask your own
  questions before you rely on it.
- The base's mistakes are learnt with its answers.
- It was not trained to leave questions about other matters alone, nor to work beside a document in the prompt.
"""


def write_card(folder: Path, text: str) -> None:
    """Put the card into the folder as README.md, in one step."""
    partial = folder / ".README.md.partial"
    partial.write_text(text)
    partial.replace(folder / "README.md")
