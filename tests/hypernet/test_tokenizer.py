"""The tokenizer: what goes in comes out, streamed or whole, and its template is what training feeds."""

from __future__ import annotations

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from hypernet.training.batches import Encoding
from hypernet.training.corpus.documents import Split, ask, sample_document
from hypernet.training.tokenizer import ASSISTANT, CONTROL, END, PAD

TEXTS = st.text(st.characters(codec="utf-8"), min_size=1) | st.lists(
    st.sampled_from(["word", " ", "  ", "\n", "\n\n", "7", "42", "£8", "- ", "| a |", ".", "é", "✓", "\t", "\r\n"]),
    min_size=1).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_round_trip_up_to_the_leading_space(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == " " + text


def test_vocabulary_and_markers(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) <= 1500
    assert [tokenizer.convert_tokens_to_ids(token) for token in CONTROL] == list(range(len(CONTROL)))
    assert tokenizer.convert_tokens_to_ids(ASSISTANT) == len(tokenizer) - 1
    assert (tokenizer.pad_token, tokenizer.eos_token) == (PAD, END)
    assert ASSISTANT not in tokenizer.all_special_tokens


def test_digits_are_single_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces = tokenizer.tokenize("room 2145")
    assert [piece for piece in pieces if piece.isdigit()] == ["2", "1", "4", "5"]


def test_a_word_has_one_form_everywhere(tokenizer: PreTrainedTokenizerFast) -> None:
    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    for word in ("Brelando", "Monday", "otter"):
        assert ids(f"see {word}") == ids("see") + ids(word)
        assert ids(f"see\n{word}") == ids("see\n") + ids(word)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_streamed_answer_after_a_chat_prompt_is_the_text(tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    rng = Random(seed)
    document = sample_document(rng, rng.randint(1, 4), Split.HELD_OUT)
    question = ask(document.facts[0], document, rng, Split.HELD_OUT)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": question.text}], add_generation_prompt=True,
                                           return_dict=False)
    # An engine shows the prompt to the stream and then feeds one token at a time.
    stream = DecodeStream(ids=prompt, skip_special_tokens=True)
    answer = tokenizer.encode(question.answer, add_special_tokens=False) + [tokenizer.eos_token_id]
    pieces = [stream.step(tokenizer._tokenizer, token) or "" for token in answer]
    assert "".join(pieces) == question.answer
    # A whole answer decoded behind its marker has no leading space either.
    marker = tokenizer.convert_tokens_to_ids(ASSISTANT)
    assert tokenizer.decode([marker, *answer], skip_special_tokens=True) == question.answer


def test_template_equals_the_training_encoding(tokenizer: PreTrainedTokenizerFast) -> None:
    encoding, rng = Encoding(tokenizer), Random(5)
    for _ in range(60):
        document = sample_document(rng, rng.randint(1, 8))
        question = ask(rng.choice(document.facts), document, rng)
        other = ask(rng.choice(document.facts), document, rng)

        def template(*turns: tuple[str, str], prompt: bool = True) -> list[int]:
            messages = [{"role": role, "content": content} for role, content in turns]
            return tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)

        closed = encoding.question(question.text, open_turn=False)
        in_turn = encoding.document(document.text) + encoding.question(question.text, open_turn=True)
        joined = f"{document.text}\n\n{question.text}"
        assert template(("user", question.text)) == closed
        assert template(("user", joined)) == in_turn
        assert template(("system", document.text), ("user", question.text)) == encoding.system(document.text) + closed
        turns = in_turn + encoding.answer(question.answer)
        assert template(("user", joined), ("assistant", question.answer), prompt=False) == turns
        assert template(("user", joined), ("assistant", question.answer),
                        ("user", other.text)) == turns + encoding.question(other.text, open_turn=False)
