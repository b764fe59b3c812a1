"""Distillation on tiny random bases of every supported architecture: real PEFT, real gradients, real generation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from hypernet import nano
from hypernet.answers import answer_greedily, end_tokens
from hypernet.distill import REFINE, DistillCancelled, Distiller, DistillGenerator, DistillSettings
from hypernet.distill_loop import trainable
from hypernet.distill_questions import GENERAL, assign, training_questions
from hypernet.distill_teacher import Exercise, Targets, answer_with_likeliest, divergence, predict, teach
from hypernet.documents import Chunk, DocumentError, DocumentText
from hypernet.evaluation.scoring import contains_value, exact_match
from hypernet.generate import HypernetGenerator
from hypernet.inject import MODULE_PARENTS, adapted
from hypernet.lora import LoraAdapter, factors_of, validate_folder
from hypernet.probes import find_facts
from hypernet.prompts import answer_ids, closed_book, in_context
from tests.hypernet.helpers import random_lora
from tests.tiny_models import make_base, make_tokenizer

DOCUMENT = DocumentText("Harbour Pool", "Opening time: 7:30\nManager: Ada Byron\nThe code of the locker is K9.")
QUESTIONS = ("What is the opening time of Harbour Pool?", "Who is the manager?", "What is the code of the locker?")
QUICK = DistillSettings(steps=4, own_questions=0, answer_tokens=6)


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def traits(model: PreTrainedModel) -> list[tuple[str, str, bool]]:
    """What wrapping could leave behind, apart from weights."""
    return [(name, type(module).__name__, module.training) for name, module in model.named_modules()] + \
        [(name, "parameter", parameter.requires_grad) for name, parameter in model.named_parameters()] + \
        [("hooks", str(sum(len(module._forward_hooks) for module in model.modules())), hasattr(model, "peft_config"))]


def assert_unchanged(model: PreTrainedModel, before: dict[str, Tensor], was: list[tuple[str, str, bool]]) -> None:
    assert traits(model) == was
    now = model.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], before[name]) for name in before)


def loss_of(base: PreTrainedModel, lora: LoraAdapter, targets: Targets) -> float:
    """Mean KL of the adapter as the rest of the project applies it, not through PEFT."""
    rows = targets.ids.size(0)
    with adapted(base, factors_of([lora] * rows)), torch.no_grad():
        return float(divergence(predict(base, targets), targets)[0]) / targets.tokens


@pytest.fixture
def base(llama: LlamaForCausalLM) -> LlamaForCausalLM:
    llama.requires_grad_(False)
    return llama


def test_steps_lower_the_loss_and_the_exported_adapter_has_it(base: LlamaForCausalLM,
                                                              tokenizer: PreTrainedTokenizerFast) -> None:
    made = Distiller(base, tokenizer, DistillSettings(steps=30, answer_tokens=6, rank=4)).distill(DOCUMENT, QUESTIONS)
    assert made.loss < 0.7 * made.first_loss
    assert made.lora.rank == 4
    assert made.lora.target_modules == tuple(sorted(MODULE_PARENTS))
    assert made.questions == 3
    text = f"{DOCUMENT.title}\n\n{DOCUMENT.text}"
    targets = teach(base, tokenizer, [Exercise(text, question) for question in QUESTIONS], 16, 6)
    assert loss_of(base, made.lora, targets) == pytest.approx(made.loss, rel=1e-3, abs=1e-5)


def test_start_with_another_scale_keeps_its_update_and_its_modules(base: LlamaForCausalLM,
                                                                   tokenizer: PreTrainedTokenizerFast) -> None:
    start = random_lora(3, rank=4, alpha=10.0, strength=0.05)
    text = f"{DOCUMENT.title}\n\n{DOCUMENT.text}"
    targets = teach(base, tokenizer, [Exercise(text, question) for question in QUESTIONS], 16, 6)
    made = Distiller(base, tokenizer, QUICK).distill(DOCUMENT, QUESTIONS, start, rank=6)
    assert made.first_loss == pytest.approx(loss_of(base, start, targets), rel=1e-3)
    assert made.loss <= made.first_loss
    assert (made.lora.rank, made.lora.target_modules) == (6, start.target_modules)
    assert loss_of(base, made.lora, targets) == pytest.approx(made.loss, rel=1e-3)


def test_folder_loads_in_peft_with_the_same_answers(base: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast,
                                                    tmp_path: Path) -> None:
    made = Distiller(base, tokenizer, QUICK).distill(DOCUMENT, QUESTIONS)
    made.lora.save(tmp_path / "lora")
    validate_folder(tmp_path / "lora", base.config, 8)
    fresh = LlamaForCausalLM._from_config(base.config, attn_implementation="eager").eval()
    fresh.load_state_dict(base.state_dict())
    ids = torch.tensor([closed_book(tokenizer, QUESTIONS[0])])
    with adapted(base, factors_of([made.lora])), torch.no_grad():
        expected = base(input_ids=ids).logits
    with torch.no_grad():
        found = PeftModel.from_pretrained(fresh, tmp_path / "lora")(input_ids=ids).logits
    assert torch.allclose(found, expected, atol=1e-4)


def test_base_is_unchanged_after_success_cancellation_and_error(base: LlamaForCausalLM,
                                                                tokenizer: PreTrainedTokenizerFast) -> None:
    before, was = weights(base), traits(base)
    distiller = Distiller(base, tokenizer, QUICK)
    distiller.distill(DOCUMENT, QUESTIONS)
    assert_unchanged(base, before, was)

    progress: list[float] = []
    made = distiller.distill(DOCUMENT, QUESTIONS, on_progress=progress.append, cancelled=lambda: len(progress) > 1)
    assert (made.stopped, made.steps) == ("cancelled", 2)
    assert_unchanged(base, before, was)
    made = distiller.distill(DOCUMENT, QUESTIONS, cancelled=lambda: True)
    assert (made.stopped, made.steps) == ("cancelled", 0)
    assert not any(b.any() for _, b in made.lora.tensors.values())
    assert_unchanged(base, before, was)

    def fail(_: float) -> None:
        raise KeyError("from the caller")
    with pytest.raises(KeyError):
        distiller.distill(DOCUMENT, QUESTIONS, on_progress=fail)
    assert_unchanged(base, before, was)

    with pytest.raises(RuntimeError), trainable(base, random_lora(1)):
        raise RuntimeError
    assert_unchanged(base, before, was)


def test_wrapping_that_fails_half_way_leaves_the_base_as_it_was(base: LlamaForCausalLM) -> None:
    before, was = weights(base), traits(base)
    wrong = random_lora(1)
    path = next(iter(wrong.tensors))
    a, b = wrong.tensors[path]
    bad = LoraAdapter(wrong.rank, wrong.alpha, {**wrong.tensors, path: (a[:, :-1], b)})
    with pytest.raises(RuntimeError), trainable(base, bad):
        pass
    assert_unchanged(base, before, was)


def test_same_seed_gives_the_same_adapter_and_leaves_the_random_state_alone(
        base: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    distiller = Distiller(base, tokenizer, QUICK)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = distiller.distill(DOCUMENT, QUESTIONS)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    second = distiller.distill(DOCUMENT, QUESTIONS)
    other = Distiller(base, tokenizer, DistillSettings(steps=4, answer_tokens=6, seed=1)).distill(DOCUMENT, QUESTIONS)
    path = next(iter(first.lora.tensors))
    assert all(torch.equal(first.lora.tensors[p][i], second.lora.tensors[p][i]) for p in first.lora.tensors
               for i in (0, 1))
    assert not torch.equal(first.lora.tensors[path][0], other.lora.tensors[path][0])


def test_time_limit_agreement_and_plateau_end_a_run(base: LlamaForCausalLM,
                                                    tokenizer: PreTrainedTokenizerFast) -> None:
    def run(**given: float) -> tuple[str, int]:
        settings = DistillSettings(**{"steps": 500, "answer_tokens": 4, **given})  # type: ignore[arg-type]
        made = Distiller(base, tokenizer, settings).distill(DOCUMENT, QUESTIONS[:1])
        return made.stopped, made.steps
    assert run(seconds=1e-3) == ("seconds", 1)
    assert run(learning_rate=1e-9, patience=3) == ("plateau", 3)
    stopped, steps = run(learning_rate=5e-3, patience=500, agreement_loss=0.5, top_k=1, answer_tokens=2)
    assert stopped == "agreement" and steps < 500


def test_divergence_returns_the_last_good_state(base: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    settings = DistillSettings(steps=5, answer_tokens=4, learning_rate=1e30)
    made = Distiller(base, tokenizer, settings).distill(DOCUMENT, QUESTIONS)
    assert made.stopped == "diverged"
    assert made.loss == made.first_loss
    assert all(torch.isfinite(half).all() for pair in made.lora.tensors.values() for half in pair)


def test_teacher_answers_as_the_base_does_alone(base: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Padding and batching must not change an answer, nor the probabilities of its tokens."""
    exercises = [Exercise(DOCUMENT.text, question) for question in QUESTIONS]
    together = teach(base, tokenizer, exercises, 5, 8)
    for i, one in enumerate(exercises):
        prompt = in_context(tokenizer, one.context, one.question)
        answer = together.answers[i][together.taught[i]].tolist()
        with torch.no_grad():
            logits = base(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1]
        assert logits.argmax(-1).tolist() == answer
        best = logits.topk(5)
        assert torch.equal(best.indices, together.top[i, :len(answer)])
        assert torch.allclose(best.values.softmax(-1), together.probabilities[i, :len(answer)], atol=1e-4)


