"""The CPU LoRA plugin: row isolation against plain sums, and in a running vLLM with all slots full."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_models import make_adapter, make_base

SLOTS = 4
RANK = 8


def _reference(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, slots: torch.Tensor, scale: float = 1.0
) -> torch.Tensor:
    """Row by row: scale * x @ A[slot].T @ B[slot].T, zero for slot -1. Stacks as vLLM shapes them."""
    rows = [
        scale * (row @ a[slot, 0].T) @ b[slot, 0].T if slot >= 0 else torch.zeros(b.shape[-2])
        for row, slot in zip(x, slots.tolist(), strict=True)
    ]
    return torch.stack(rows)


def _stacks(ranks: list[int], width_in: int, width_out: int) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = torch.zeros(len(ranks), 1, RANK, width_in), torch.zeros(len(ranks), 1, width_out, RANK)
    for slot, rank in enumerate(ranks):
        a[slot, 0, :rank], b[slot, 0, :, :rank] = torch.randn(rank, width_in), torch.randn(width_out, rank)
    return a, b


@pytest.fixture
def wrapper() -> Any:
    from serve.lora_cpu import IsolatedPunicaWrapperCPU

    torch.manual_seed(1)
    return IsolatedPunicaWrapperCPU(256, 64, torch.device("cpu"))


def _map(wrapper: Any, slots: torch.Tensor) -> None:
    """Tells the wrapper, in vLLM's own way, that row i uses slot ``slots[i]``."""
    from vllm.lora.layers import LoRAMapping

    ids = tuple(slot + 1 for slot in slots.tolist())
    wrapper.update_metadata(LoRAMapping(ids, ids, is_prefill=True), [1, 2, 3, 4], SLOTS + 1, 100)


MAPPINGS = {
    "base only": [-1] * 6,
    "one adapter": [2] * 6,
    "last slot beside base": [3, -1, 3, -1, -1, 3],
    "all mixed": [0, -1, 3, 1, 2, -1, 3, 0, 1, 2, -1],
    "long prompts": [3] * 60 + [-1] * 60 + [0] * 60 + [1] * 40,
}


