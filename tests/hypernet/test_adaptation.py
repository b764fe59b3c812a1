"""Parts of the training for a new base: documents, questions, losses, order, evaluation, card, checkpoint folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from hypernet.adaptation.base import FrozenBase, Row, base_folder, labels_of, rows_of
from hypernet.adaptation.card import Data, card
from hypernet.adaptation.checkpoint import load_checkpoint, save_checkpoint
from hypernet.adaptation.corpus import Corpus, Passage, cut, read_documents
from hypernet.adaptation.curriculum import GroupSampler
from hypernet.adaptation.evaluate import Evaluation, Ways, evaluate, warnings_of
from hypernet.adaptation.losses import factor_size, top_k_divergence
from hypernet.adaptation.questions import Asked, QuestionAnswer, QuestionStore
from hypernet.adaptation.settings import AdaptationSettings, TrainingInputError
from hypernet.adaptation.state import Curve
from hypernet.adaptation.trainer import learning_rate
from hypernet.adaptation.workers import Place
from hypernet.documents import DocumentText
from hypernet.inject import targets_of
from hypernet.perceiver import HypernetConfig, Hypernetwork
from hypernet.published.errors import CheckpointInvalid
from tests.hypernet.published_helpers import BASES, write_base
from tests.tiny_models import make_base, make_tokenizer

COLOURS = ("red", "green", "blue", "black", "white", "brown")
LAMPS = [DocumentText(f"Lamp {i}", f"The lamp {i} costs {7 * i + 11} euros.\nColour: {COLOURS[i % 6]}")
         for i in range(8)]


def settings(**changes: object) -> AdaptationSettings:
    fields = {"base": "b", "documents": ("d",), "out": "o"} | changes
    return AdaptationSettings(**fields)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> FrozenBase:
    return FrozenBase(make_base(tmp_path_factory.mktemp("base")), device="cpu", precision="float32")


def corpus_of(base: FrozenBase, documents: Sequence[DocumentText] = LAMPS, seed: int = 0) -> Corpus:
    return cut(documents, base.tokenizer, 96, 128, 0.25, seed)


@pytest.fixture(scope="module")
def asked(base: FrozenBase, tmp_path_factory: pytest.TempPathFactory) -> list[Asked]:
    passages = corpus_of(base).training
    store = QuestionStore(tmp_path_factory.mktemp("questions"))
    store.ask(base, passages, 2, 6, "templates")
    return store.asked(passages)


def network_of(base: FrozenBase, names: tuple[str, ...] = ("down_proj",), seed: int = 0) -> Hypernetwork:
    torch.manual_seed(seed)
    config = base.model.config
    return Hypernetwork(HypernetConfig(
        features=(config.num_hidden_layers + 1) * config.hidden_size, layers=config.num_hidden_layers,
        targets=base.targets(names), rank=4, width=32, heads=2, max_tokens=200, chunk_tokens=96,
        base_fingerprint=base.fingerprint))


def test_documents_from_files_and_folders(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.md").write_text("# A\n\nFirst text.")
    (folder / "deep" / "b.txt").write_text("Second text.")
    (folder / "deep" / "copy.txt").write_text("Second text.\n")
    (folder / "image.png").write_bytes(b"\x89PNG")
    (folder / "empty.txt").write_text(" \n")
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps({"title": "T", "text": "Third text."}) + "\n\n" + json.dumps({"text": "Fourth."}))
    found = read_documents([folder, lines])
    assert [document.text for document in found] == ["# A\n\nFirst text.", "Second text.", "Third text.", "Fourth."]
    assert [document.title for document in found] == ["", "", "T", ""]


@pytest.mark.parametrize(("name", "content", "message"), [
    ("none", None, "does not exist"),
    ("binary.txt", b"\xff\xfe\x00", "cannot be read as UTF-8"),
    ("empty.txt", b"  ", "holds no text"),
    ("a.jsonl", b'{"title": "x"}\n', "line 1: is no JSON object with a string `text`"),
    ("b.jsonl", b'{"text": "x"}\n[1]\n', "line 2"),
])
def test_wrong_documents_are_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TrainingInputError, match=message) as caught:
        read_documents([path])
    assert str(caught.value).startswith("documents: ")


def test_held_out_documents_are_whole_and_the_split_is_stable(base: FrozenBase) -> None:
    corpus = corpus_of(base)
    assert corpus.by_document and corpus.short == 0
    assert len(corpus.held_out) == 2 and len(corpus.training) == len(LAMPS) - 2
    assert not {p.document for p in corpus.training} & {p.document for p in corpus.held_out}
    assert all(passage.text.startswith(f"Lamp {passage.document}\n\n") for passage in corpus.training)
    assert corpus.fingerprint == corpus_of(base).fingerprint
    assert corpus.fingerprint != corpus_of(base, seed=3).fingerprint
    assert corpus.fingerprint != corpus_of(base, LAMPS[:-1]).fingerprint


def test_one_long_document_holds_out_passages(base: FrozenBase) -> None:
    text = " ".join(f"Room {i} of the old house is kept by person number {i}." for i in range(30))
    corpus = corpus_of(base, [DocumentText("", text), DocumentText("", "Hi.")])
    assert not corpus.by_document and corpus.short == 1
    assert len(corpus.held_out) >= 2 and len(corpus.training) > 2
    assert not {p.text for p in corpus.training} & {p.text for p in corpus.held_out}


def test_documents_too_short(base: FrozenBase) -> None:
    with pytest.raises(TrainingInputError, match="too short: they give 0 passages of at least 12 tokens, and 4 are"):
        corpus_of(base, [DocumentText("", text) for text in ("Hi.", "Yes.", "No.", "Ok.")])


def test_answers_are_the_bases_own_and_asked_once(base: FrozenBase, tmp_path: Path) -> None:
    passages = corpus_of(base).training
    store = QuestionStore(tmp_path)
    store.ask(base, passages[:3], 2, 6, "auto", together=2)
    first = store.asked(passages)
    assert len(first) == 3 and store.missing(passages) == passages[3:]
    assert store.sources["templates"] == sum(len(one.questions) for one in first) and store.sources["base"] == 0
    row = first[0].in_context(base, 0)
    with torch.no_grad():
        likeliest = base.answer_logits([row]).argmax(-1)
    assert likeliest.tolist() == row.answer == list(first[0].questions[0].answer)
    text = base.tokenizer.decode(row.prompt)
    assert first[0].passage.text in text and first[0].questions[0].question in text
    closed = base.tokenizer.decode(first[0].closed(base, 0).prompt)
    assert first[0].questions[0].question in closed and first[0].passage.text not in closed

    # A kill in the middle of a line: that passage is asked again, the others are not.
    path = tmp_path / "questions-0.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:30])
    again = QuestionStore(tmp_path)
    assert again.missing(passages) == passages[2:]
    again.ask(base, again.missing(passages), 2, 6, "auto", together=4)
    assert path.read_text().startswith("".join(lines[:2]))
    assert again.missing(passages) == [] and again.asked(passages)[:3] == first


def test_a_batch_of_prompts_is_answered_as_each_alone(base: FrozenBase) -> None:
    prompts = [base.tokenizer.encode(text, add_special_tokens=False)
               for text in ("What does it cost?", "The lamp 3 costs 32 euros. What does the lamp cost?")]
    together = base.write(prompts, 5)
    assert together == [base.write([prompt], 5)[0] for prompt in prompts]
    assert all(1 <= len(answer) <= 5 for answer in together)


def test_divergence_of_the_likeliest_tokens() -> None:
    teacher = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.5, 0.0, 5.0, 0.0]])
    student = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    p, q = teacher.softmax(-1), student.softmax(-1)
    whole = float((p * (p / q).log()).sum())
    assert float(top_k_divergence(student, teacher, 16)) == pytest.approx(whole, rel=1e-5)
    two = sum(float(p[row, i] * (p[row, i] / q[row, i]).log()) for row, best in ((0, (0, 1)), (1, (2, 0)))
              for i in best)
    assert float(top_k_divergence(student, teacher, 2)) == pytest.approx(two, rel=1e-5)
    assert float(top_k_divergence(teacher, teacher, 3)) == pytest.approx(0.0, abs=1e-6)


def test_factor_size_is_the_mean_of_both_factors() -> None:
    one = (torch.full((2, 1, 3, 4), -0.5), torch.full((2, 1, 3, 5), 0.25))
    assert float(factor_size({"down_proj": one})) == pytest.approx(0.75)
    assert float(factor_size({"down_proj": one, "q_proj": (one[0] * 0, one[1] * 0)})) == pytest.approx(0.375)


def made_up(count: int, documents: int) -> list[Asked]:
    questions = (QuestionAnswer("a?", (1,)), QuestionAnswer("b?", (2,)))
    return [Asked(Passage(i * documents // count, f"text {i}"), questions) for i in range(count)]


def test_each_epoch_sees_every_passage_in_another_order() -> None:
    sampler = GroupSampler(made_up(10, 5), seed=1, questions=4)
    epochs = [[group.passages[0].passage.text for group in sampler.draw(10, 1)] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    assert sampler.position == {"epoch": 2, "at": 0}


def test_a_resumed_sampler_goes_on_with_the_same_groups() -> None:
    whole = GroupSampler(made_up(7, 3), seed=1, questions=3)
    whole.draw(9, 2)
    position = dict(whole.position)
    rest = [(whole.chunks(0.9, 0.5, 4), whole.draw(3, 2)) for _ in range(4)]
    resumed = GroupSampler(made_up(7, 3), seed=1, questions=3)
    resumed.seek(position)
    assert [(resumed.chunks(0.9, 0.5, 4), resumed.draw(3, 2)) for _ in range(4)] == rest
    other = GroupSampler(made_up(7, 3), seed=2, questions=3)
    other.seek(position)
    assert [other.draw(3, 2) for _ in range(4)] != [groups for _, groups in rest]


def test_one_passage_first_then_several() -> None:
    sampler = GroupSampler(made_up(12, 4), seed=0, questions=3)
    early, late = set(), []
    for _ in range(60):
        early.add(sampler.chunks(0.3, 0.8, 4))
        late.append(sampler.chunks(0.8, 0.8, 4))
        sampler.draw(1, 1)
    assert early == {1} and set(late) == {1, 2, 3, 4} and 15 < late.count(1) < 45
    for group in sampler.draw(12, 3):
        assert len({one.passage.text for one in group.passages}) == 3
        assert len(group.questions) == 3 == len(set(group.questions))
        documents = [one.passage.document for one in group.passages]
        at = [int(one.passage.text.split()[1]) for one in group.passages]
        # Three passages a document: from its first one all of it, in order.
        assert documents.count(documents[0]) == min(3, 3 - at[0] % 3)
    assert {group.questions[0][0] for group in sampler.draw(20, 3)} == {0, 1, 2}


def test_learning_rate_rises_and_falls() -> None:
    s = settings(steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate(step, s) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and max(rates) == 1.0
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.1 < rates[-1] < 0.11


def test_evaluation_by_hand(base: FrozenBase, asked: list[Asked]) -> None:
    network = network_of(base)
    found = evaluate(base, network, asked, step=3, size=2, several=2)
    assert found.step == 3 and found.passages == len(asked)
    assert found.questions == sum(len(one.questions) for one in asked)
    rows = [one.closed(base, i) for one in asked for i in range(len(one.questions))]
    opened = [one.in_context(base, i) for one in asked for i in range(len(one.questions))]
    owner = [n for n, one in enumerate(asked) for _ in one.questions]
    labels = labels_of(rows)
    with torch.no_grad():
        factors = base.factors(network, [one.passage.text for one in asked])
        for way, logits in (("base", base.answer_logits(rows)), ("in_context", base.answer_logits(opened)),
                            ("matched", base.answer_logits(rows, rows_of(factors, owner)))):
            mean = float(logits.log_softmax(-1).gather(-1, labels[:, None]).mean())
            assert getattr(found.log_probability, way) == pytest.approx(mean, abs=1e-4), way
    assert found.agreement.in_context == 1.0, "the reference is what the base itself writes"
    assert found.log_probability.wrong != pytest.approx(found.log_probability.matched, abs=1e-6)
    assert found.log_probability.several is not None and found.log_probability.several < 0
    assert found.factor_size == pytest.approx(float(factor_size(factors)), rel=0.05)
    assert Evaluation.from_json(json.loads(json.dumps(found.to_json()))) == found


def figures(matched: float, wrong: float, base_alone: float = -3.0, in_context: float = -1.0, size: float = 0.1,
            likeness: float = 0.3) -> Evaluation:
    return Evaluation(10, 4, 8, Ways(in_context, matched, wrong, base_alone), Ways(1.0, 0.5, 0.2, 0.1), size, likeness)


def test_early_warnings() -> None:
    assert warnings_of(figures(-2.0, -2.9), 1.0) == []
    assert figures(-2.0, -2.9).recovered == pytest.approx(0.5) and figures(-2.0, -2.9).margin == pytest.approx(0.9)
    assert "ignores its document" in warnings_of(figures(-2.0, -2.0), 0.5)[0]
    assert warnings_of(figures(-2.0, -2.0), 0.1) == [], "too early to tell"
    assert "lower the learning rate" in warnings_of(figures(-3.5, -3.9), 0.5)[0]
    assert "vanished" in warnings_of(figures(-2.0, -2.9, size=0.0), 0.0)[0]
    assert "alike" in warnings_of(figures(-2.0, -2.9, likeness=0.999), 0.2)[0]
    assert "little to learn" in warnings_of(figures(-2.0, -2.9, in_context=-2.95), 0.0)[0]
    assert figures(-2.0, -2.9, in_context=-3.0).recovered is None


def test_the_card_says_what_was_done() -> None:
    data = Data(40, 36, 4, False, 2, {"base": 5, "templates": 75})
    text = card(settings(steps=100), "tiny", "abc", 1234, data, 60, figures(-2.0, -2.9), ["beware"])
    for part in ("Hypernetwork for tiny", "`abc`", "60 of 100 steps", "5 written by the base, 75 by templates", "1,234",
                 "its adapter | -2.000 | 0.500", "0.50 of what", "+0.900 nats", "**Warning**: beware.", "2 too short",
                 "passages of the documents that are trained on too"):
        assert part in text, part
    assert "{" not in text


def test_checkpoint_folder(base: FrozenBase, tmp_path: Path) -> None:
    network = network_of(base)
    save_checkpoint(tmp_path, network, base.name, base.frame, 7)
    loaded, config = load_checkpoint(tmp_path)
    assert config.base_model == base.name and config.frame == base.frame and config.steps == 7
    assert config.network == network.config
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), loaded.state_dict().values(),
                                                 strict=True))
    assert json.loads((tmp_path / "config.json").read_text())["format"] == "perceiver"
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointInvalid, match="cannot be read"):
        load_checkpoint(tmp_path)
    for content, message in (("{}", "other fields"), ("[]", "other fields"), ("{", "JSON"),
                             ('{"format": "x", "format_version": 1}', "format 'x'")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(CheckpointInvalid, match=message):
            load_checkpoint(tmp_path)


@pytest.mark.parametrize("kind", sorted(BASES))
def test_any_base(kind: str, tmp_path: Path) -> None:
    """Factors and gradients for every architecture, and logits that are the model's own."""
    make_tokenizer().save_pretrained(write_base(tmp_path, kind))
    base = FrozenBase(tmp_path, device="cpu", precision="float32")
    network = network_of(base, ("down_proj", "q_proj"))
    assert network.config.targets == targets_of(base.model, ("down_proj", "q_proj"))
    rows = [Row(base.tokenizer.encode("What is it?"), [65, 66, 67]), Row(base.tokenizer.encode("Who?"), [68])]
    for i, row in enumerate(rows):
        ids = torch.tensor([row.prompt + row.answer])
        wanted = base.model(ids).logits[0, len(row.prompt) - 1:-1]
        at = 0 if i == 0 else 3
        assert torch.allclose(base.answer_logits(rows)[at:at + len(row.answer)], wanted, atol=1e-4)
    factors = base.factors(network, ["The lamp costs 4 euros.", "Ask Marta."])
    logits = base.answer_logits(rows, factors)
    assert logits.shape == (4, base.model.config.vocab_size)
    assert not torch.allclose(logits, base.answer_logits(rows), atol=1e-3)
    top_k_divergence(logits, base.answer_logits(rows).detach(), 16).backward()
    learning = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    assert all(torch.isfinite(gradient).all() for gradient in learning.values())
    for part in ("project", "positions", "latents", "reader.0", "perceiver.0", "heads.down_proj", "heads.q_proj"):
        assert any(float(grad.abs().sum()) > 0 for name, grad in learning.items() if name.startswith(part)), part
    assert all(p.grad is None for p in base.model.parameters())