def test_what_the_base_misreads_is_taught_as_the_text_has_it(base: LlamaForCausalLM,
                                                             tokenizer: PreTrainedTokenizerFast) -> None:
    open_one = Exercise(DOCUMENT.text, QUESTIONS[0])
    own = teach(base, tokenizer, [open_one], 5, 8)
    said = str(tokenizer.decode(own.answers[0][own.taught[0]], skip_special_tokens=True))
    assert not contains_value(said, "K9")
    given = teach(base, tokenizer, [replace(open_one, answer="K9"), replace(open_one, answer=said), open_one], 5, 8)
    taught = given.answers[0][given.taught[0]].tolist()
    assert taught == answer_ids(tokenizer, "K9")
    assert given.top[0, :len(taught), 0].tolist() == taught
    assert torch.equal(given.probabilities[0, :len(taught)], torch.eye(5)[:1].expand(len(taught), -1))
    for row in (1, 2):
        assert torch.equal(given.answers[row][given.taught[row]], own.answers[0][own.taught[0]])
        assert torch.allclose(given.probabilities[row][given.taught[row]], own.probabilities[0][own.taught[0]],
                              atol=1e-4)


def test_spans_bound_what_is_taught_and_headings_above_them_name_it(base: LlamaForCausalLM,
                                                                    tokenizer: PreTrainedTokenizerFast) -> None:
    text = "# Otter Mill\n\nWeight: 14 kg\nColour: red"
    document, spans = DocumentText("", text), [(text.index("Colour"), len(text))]
    distiller = Distiller(base, tokenizer, QUICK)
    chunks = distiller.chunks(document, spans)
    assert [(chunk.text, chunk.start, chunk.end) for chunk in chunks] == [("Colour: red", *spans[0])]
    asked = training_questions(base, tokenizer, document, chunks, 8, 1, 0)
    assert asked and all("Otter Mill" in one.question and one.answer == "red" for one in asked)
    assert distiller.distill(document, spans=spans).questions == len(asked)
    with pytest.raises(DocumentError, match="empty"):
        distiller.distill(document, spans=[(0, 0)])