@pytest.mark.parametrize("overhead", [0, 10**12], ids=["grouped", "masked"])
@pytest.mark.parametrize("mapping", MAPPINGS.values(), ids=MAPPINGS.keys())
def test_each_row_gets_its_own_adapter_only(
    wrapper: Any, mapping: list[int], overhead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged projections: slices of different widths, ranks that differ by slot, one slice left alone by a slot."""
    monkeypatch.setattr("serve.lora_rows.GROUP_OVERHEAD", overhead)
    slots = torch.tensor(mapping)
    _map(wrapper, slots)
    x = torch.randn(len(mapping), 24)
    widths = (16, 8, 8)
    ranks = ([8, 4, 1, 8], [8, 8, 8, 8], [0, 3, 0, 8])
    stacks = [_stacks(by_slot, 24, width) for by_slot, width in zip(ranks, widths, strict=True)]
    y = torch.randn(len(mapping), sum(widths))
    wanted = y + torch.cat([_reference(x, a, b, slots, 0.5) for a, b in stacks], dim=1)
    base_rows = y[slots < 0].clone()
    wrapper.add_lora_linear(y, x, tuple(a for a, _ in stacks), tuple(b for _, b in stacks), 0.5, widths)
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(y[slots < 0], base_rows)


def test_a_rewritten_slot_is_noticed(wrapper: Any) -> None:
    slots = torch.tensor([0, 1, -1])
    _map(wrapper, slots)
    a, b = _stacks([8, 8, 8, 8], 24, 16)
    x = torch.randn(3, 24)
    for inference in (False, True):
        with torch.inference_mode(inference):
            a[1, 0, :2], b[1] = torch.randn(2, 24), torch.randn(1, 16, RANK)
            y = torch.zeros(3, 16)
            wrapper.add_lora_linear(y, x, (a,), (b,), 1.0, (16,))
            torch.testing.assert_close(y, _reference(x, a, b, slots), rtol=1e-4, atol=1e-4)


def test_another_slots_infinity_stays_there(wrapper: Any) -> None:
    slots = torch.tensor([0, 1, -1])
    _map(wrapper, slots)
    a, b = _stacks([8, 8, 8, 8], 24, 16)
    b[1, 0, 0, 0] = float("inf")
    y = torch.zeros(3, 16)
    wrapper.add_lora_linear(y, torch.randn(3, 24), (a,), (b,), 1.0, (16,))
    assert torch.isfinite(y[[0, 2]]).all()


def test_shrink_and_expand_apart(wrapper: Any) -> None:
    slots = torch.tensor([3, -1, 0, -1])
    _map(wrapper, slots)
    a, b = _stacks([8, 8, 8, 8], 24, 16)
    x = torch.randn(4, 24)
    buffer = torch.full((1, 4, RANK), 7.0)
    wrapper.add_shrink(buffer, x, (a,), 1.0)
    assert not buffer[0, slots < 0].any()
    buffer[0, slots < 0] = 1.0
    y = torch.zeros(4, 20)
    wrapper.add_expand(y, buffer, (b,), (16,), offset_start=4)
    torch.testing.assert_close(y[:, 4:], _reference(x, a, b, slots), rtol=1e-4, atol=1e-4)
    assert not y[:, :4].any()


def test_embeddings_and_logits(wrapper: Any) -> None:
    slots = torch.tensor([3, -1, 0, -1])
    _map(wrapper, slots)
    a, b = _stacks([8, 8, 8, 8], 24, 16)
    x = torch.randn(4, 24)
    embedded = torch.randn(4, RANK)
    y = torch.zeros(4, 16)
    wrapper.add_lora_embedding(y, embedded, b, add_input=True)
    rows = [embedded[i] @ b[s, 0].T if s >= 0 else torch.zeros(16) for i, s in enumerate(slots.tolist())]
    torch.testing.assert_close(y, torch.stack(rows), rtol=1e-4, atol=1e-4)

    logits = torch.zeros(4, 18)
    wrapper.add_lora_logits(logits, x, a, b, 1.0)
    torch.testing.assert_close(logits[:, :16], _reference(x, a, b, slots), rtol=1e-4, atol=1e-4)
    assert not logits[:, 16:].any()
    other_rows = torch.zeros(7, 18)
    wrapper.add_lora_logits(other_rows, torch.randn(7, 24), a, b, 1.0)
    assert not other_rows.any()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[Path]]]:
    folder = tmp_path_factory.mktemp("lora")
    base = make_base(folder / "base")
    # The last one leaves most modules alone, as generated adapters do.
    modules = [("q_proj", "v_proj", "down_proj")] * (SLOTS - 1) + [("down_proj",)]
    adapters = [
        make_adapter(folder / f"adapter{i}", base, seed=10 + i, rank=(8, 4, 8, 8)[i], target_modules=modules[i])
        for i in range(SLOTS)
    ]
    yield base, adapters


def test_mixed_batch_in_vllm(checkpoint: tuple[Path, list[Path]]) -> None:
    """All slots full, adapter rows and base rows together: each answers as it does alone."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

    from serve.lora_cpu import WRAPPER_PATH

    base, adapters = checkpoint
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    loras = [LoRARequest(f"adapter{i}", i + 1, str(path)) for i, path in enumerate(adapters)]
    prompts = [f"Question {i}: what is the price of article {i * 37}?" for i in range(3)]

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
                worker_extension_cls="serve.lora_cpu.LoraWorkerExtension",
            )
        )
        try:
            assert await engine.collective_rpc("imprint_lora_wrappers") == [[WRAPPER_PATH]]

            async def generate(prompt: str, lora: LoRARequest | None) -> tuple[int, ...]:
                params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
                tokens: tuple[int, ...] = ()
                async for output in engine.generate(prompt, params, uuid.uuid4().hex, lora_request=lora):
                    tokens = tuple(output.outputs[0].token_ids)
                return tokens

            for lora in loras:
                await engine.add_lora(lora)
            requests = [(prompt, lora) for prompt in prompts for lora in (*loras, None)]
            alone = [await generate(*request) for request in requests]
            together = await asyncio.gather(*(generate(*request) for request in requests))
            assert together == alone
            by_request = dict(zip([(p, lora and lora.lora_name) for p, lora in requests], together, strict=True))
            for prompt in prompts:
                answers = {by_request[prompt, name] for name in [None, *(lora.lora_name for lora in loras)]}
                assert len(answers) == SLOTS + 1, "two adapters, or an adapter and the base, answer alike"
        finally:
            engine.shutdown()

    asyncio.run(run())
