"""The CPU LoRA wrapper: against sums row by row, against PEFT, and in a running vLLM with all slots full."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tiny_models import ALL_MODULES, make_adapter, make_tokenizer

SLOTS = 4
RANK = 8
WIDTH = 24

# Each way through a module, forced: how long a run goes alone, how much padding a batch may have, how many zeros a
# joint product, and whether small slots are copied.
WAYS = {
    "as measured": {},
    "alone": {"LONG_RUN": 1, "LONG_RUN_HALF": 1},
    "one batch": {"LONG_RUN": 10**9, "LONG_RUN_HALF": 10**9, "CALL_WORK": 10**12, "CALL_READ": 10**12},
    "many batches": {"LONG_RUN": 10**9, "LONG_RUN_HALF": 10**9, "CALL_WORK": 0, "CALL_READ": -1},
    "in place": {"CALL_READ": -1, "SMALL_B": 0},
}


def _reference(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, slots: Sequence[int], scale: float = 1.0
) -> torch.Tensor:
    """Row by row: scale * x @ A[slot].T @ B[slot].T, zero for slot -1. Stacks as vLLM shapes them."""
    rows = [
        scale * (row @ a[slot, 0].T) @ b[slot, 0].T if slot >= 0 else torch.zeros(b.shape[-2], dtype=x.dtype)
        for row, slot in zip(x, slots, strict=True)
    ]
    return torch.stack(rows)


def _stacks(
    ranks: Sequence[int], width_in: int, width_out: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = (
        torch.zeros(len(ranks), 1, RANK, width_in, dtype=dtype),
        torch.zeros(len(ranks), 1, width_out, RANK, dtype=dtype),
    )
    for slot, rank in enumerate(ranks):
        a[slot, 0, :rank].normal_()
        b[slot, 0, :, :rank].normal_()
    return a, b


def _wrapper() -> Any:
    from serve.lora_cpu import IsolatedPunicaWrapperCPU

    return IsolatedPunicaWrapperCPU(512, 64, torch.device("cpu"))


@pytest.fixture
def wrapper() -> Any:
    torch.manual_seed(1)
    return _wrapper()


def _map(wrapper: Any, slots: Sequence[int], count: int = SLOTS) -> None:
    """Tells the wrapper, in vLLM's own way, that row i uses slot ``slots[i]`` of ``count``."""
    from vllm.lora.layers import LoRAMapping

    ids = tuple(slot + 1 for slot in slots)
    wrapper.update_metadata(LoRAMapping(ids, ids, is_prefill=True), list(range(1, count + 1)), count + 1, 100)


