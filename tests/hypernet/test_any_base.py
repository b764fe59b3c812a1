"""Every model family that vLLM and transformers share works as a base: names, widths and templates are its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from hypernet.encoder import load_base, read, text_decoder
from hypernet.inject import LAYERS, MODULE_PARENTS, NESTED_LAYERS, adapted, layers_path, module_path, targets_of
from hypernet.lora import AdapterInvalid, LoraAdapter, factors_of, validate_folder
from hypernet.prompts import closed_book, in_context
from hypernet.published.frames import frame_for
from tests.hypernet.base_families import (
    FAMILIES,
    HIDDEN,
    NUMBER_OF_LAYERS,
    random_adapter,
    widths_of,
    write_family,
)


@dataclass(frozen=True)
class Base:
    """A tiny base as this project loads it. Tests must not change it."""

    name: str
    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast

    @property
    def config(self) -> PreTrainedConfig:
        return AutoConfig.from_pretrained(self.folder)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = write_family(tmp_path_factory.mktemp("base"), request.param)
    return Base(request.param, folder, *load_base(folder))


@torch.no_grad()
def logits(model: torch.nn.Module, ids: list[list[int]]) -> Tensor:
    tokens = torch.tensor(ids)
    found: Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    return found


def test_modules_and_widths_are_the_bases_own(base: Base) -> None:
    assert layers_path(base.model) == FAMILIES[base.name].layers
    assert len(text_decoder(base.model).layers) == NUMBER_OF_LAYERS
    found = {target.name: (target.d_in, target.d_out) for target in targets_of(base.model, tuple(MODULE_PARENTS))}
    assert found == widths_of(base.name)


@pytest.mark.filterwarnings("error:Found missing adapter keys")
def test_peft_gives_the_same_logits(base: Base, tmp_path: Path) -> None:
    """A saved adapter in PEFT's own hands, against ours in a batch with another one."""
    first, second = random_adapter(base.name, 1), random_adapter(base.name, 2, rank=6)
    prompt = closed_book(base.tokenizer, "What does the lamp cost?")
    with adapted(base.model, factors_of([first, second])):
        ours = logits(base.model, [prompt, prompt])
    plain = logits(base.model, [prompt])[0]
    for i, lora in enumerate((first, second)):
        lora.save(tmp_path / str(i))
        fresh = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32, attn_implementation="eager")
        peft = PeftModel.from_pretrained(fresh, str(tmp_path / str(i))).eval()
        wanted = logits(peft, [prompt])[0]
        assert float((ours[i] - wanted).abs().max()) < 1e-4
        assert float((plain - wanted).abs().max()) > 0.1
    assert torch.equal(logits(base.model, [prompt])[0], plain)


def test_each_kind_of_module_matters(base: Base) -> None:
    """A path that PEFT or we silently skipped would leave the logits as they are."""
    whole = random_adapter(base.name, 3)
    prompt = closed_book(base.tokenizer, "Why?")
    plain = logits(base.model, [prompt])
    for name in MODULE_PARENTS:
        one = replace(whole, tensors={path: pair for path, pair in whole.tensors.items() if path.endswith(name)})
        with adapted(base.model, factors_of([one])):
            assert float((logits(base.model, [prompt]) - plain).abs().max()) > 1e-3, name


def test_right_adapters_are_accepted(base: Base, tmp_path: Path) -> None:
    random_adapter(base.name, 4).save(tmp_path)
    checked = validate_folder(tmp_path, base.config, max_rank=4)
    assert len(checked.tensors) == NUMBER_OF_LAYERS * len(MODULE_PARENTS)


@pytest.mark.parametrize("name", sorted(MODULE_PARENTS))
def test_wrong_widths_are_refused(base: Base, tmp_path: Path, name: str) -> None:
    path = module_path(1, name, FAMILIES[base.name].layers)
    d_in, d_out = widths_of(base.name)[name]
    for a, b in (((4, d_in + 1), (d_out, 4)), ((4, d_in), (d_out + 1, 4))):
        LoraAdapter(4, 4.0, {path: (torch.ones(a), torch.ones(b))}).save(tmp_path)
        with pytest.raises(AdapterInvalid, match=rf"^{path}: A .*the base needs \(4, {d_in}\) and \({d_out}, 4\)"):
            validate_folder(tmp_path, base.config, max_rank=4)