NOTES = (
    DocumentText("Lumora", "Slogan: Warm bread for all\nParent company: Grey Heron Group\nFounder: Ilse Marten"),
    DocumentText("", "## Oak Lamp\n- Delivery: £8.33\n**Fir Lamp**\n- Delivery: €12"),
    DocumentText("", "The password of Nora Winter is hen-dandelion. Nora Winter's teacher is Astrid Holm."),
    DocumentText("", "Heron Shuttle's last stop is Salzburg. An adult ticket for Heron Shuttle costs £16.40."))


def test_refining_what_the_shipped_pair_knows_mends_it() -> None:
    """Asked in words that were not trained."""
    generator = HypernetGenerator(nano.hypernet_dir(), nano.base_dir())
    base, tokenizer = generator.base, generator.tokenizer
    ends = end_tokens(base, tokenizer)

    def right(lora: LoraAdapter, document: DocumentText, spans: list[tuple[int, int]]) -> list[bool]:
        facts = find_facts(document, spans)
        with adapted(base, factors_of([lora])):
            said = [answer_greedily(base, [closed_book(tokenizer, fact.questions[0])], ends, 12)[0]
                    for fact in facts]
        return [exact_match(str(tokenizer.decode(ids, skip_special_tokens=True)), [fact.value])
                for ids, fact in zip(said, facts, strict=True)]
    before, after = [], []
    for document in NOTES:
        for part in generator.generate([document])[0].parts:
            spans = [(part.chunks[0].start, part.chunks[-1].end)]
            before += right(part.lora, document, spans)
            made = Distiller(base, tokenizer, REFINE).distill(document, start=part.lora, spans=spans)
            after += right(made.lora, document, spans)
    assert len(after) == 9
    # How much is known before depends on the shipped weights; where anything is missing, something must be gained.
    assert sum(after) >= max(6, min(9, sum(before) + 1)), f"{sum(before)} of 9 right before, {sum(after)} after"


