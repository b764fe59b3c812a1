"""`imprint train`, as a person calls it; the trainings themselves are in tests/hypernet/test_adaptation_run.py."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner, Result

from hypernet.adaptation.settings import AdaptationSettings
from serve.cli import app
from tests.tiny_models import make_base


def run(*arguments: str | Path | int) -> Result:
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def write_documents(path: Path) -> Path:
    path.write_text("".join(json.dumps({"text": f"Price: {i + 20} euros.\nColour: red.\n"}) + "\n" for i in range(6)))
    return path


def test_a_training_from_the_command_line(tmp_path: Path) -> None:
    arguments = ("--base", make_base(tmp_path / "base"), "--documents", write_documents(tmp_path / "d.jsonl"), "--out",
                 tmp_path / "out", "--chunk-tokens", 64, "--questions", 1, "--answer-tokens", 4, "--question-source",
                 "templates", "--targets", "down_proj, q_proj", "--rank", 2, "--width", 16, "--heads", 2, "--steps", 2,
                 "--most-chunks", 1, "--device", "cpu")
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'out'}\n"
    assert "log-probability of a token" in result.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [target["name"] for target in config["network"]["targets"]] == ["down_proj", "q_proj"]
    other = run(*arguments, "--seed", 1)
    assert other.exit_code == 2 and "imprint: out: " in other.stderr and "seed (0 before, 1 now)" in other.stderr
    assert "Traceback" not in other.stderr and other.stdout == ""


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    result = run("--base", tmp_path)
    assert result.exit_code == 2 and "--documents, --out" in result.stderr


@pytest.mark.parametrize(("changes", "message"), [
    (("--documents", "none.txt"), "documents: "), (("--rank", 0), "rank: is 0; at least 1 is needed"),
    (("--base", "no/such-base"), "base: 'no/such-base' is neither a folder"),
    (("--targets", ""), "targets: "),
])
def test_errors_are_one_line(tmp_path: Path, changes: tuple[str | int, ...], message: str) -> None:
    documents = write_documents(tmp_path / "d.jsonl")
    (tmp_path / "base").mkdir()
    result = run("--base", tmp_path / "base", "--out", tmp_path / "out",
                 *([] if "--documents" in changes else ["--documents", documents]), *changes)
    assert result.exit_code == 2 and f"imprint: {message}" in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "out").exists()


def test_options_and_settings_agree() -> None:
    """Every option is a setting, with the same default."""
    group = get_command(app).commands["train"]  # type: ignore[attr-defined]
    known = {field.name: field.default for field in fields(AdaptationSettings)}
    for option in group.params:
        assert option.name in known, option.name
        if option.name == "targets":
            assert (option.default,) == known["targets"]
        elif option.name not in ("base", "documents", "out"):
            assert option.default == known[option.name], option.name


def test_nano_is_still_a_command() -> None:
    text = run("--help").stdout
    assert "nano" in text and "--documents" in text
    assert "--base-minutes" in run("nano", "--help").stdout
