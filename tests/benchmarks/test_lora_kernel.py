"""The LoRA kernel's benchmark: its adapters are PEFT's, and its report says what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.lora_kernel import COUNTS, KINDS, NANO, WRAPPERS, Row, make_adapter, report


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_load_in_peft_with_every_weight(kind: str, tmp_path: Path) -> None:
    modules, rank = KINDS[kind]
    make_adapter(tmp_path / "adapter", NANO, modules, rank, 3)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(NANO), str(tmp_path / "adapter"))
    weights = {name: value for name, value in model.named_parameters() if "lora_" in name}
    layers = model.config.num_hidden_layers
    assert len(weights) == 2 * layers * len(modules)
    # PEFT starts with B of zeros, so a weight that was not found would be zero.
    assert all(torch.count_nonzero(value) and rank in value.shape for value in weights.values())


def test_the_report_has_a_line_for_each_number_of_adapters() -> None:
    rows = [
        Row("nano", "float32", "down_proj rank 16", wrapper, count, 1000.0 / (1 + number), 2.0, 0.5, 0.4, 0.6, 0.45)
        for number, wrapper in enumerate(WRAPPERS)
        for count in COUNTS
    ]
    text = report(rows, 3, 0.2)
    assert "## nano, float32, down_proj rank 16" in text
    assert "| none | 1000 | 0.50 (0.40-0.60) | 0.45 | 500 | 0.50 (0.40-0.60) | 0.45 | 2.0 |" in text
    assert sum(line.startswith(("| none |", "| 1 |", "| 4 |", "| 16 |", "| 64 |")) for line in text.splitlines()) == 5