class _Calls(TorchDispatchMode):
    """Notes the torch operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


MAPPINGS = {
    "base only": [-1] * 6,
    "one adapter": [2] * 6,
    "last slot beside base": [3, -1, 3, -1, -1, 3],
    "all mixed": [0, -1, 3, 1, 2, -1, 3, 0, 1, 2, -1],
    "far apart": [0, 3, 3, -1, 0],
    "long prompts": [3] * 60 + [-1] * 60 + [0] * 60 + [1] * 40,
    "prompt among answers": [0, 1, 2, 3] * 4 + [1] * 60 + [-1] + [2] * 3,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("mapping", MAPPINGS.values(), ids=MAPPINGS.keys())
def test_each_row_gets_its_own_adapter_only(
    wrapper: Any, mapping: list[int], way: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged projections: slices of different widths, ranks that differ by slot, one slice left alone by a slot."""
    for name, value in way.items():
        monkeypatch.setattr(f"serve.lora_cpu.{name}", value)
    _map(wrapper, mapping)
    x = torch.randn(len(mapping), WIDTH)
    widths = (16, 8, 8)
    ranks = ([8, 4, 1, 8], [8, 8, 8, 8], [0, 3, 0, 8])
    stacks = [_stacks(by_slot, WIDTH, width) for by_slot, width in zip(ranks, widths, strict=True)]
    y = torch.randn(len(mapping), sum(widths))
    wanted = y + torch.cat([_reference(x, a, b, mapping, 0.5) for a, b in stacks], dim=1)
    base = torch.tensor(mapping) < 0
    base_rows = y[base].clone()
    wrapper.add_lora_linear(y, x, tuple(a for a, _ in stacks), tuple(b for _, b in stacks), 0.5, widths)
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(y[base], base_rows)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_batch_against_rows_one_by_one(data: st.DataObject) -> None:
    """Any slots, ranks, widths and row orders, in both types, with slots rewritten between batches."""
    seed, slots = data.draw(st.integers(0, 2**31)), data.draw(st.sampled_from([1, SLOTS, 9, 40]))
    widths = data.draw(st.sampled_from([(16,), (16, 8, 8), (40, 40)]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    way = data.draw(st.sampled_from(list(WAYS)))
    torch.manual_seed(seed)
    ranks = st.lists(st.sampled_from([0, 1, 4, 8]), min_size=slots, max_size=slots)
    stacks = [_stacks(data.draw(ranks), WIDTH, width, dtype) for width in widths]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in WAYS[way].items():
            patch.setattr(f"serve.lora_cpu.{name}", value)
        wrapper = _wrapper()
        for _ in range(2):
            mapping = data.draw(st.lists(st.integers(-1, slots - 1), min_size=1, max_size=80))
            if data.draw(st.booleans()):
                mapping.sort()
            _map(wrapper, mapping, slots)
            x, y = torch.randn(len(mapping), WIDTH).to(dtype), torch.randn(len(mapping), sum(widths)).to(dtype)
            exact = [(a.double(), b.double()) for a, b in stacks]
            wanted = y.double() + torch.cat([_reference(x.double(), a, b, mapping) for a, b in exact], dim=1)
            base = torch.tensor(mapping) < 0
            base_rows = y[base].clone()
            wrapper.add_lora_linear(y, x, tuple(a for a, _ in stacks), tuple(b for _, b in stacks), 1.0, widths)
            assert torch.equal(y[base], base_rows)
            # bfloat16 keeps 8 bits: x @ A and the sum are rounded once each, for values of up to about 100.
            tolerance = 1e-4 if dtype == torch.float32 else 2**-6
            torch.testing.assert_close(y.double(), wanted, rtol=tolerance, atol=50 * tolerance)
            changed = data.draw(st.integers(0, slots - 1))
            for a, b in stacks:
                rank = data.draw(st.sampled_from([0, 3, 8]))
                a[changed], b[changed] = 0, 0
                a[changed, 0, :rank].normal_()
                b[changed, 0, :, :rank].normal_()
            if data.draw(st.booleans()):
                wrapper.slot_written(changed)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("told", [False, True])
def test_a_rewritten_slot_is_noticed(wrapper: Any, inference: bool, told: bool) -> None:
    """Inference tensors do not count writes: there the manager's word is needed, or every call looks again."""
    wrapper._told = told
    slots = [0, 1, -1]
    _map(wrapper, slots)
    with torch.inference_mode(inference):
        a, b = _stacks([8, 8, 8, 8], WIDTH, 16)
        x = torch.randn(3, WIDTH)
        for rank in (8, 2, 5):
            a[1], b[1] = 0, 0
            a[1, 0, :rank].normal_()
            b[1, 0, :, :rank].normal_()
            if told:
                wrapper.slot_written(1)
            y = torch.zeros(3, 16)
            wrapper.add_lora_linear(y, x, (a,), (b,), 1.0, (16,))
            torch.testing.assert_close(y, _reference(x, a, b, slots), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_what_is_no_number_stays_with_its_slot(
    wrapper: Any, value: float, way: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a slot of the batch, in one that lies between those of the batch, and in rows that pad others."""
    for name, setting in way.items():
        monkeypatch.setattr(f"serve.lora_cpu.{name}", setting)
    slots = [0, 1, -1, 3, 3, 0, 1, 3]
    _map(wrapper, slots)
    a, b = _stacks([8, 8, 8, 8], WIDTH, 16)
    for slot in (1, 2):
        a[slot, 0, 0, 0] = b[slot, 0, 0, 0] = value
    x, y = torch.randn(len(slots), WIDTH), torch.zeros(len(slots), 16)
    x[1] = value
    wrapper.add_lora_linear(y, x, (a,), (b,), 1.0, (16,))
    others = torch.tensor(slots) != 1
    torch.testing.assert_close(y[others], _reference(x, a, b, slots)[others], rtol=1e-4, atol=1e-4)


def test_what_no_row_needs_costs_no_torch_call(wrapper: Any) -> None:
    filled, empty = _stacks([8, 0, 8, 8], WIDTH, 16), _stacks([0, 0, 0, 0], WIDTH, 16)
    x, y = torch.randn(6, WIDTH), torch.zeros(6, 16)
    for mapping, (a, b) in (([-1] * 6, filled), ([1] * 6, filled), ([0, 2, -1, 3, 0, 0], empty)):
        _map(wrapper, mapping)
        # The first call of a batch looks at the module.
        wrapper.add_lora_linear(y, x, (a,), (b,), 1.0, (16,))
        with _Calls() as calls:
            wrapper.add_lora_linear(y, x, (a,), (b,), 1.0, (16,))
        assert calls.names == []


def test_a_small_merged_projection_is_two_products_without_copies_of_weights(wrapper: Any) -> None:
    stacks = [_stacks([8, 8, 4, 8], WIDTH, width) for width in (16, 8, 8)]
    _map(wrapper, [0, 1, 2, 3, 0, 1, 2, 3])
    x, y = torch.randn(8, WIDTH), torch.zeros(8, 32)
    arguments = (tuple(a for a, _ in stacks), tuple(b for _, b in stacks), 1.0, (16, 8, 8))
    wrapper.add_lora_linear(y, x, *arguments)
    with _Calls() as calls:
        wrapper.add_lora_linear(y, x, *arguments)
    worked = [name for name in calls.names if name not in ("view", "_unsafe_view", "slice", "expand")]
    assert worked == ["index_select", "bmm", "bmm", "index_select", "add_"]


def test_copies_are_bounded(wrapper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from itertools import combinations

    monkeypatch.setattr("serve.lora_cpu.COPIED", 4 * RANK * (WIDTH + 16))
    a, b = _stacks([8] * 12, WIDTH, 16)
    x, y = torch.randn(2, WIDTH), torch.zeros(2, 16)
    for pair in combinations(range(12), 2):
        _map(wrapper, pair, 12)
        y.zero_()
        wrapper.add_lora_linear(y, x, (a,), (b,), 1.0, (16,))
        torch.testing.assert_close(y, _reference(x, a, b, pair), rtol=1e-4, atol=1e-4)
        module = wrapper._module((a,), (b,))
        assert sum(p.size() for made in module._copies.values() for p in made) <= 4 * RANK * (WIDTH + 16)


def test_rows_of_another_batch_are_refused(wrapper: Any) -> None:
    _map(wrapper, [0, 1, -1])
    a, b = _stacks([8, 8, 8, 8], WIDTH, 16)
    with pytest.raises(ValueError, match="3 rows, the batch has 4"):
        wrapper.add_lora_linear(torch.zeros(4, 16), torch.randn(4, WIDTH), (a,), (b,), 1.0, (16,))


@pytest.mark.parametrize("mapping", [[3, -1, 0, -1], [2] * 40 + [-1] * 3])
def test_shrink_and_expand_apart(wrapper: Any, mapping: list[int]) -> None:
    _map(wrapper, mapping)
    base = torch.tensor(mapping) < 0
    a, b = _stacks([8, 8, 4, 8], WIDTH, 16)
    x = torch.randn(len(mapping), WIDTH)
    buffer = torch.full((1, len(mapping), RANK), 7.0)
    wrapper.add_shrink(buffer, x, (a,), 0.5)
    assert not buffer[0, base].any()
    buffer[0, base] = 1.0
    y = torch.zeros(len(mapping), 20)
    wrapper.add_expand(y, buffer, (b,), (16,), offset_start=4)
    torch.testing.assert_close(y[:, 4:], _reference(x, a, b, mapping, 0.5), rtol=1e-4, atol=1e-4)
    assert not y[:, :4].any()


def test_embeddings_and_logits(wrapper: Any) -> None:
    slots = [3, -1, 0, -1]
    _map(wrapper, slots)
    a, b = _stacks([8, 8, 8, 8], WIDTH, 16)
    x = torch.randn(4, WIDTH)
    embedded = torch.randn(4, RANK)
    embedded[1] = float("nan")
    y = torch.zeros(4, 16)
    wrapper.add_lora_embedding(y, embedded, b, add_input=True)
    rows = [embedded[i] @ b[s, 0].T if s >= 0 else torch.zeros(16) for i, s in enumerate(slots)]
    torch.testing.assert_close(y, torch.stack(rows), rtol=1e-4, atol=1e-4)
    # What the embedding layer adds to its tokens, to find them in all slots' A: 100 tokens each.
    assert wrapper._embeddings_indices[:4].tolist() == [300, 0, 0, 0]

    for width in (18, 16, 12):
        logits = torch.zeros(4, width)
        wrapper.add_lora_logits(logits, x, a, b, 1.0)
        known = min(width, 16)
        torch.testing.assert_close(logits[:, :known], _reference(x, a, b, slots)[:, :known], rtol=1e-4, atol=1e-4)
        assert not logits[:, known:].any()
    other_rows = torch.zeros(7, 18)
    wrapper.add_lora_logits(other_rows, torch.randn(7, WIDTH), a, b, 1.0)
    assert not other_rows.any()


def test_a_full_classification_head_replaces_only_its_own_rows(wrapper: Any) -> None:
    _map(wrapper, [3, -1, 0, 0])
    weight, bias = torch.randn(SLOTS, 1, 5, WIDTH), torch.randn(SLOTS, 5)
    x, y = torch.randn(4, WIDTH), torch.randn(4, 5)
    before = y.clone()
    wrapper.apply_lora_full_linear(y, x, weight, bias, torch.tensor([True, True, True, False]))
    assert torch.equal(y[:2], before[:2])
    torch.testing.assert_close(y[2:], x[2:] @ weight[0, 0].T + bias[0])


def _llama(folder: Path) -> Path:
    """A random float32 Llama whose embeddings and output head take LoRA in vLLM as well."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base, and one adapter more than there are slots: of all modules, of projections, of one module alone."""
    folder = tmp_path_factory.mktemp("lora")
    base = _llama(folder / "base")
    kinds: list[tuple[int, Sequence[str]]] = [
        (8, ALL_MODULES),
        (4, ("q_proj", "v_proj", "down_proj")),
        (8, ("embed_tokens", "lm_head", *ALL_MODULES)),
        (8, ("down_proj",)),
        (2, ("up_proj", "k_proj")),
    ]
    adapters = [
        make_adapter(folder / f"adapter{i}", base, seed=10 + i, rank=rank, target_modules=modules)
        for i, (rank, modules) in enumerate(kinds)
    ]
    return base, adapters


def _peft_answers(base: Path, adapter: Path | None, prompts: Sequence[str], tokens: int) -> list[tuple[int, ...]]:
    """Greedy answers of ``tokens`` tokens by transformers and PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    model.eval()
    answers = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        start = ids.shape[1]
        with torch.inference_mode():
            for _ in range(tokens):
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        answers.append(tuple(ids[0, start:].tolist()))
    return answers


def test_mixed_batch_in_vllm(checkpoint: tuple[Path, list[Path]]) -> None:
    """All slots full, adapter rows and base rows together: each answers as it does in PEFT."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

    from serve.lora_cpu import WRAPPER_PATH

    base, adapters = checkpoint
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    loras = [LoRARequest(f"adapter{i}", i + 1, str(path)) for i, path in enumerate(adapters)]
    prompts = [f"Question {i}: what is the price of article {i * 37}?" for i in range(3)]
    tokens = 24
    wanted = {lora: _peft_answers(base, Path(lora.lora_path), prompts, tokens) for lora in loras}
    base_answers = _peft_answers(base, None, prompts, tokens)
    for index in range(len(prompts)):
        answers = {base_answers[index], *(answers[index] for answers in wanted.values())}
        assert len(answers) == len(loras) + 1, "two adapters, or an adapter and the base, answer alike"

    async def run() -> None:
        engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(base),
                dtype="float32",
                max_model_len=256,
                enable_lora=True,
                max_loras=SLOTS,
                max_lora_rank=RANK,
                max_num_seqs=32,
                block_size=32,
                kv_cache_memory_bytes=64 << 20,
                enable_prefix_caching=False,
                worker_extension_cls="serve.vllm_plugin.LoraWorkerExtension",
            )
        )
        try:
            assert await engine.collective_rpc("imprint_lora_wrappers") == [[WRAPPER_PATH]]

            async def generate(index: int, lora: LoRARequest | None) -> tuple[int, ...]:
                params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
                found: tuple[int, ...] = ()
                async for output in engine.generate(prompts[index], params, uuid.uuid4().hex, lora_request=lora):
                    found = tuple(output.outputs[0].token_ids)
                return found

            async def compare(chosen: Sequence[LoRARequest]) -> None:
                requests = [(index, lora) for index in range(len(prompts)) for lora in (*chosen, None)]
                together = await asyncio.gather(*(generate(*request) for request in requests))
                right = [wanted[lora][index] if lora else base_answers[index] for index, lora in requests]
                assert together == right

            await compare(loras[:SLOTS])
            # The last one takes the slot of the one that was used least recently, and gives it back.
            await compare(loras[1:])
            await compare(loras[:SLOTS])
            await compare(loras[1:2])
        finally:
            engine.shutdown()

    asyncio.run(run())