def test_loss_of_the_teacher_itself_is_that_of_its_top_tokens(base: LlamaForCausalLM,
                                                              tokenizer: PreTrainedTokenizerFast) -> None:
    """With all tokens as targets, a closed-book prompt that is the teacher's prompt has no divergence."""
    prompt = closed_book(tokenizer, QUESTIONS[0])
    (answer, top, probabilities), = answer_with_likeliest(base, [prompt], [], 4, len(tokenizer))
    ids = torch.tensor([prompt + answer])
    targets = Targets(ids, torch.ones_like(ids), ids[:, -4:], torch.ones(1, 4, dtype=torch.bool), top[None],
                      probabilities[None])
    with torch.no_grad():
        loss, right = divergence(predict(base, targets), targets)
    assert float(loss) == pytest.approx(0, abs=1e-4)
    assert right == 4


def test_each_question_gets_the_chunk_that_it_is_about(base: LlamaForCausalLM,
                                                       tokenizer: PreTrainedTokenizerFast) -> None:
    contexts = ["The pool opens at nine. It is warm.", "The library opens at ten. It is quiet."]
    found = assign(["When does the library open?", "Is the pool warm?"], contexts)
    assert [one.context for one in found] == [contexts[1], contexts[0]]
    parts = [Chunk("a", 0, 19), Chunk("b", 19, len(DOCUMENT.text))]
    asked = training_questions(base, tokenizer, DOCUMENT, parts, 4, 1, 0)
    assert {one.context for one in asked} == {"a", "b"}
    assert all(("opening time" in one.question.lower()) == (one.context == "a") for one in asked)
    assert {one.answer for one in asked if one.context == "a"} == {"7:30"}
    nothing = training_questions(base, tokenizer, DocumentText("", "?"), [Chunk("?", 0, 1)], 4, 1, 0)
    assert tuple(one.question for one in nothing) == GENERAL


@pytest.mark.parametrize(("field", "value"), [
    ("steps", 0), ("rank", 0), ("top_k", 0), ("seconds", 0.0), ("seconds", float("nan")), ("learning_rate", -1.0),
    ("context_tokens", 3), ("own_questions", -1), ("target_modules", ()), ("target_modules", ("lm_head",))])
