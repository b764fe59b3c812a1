"""Token sequences of one question: alone, or after a document, as the base's own chat template writes them."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast


def _turn(tokenizer: PreTrainedTokenizerFast, content: str) -> list[int]:
    text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False,
                                         add_generation_prompt=True)
    return list(tokenizer.encode(str(text), add_special_tokens=False))


def closed_book(tokenizer: PreTrainedTokenizerFast, question: str) -> list[int]:
    """The question as a user turn, up to where the answer begins. Raises ValueError without a chat template."""
    return _turn(tokenizer, question)


def in_context(tokenizer: PreTrainedTokenizerFast, document: str, question: str) -> list[int]:
    """The document and the question in one user turn, up to where the answer begins."""
    return _turn(tokenizer, f"{document.strip()}\n\n{question}")


def answer_ids(tokenizer: PreTrainedTokenizerFast, answer: str) -> list[int]:
    """The answer's tokens and the end of the turn, where the tokenizer names one."""
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return [*tokenizer.encode(answer, add_special_tokens=False), *end]
