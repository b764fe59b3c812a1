"""Every model family in real vLLM, one tiny base after another: with an adapter it says what PEFT says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hypernet.prompts import closed_book
from serve.config import EngineConfig
from serve.deployments.engine_context import EngineContext
from serve.deployments.engine_vllm import VllmRuntime
from tests.hypernet.base_families import FAMILIES, random_adapter, write_family

# An engine needs 20 to 40 s to start on two cores.
pytestmark = [pytest.mark.long, pytest.mark.asyncio, pytest.mark.timeout(600)]

QUESTION = "What does the lamp cost?"
TOKENS = 8


def peft_answer(base: Path, adapter: Path | None, prompt: list[int]) -> tuple[list[int], list[float]]:
    """The greedy answer's tokens and their log-probabilities in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    model.eval()
    ids, found = list(prompt), []
    with torch.no_grad():
        for _ in range(TOKENS):
            scores = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            ids.append(int(scores.argmax()))
            found.append(float(scores[ids[-1]]))
    return ids[len(prompt):], found


@pytest.mark.parametrize("name", sorted(FAMILIES))
async def test_an_adapter_says_what_peft_says(name: str, tmp_path: Path) -> None:
    base = write_family(tmp_path / "base", name)
    adapter = tmp_path / "adapter"
    random_adapter(name, 1).save(adapter)
    prompt = closed_book(AutoTokenizer.from_pretrained(base), QUESTION)
    # Without its eyes: the tiny base has no image processor.
    extra = {"language_model_only": True} if name == "gemma3-multimodal" else {}
    runtime = VllmRuntime(str(base), EngineConfig(
        max_loras=2, max_lora_rank=8, max_cpu_loras=2, max_model_len=256, dtype="float32", threads="nobind",
        extra=extra))
    try:
        await runtime.verify()
        from vllm.lora.request import LoRARequest

        request = LoRARequest("adp_1", 1, str(adapter))
        await runtime.engine.add_lora(request)
        for lora, folder in ((None, None), (request, adapter)):
            body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": TOKENS,
                    "ignore_eos": True, "logprobs": True, "return_token_ids": True}
            context = EngineContext(f"job_{folder is not None}", "ten_1", None, "salt")
            answer = await runtime.create("chat", body, context, lora)
            assert isinstance(answer, dict)
            choice = answer["choices"][0]
            tokens, scores = peft_answer(base, folder, prompt)
            assert answer["prompt_token_ids"] == prompt
            assert choice["token_ids"] == tokens
            found = [item["logprob"] for item in choice["logprobs"]["content"]]
            assert found == pytest.approx(scores, abs=2e-3)
    finally:
        runtime.shutdown()