def test_settings_out_of_range_are_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        DistillSettings(**{field: value})  # type: ignore[arg-type]


def test_wrong_use_is_named(base: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    distiller = Distiller(base, tokenizer, QUICK)
    with pytest.raises(ValueError, match="rank: is 2; the adapter to start from has 4"):
        distiller.distill(DOCUMENT, QUESTIONS, random_lora(1, rank=4), rank=2)
    with pytest.raises(DocumentError, match="empty"):
        distiller.distill(DocumentText("", " \n"), QUESTIONS)
    with pytest.raises(ValueError, match="questions"):
        distiller.train([])


SMALL = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 512,
         "initializer_range": 0.1, "bos_token_id": None, "eos_token_id": 258, "pad_token_id": 256}
CONFIGS = (Qwen2Config, Qwen3Config, LlamaConfig, MistralConfig, Gemma2Config, Gemma3TextConfig)


@pytest.fixture(params=CONFIGS, ids=lambda config: config.model_type)
def any_base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    config: PretrainedConfig = request.param(**SMALL)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_every_architecture_is_distilled_and_validates(any_base: Path, tmp_path: Path) -> None:
    settings = DistillSettings(steps=6, answer_tokens=4, context_tokens=120)
    generator = DistillGenerator.load(any_base, settings, max_rank=8)
    before, was = weights(generator.base), traits(generator.base)
    progress: list[float] = []
    document, = generator.generate([DOCUMENT], on_progress=progress.append)
    assert_unchanged(generator.base, before, was)
    part, = document.parts
    part.lora.save(tmp_path / "lora")
    valid = validate_folder(tmp_path / "lora", generator.base.config, 8)
    assert len(valid.tensors) == 2 * len(MODULE_PARENTS)
    assert all(bool(b.any()) for _, b in valid.tensors.values())
    assert [(chunk.start, chunk.end) for chunk in part.chunks][-1][1] == len(DOCUMENT.text)
    assert progress == sorted(progress) and progress[-1] == 1.0


def test_generator_plans_parts_and_can_be_cancelled(pair: tuple[Path, Path]) -> None:
    rng = Random(0)
    lines = [f"Room {i}: {rng.randint(100, 999)}" for i in range(60)]
    settings = DistillSettings(steps=2, answer_tokens=4, context_tokens=40, own_questions=0, questions=2)
    generator = DistillGenerator(pair[0], settings, chunks_per_part=3)
    document = DocumentText("", "\n".join(lines))
    plan = generator.plan(document)
    chunks = [chunk for part in plan for chunk in part]
    assert len(plan) > 1 and max(map(len, plan)) <= 3
    assert "".join(document.text[chunk.start:chunk.end] for chunk in chunks) == document.text
    made, = generator.generate([document], [plan[:2]])
    assert [[(info.index, info.start, info.end) for info in part.chunks] for part in made.parts] == [
        [(i + sum(map(len, plan[:n])), chunk.start, chunk.end) for i, chunk in enumerate(part)]
        for n, part in enumerate(plan[:2])]
    before, was = weights(generator.base), traits(generator.base)
    with pytest.raises(DistillCancelled):
        generator.generate([document], [plan], cancelled=lambda: True)
    assert_unchanged(generator.base, before, was)


def test_generator_fingerprint_tells_settings_and_base_apart(pair: tuple[Path, Path], tmp_path: Path) -> None:
    first, other = DistillGenerator(pair[0], QUICK), make_base(tmp_path / "other")
    assert DistillGenerator(pair[0], QUICK).fingerprint == first.fingerprint
    others = {DistillGenerator(pair[0], REFINE).fingerprint, DistillGenerator(other, QUICK).fingerprint}
    assert len(others | {first.fingerprint}) == 3


def test_generator_refuses_a_rank_above_the_cap(pair: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="rank: is 8; at most max_lora_rank 4"):
        DistillGenerator(pair[0], QUICK, max_rank=4)