def test_other_places_and_layers_are_refused(base: Base, tmp_path: Path) -> None:
    own = FAMILIES[base.name].layers
    other = LAYERS if own == NESTED_LAYERS else NESTED_LAYERS
    for layer, place in ((0, other), (NUMBER_OF_LAYERS, own)):
        path = module_path(layer, "down_proj", place)
        LoraAdapter(4, 4.0, {path: (torch.ones(4, 96), torch.ones(HIDDEN, 4))}).save(tmp_path)
        with pytest.raises(AdapterInvalid, match=f"{path}: is no module .* in layers 0 to 2 are allowed, below {own}"):
            validate_folder(tmp_path, base.config, max_rank=4)


def test_adapters_move_between_a_text_model_and_its_multimodal_form() -> None:
    text, nested = random_adapter("gemma3", 5), random_adapter("gemma3-multimodal", 5)
    moved = text.placed(NESTED_LAYERS)
    assert moved.tensors.keys() == nested.tensors.keys() and (moved.rank, moved.alpha) == (text.rank, text.alpha)
    assert moved.placed(LAYERS).tensors.keys() == text.tensors.keys()
    assert all(torch.equal(moved.tensors[path][0], nested.tensors[path][0]) for path in nested.tensors)
    with pytest.raises(ValueError, match="lm_head: is no path"):
        replace(text, tensors={"lm_head": text.tensors[module_path(0, "q_proj")]}).placed(NESTED_LAYERS)


def test_questions_are_asked_in_the_bases_own_turn(base: Base) -> None:
    family = FAMILIES[base.name]
    ids = closed_book(base.tokenizer, "Why?")
    assert base.tokenizer.decode(ids) == family.question
    # Each token of the template is one token, not its letters.
    for token in family.tokens:
        if token in family.question:
            assert base.tokenizer.convert_tokens_to_ids(token) in ids
    document = base.tokenizer.decode(in_context(base.tokenizer, "The lamp.", "Why?"))
    assert document == family.question.replace("Why?", "The lamp.\n\nWhy?")


def test_documents_are_read_in_the_bases_own_turn(base: Base) -> None:
    """An empty system message comes first where the template has a place for one; Mistral's and Gemma's refuse it."""
    frame = frame_for("example/base", base.tokenizer)
    turn = frame.before + "Why?" + frame.after
    system = {"<|im_end|>": "<|im_start|>system\n<|im_end|>\n"}.get(FAMILIES[base.name].end, "")
    if base.name == "llama":
        assert turn.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n<|eot_id|>")
    else:
        assert turn == system + FAMILIES[base.name].question


def test_activations_of_all_layers(base: Base) -> None:
    ids = torch.tensor([closed_book(base.tokenizer, "Why?")])
    found = read(base.model, ids, torch.ones_like(ids, dtype=torch.bool))
    assert found.shape == (1, ids.size(1), (NUMBER_OF_LAYERS + 1) * HIDDEN)
    assert torch.isfinite(found).all()


def test_factors_take_on_the_type_of_the_base(base: Base) -> None:
    """As on a GPU, where bases are in bfloat16 and adapters are not."""
    model, tokenizer = load_base(base.folder, dtype=torch.bfloat16)
    factors = factors_of([random_adapter(base.name, 6, strength=0.03)])
    prompt = closed_book(tokenizer, "Why?")
    with adapted(model, factors):
        found = logits(model, [prompt])
    with adapted(base.model, factors):
        wanted = logits(base.model, [prompt])
    assert found.dtype == torch.bfloat16
    assert float((found.float() - wanted).norm() / wanted.norm()) < 0.1
