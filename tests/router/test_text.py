"""Words and sentences of texts."""

from __future__ import annotations

import router.text
from router.text import heading, sentences, words


def test_words_keep_names_codes_and_numbers_and_drop_common_words() -> None:
    assert words("What is the price of the Corvo's T-100, 12.50 or 3?") == {"price", "corvo", "t", "100", "12.50", "3"}


def test_words_fold_case_and_plural() -> None:
    assert words("Employees GLASS Boss bus") == words("employee glass boss bus")


def test_words_of_other_scripts_and_of_nothing() -> None:
    assert words("Köln straße") == {"köln", "strasse"}
    assert words("") == words(" ?!\n") == frozenset()


def test_the_number_of_words_is_bounded() -> None:
    assert len(words(" ".join(f"w{i}x" for i in range(30_000)))) == router.text.MAX_WORDS


def test_sentences_of_prose_lists_and_tables() -> None:
    text = "# Title\n\nOne weighs 3.5 kg. Two does not!\n- Price: 3\n| | |\n|---|---|\n| Pets | none |\n***"
    assert sentences(text) == ["Title", "One weighs 3.5 kg.", "Two does not!", "Price: 3", "Pets | none"]


def test_heading_is_the_title_or_the_start() -> None:
    assert heading(" Corvo ", "Text.") == "Corvo"
    assert heading(" ", "\n## Corvo Mini\nIt is red.") == "Corvo Mini"
    assert heading("", " \n ") == ""