def test_wrong_bases(tmp_path: Path) -> None:
    with pytest.raises(TrainingInputError, match="base: 'no/such-model' is neither a folder nor a model in Hugging"):
        base_folder("no/such-model")
    with pytest.raises(TrainingInputError, match="base: .* cannot be loaded"):
        FrozenBase(tmp_path)
    folder = make_base(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    with pytest.raises(TrainingInputError, match="base: the tokenizer of base has no chat template"):
        FrozenBase(folder)


def test_wrong_targets(base: FrozenBase) -> None:
    with pytest.raises(TrainingInputError, match="targets: .*down_proj, up_proj"):
        base.targets(("c_proj",))


@pytest.mark.parametrize(("changes", "message"), [
    ({"steps": 0}, "steps: is 0; at least 1"), ({"held_out": 0.0}, "held_out: is 0.0"),
    ({"width": 30, "heads": 4}, "width: 30 is no multiple of heads, 4"),
    ({"question_source": "oracle"}, "question_source: is 'oracle'; auto, base, templates"),
    ({"device": "tpu"}, "device: is 'tpu'"), ({"learning_rate": float("nan")}, "learning_rate: is nan"),
    ({"single_share": 1.5}, "single_share"), ({"chunk_tokens": 3}, "chunk_tokens: is 3; at least 16"),
])
def test_wrong_settings_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(TrainingInputError, match=message):
        settings(**changes)


def test_settings_survive_a_file(tmp_path: Path) -> None:
    mine = settings(documents=("a", "b"), rank=4)
    mine.write(tmp_path / "s.json")
    assert AdaptationSettings.read(tmp_path / "s.json") == mine
    assert settings(rank=8, steps=7, learning_rate=1.0).differences(mine) == ["rank (4 before, 8 now)"]
    (tmp_path / "s.json").write_text('{"base": 1}')
    with pytest.raises(TrainingInputError, match="settings of a training"):
        AdaptationSettings.read(tmp_path / "s.json")


def test_a_curve_is_cut_back(tmp_path: Path) -> None:
    curve = Curve(tmp_path / "steps.jsonl")
    for step in (1, 2, 3):
        curve.add({"step": step})
    with curve.path.open("a") as file:
        file.write('{"step": 4')
    curve.keep_until(2)
    curve.add({"step": 3, "again": True})
    assert curve.read() == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_place_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Place.from_environment() == Place(0, 0, 1)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert Place.from_environment() == Place(5, 1, 8)
