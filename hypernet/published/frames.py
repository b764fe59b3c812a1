"""The chat turn in which a Doc-to-LoRA network reads a document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from hypernet.published.errors import CheckpointInvalid


@dataclass(frozen=True)
class Frame:
    """What stands before and after a document."""

    before: str
    after: str


TRAINED_WITH: Mapping[str, Frame] = {
    "gemma-2-2b-it": Frame("<bos><start_of_turn>user\n\n\n", "<end_of_turn>\n<start_of_turn>model\n"),
    "mistral-7b-instruct-v0.2": Frame("<s> [INST] \n\n", " [/INST] "),
}
"""By the base's name: frames that the published networks saw in training and the base's own template does not give.

Both come from a template that puts an empty system message and a blank line into the user's turn.
"""

_MARK = "DOCUMENT"


def short_name(name: str) -> str:
    """The last part of a model's name or path, in lower case: "gemma-2-2b-it" of "google/gemma-2-2b-it"."""
    return name.rstrip("/").rsplit("/", 1)[-1].lower()


def frame_for(base_name: str, tokenizer: Any) -> Frame:
    """The frame for a base: the one of the published network, else a user's turn in the base's own chat template.

    As in training, an empty system message comes first where the template has a place for one.
    Raises CheckpointInvalid where the tokenizer has no chat template that works.
    """
    known = TRAINED_WITH.get(short_name(base_name))
    if known:
        return known
    if not tokenizer.chat_template:
        raise CheckpointInvalid(f"the tokenizer of {base_name} has no chat template, and documents are read in a "
                                "user's turn; use the base's instruction-tuned form")
    user = {"role": "user", "content": _MARK}
    try:
        text = _render(tokenizer, [{"role": "system", "content": ""}, user])
    except TemplateError:
        text = _render_alone(base_name, tokenizer, user)
    before, mark, after = text.partition(_MARK)
    if not mark:
        raise CheckpointInvalid(f"the chat template of {base_name} leaves out the user's message")
    return Frame(before, after)


def _render_alone(base_name: str, tokenizer: Any, user: dict[str, str]) -> str:
    try:
        return _render(tokenizer, [user])
    except TemplateError as error:
        raise CheckpointInvalid(f"the chat template of {base_name} cannot render a user's turn: {error}") from error


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
