"""Tiny random bases of the model families that vLLM and transformers share, each with its kind of chat template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hypernet.inject import LAYERS, MODULE_PARENTS, NESTED_LAYERS, module_path
from hypernet.lora import LoraAdapter
from tests.tiny_models import make_tokenizer

NUMBER_OF_LAYERS, HIDDEN, INNER = 3, 64, 96

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>"
    "\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
MISTRAL = (
    "{{ '<s>' }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] }}</s>{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}")
GEMMA = (
    "{{ '<bos>' }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")


@dataclass(frozen=True)
class Family:
    """A family's configuration, template, the tokens of that template, and the one that ends a turn.

    `widths` are a head's width and the numbers of query and key heads; `layers` is where PEFT and vLLM find them.
    """

    config: Mapping[str, Any]
    template: str
    tokens: tuple[str, ...]
    end: str
    question: str
    widths: tuple[int, int, int]
    layers: str = LAYERS


_CHATML_TURN = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
_LLAMA_TURN = ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
               "<|start_header_id|>assistant<|end_header_id|>\n\n")
_GEMMA_TURN = "<bos><start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n"
_GEMMA = (GEMMA, ("<bos>", "<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", _GEMMA_TURN)
_GEMMA3_TEXT = {"model_type": "gemma3_text", "sliding_window": 16, "query_pre_attn_scalar": 16, "head_dim": 16,
                "num_attention_heads": 2, "num_key_value_heads": 1,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

FAMILIES: Mapping[str, Family] = {
    # Biases on queries, keys and values; tied embeddings in the small sizes.
    "qwen2": Family({"model_type": "qwen2", "num_attention_heads": 4, "num_key_value_heads": 2}, CHATML, (),
                    "<|im_end|>", _CHATML_TURN, (16, 4, 2)),
    # Qwen2.5 has the class of Qwen2; larger sizes untie the head.
    "qwen2.5": Family({"model_type": "qwen2", "num_attention_heads": 4, "num_key_value_heads": 1,
                       "tie_word_embeddings": False}, CHATML, (), "<|im_end|>", _CHATML_TURN, (16, 4, 1)),
    # The queries together are wider than the model.
    "qwen3": Family({"model_type": "qwen3", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
                    CHATML, (), "<|im_end|>", _CHATML_TURN, (32, 4, 2)),
    "llama": Family({"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2,
                     "tie_word_embeddings": False}, LLAMA3,
                    ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>",
                    _LLAMA_TURN, (16, 4, 2)),
    "mistral": Family({"model_type": "mistral", "num_attention_heads": 4, "num_key_value_heads": 2,
                       "sliding_window": None, "tie_word_embeddings": False}, MISTRAL, ("<s>", "</s>"), "</s>",
                      "<s>[INST] Why? [/INST]", (16, 4, 2)),
    # Queries together are narrower than the model; attention over a window in every other layer.
    "gemma2": Family({"model_type": "gemma2", "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
                      "sliding_window": 16, "query_pre_attn_scalar": 16}, *_GEMMA, (16, 2, 1)),
    "gemma3": Family(_GEMMA3_TEXT, *_GEMMA, (16, 2, 1)),
    # The sizes from 4B on also see; their text decoder is nested.
    "gemma3-multimodal": Family(
        {"model_type": "gemma3", "mm_tokens_per_image": 4, "text_config": _GEMMA3_TEXT,
         "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 32,
                           "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}},
        *_GEMMA, (16, 2, 1), NESTED_LAYERS),
}


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a family's template and that template's tokens."""
    family, tokenizer = FAMILIES[name], make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [
        AddedToken(token, special=True, normalized=False) for token in family.tokens]})
    tokenizer.eos_token = family.end
    tokenizer.chat_template = family.template
    return tokenizer


def config_of(name: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """A family's configuration in a tiny size."""
    common = {"vocab_size": len(tokenizer), "hidden_size": HIDDEN, "intermediate_size": INNER,
              "num_hidden_layers": NUMBER_OF_LAYERS, "max_position_embeddings": 512, "initializer_range": 0.15,
              "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
              "pad_token_id": tokenizer.pad_token_id}
    fields = dict(FAMILIES[name].config)
    if "text_config" in fields:
        fields["text_config"] = common | dict(fields["text_config"])
        fields |= {key: common[key] for key in ("initializer_range", "tie_word_embeddings", "eos_token_id")}
    else:
        fields = common | fields
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def write_family(folder: Path, name: str, seed: int = 0) -> Path:
    """A random float32 base of a family with its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = tokenizer_of(name)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config_of(name, tokenizer), dtype=torch.float32)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def widths_of(name: str) -> dict[str, tuple[int, int]]:
    """Input and output width of every module that can carry a LoRA, reckoned from the family's entry."""
    head, queries, keys = FAMILIES[name].widths
    return {"q_proj": (HIDDEN, head * queries), "k_proj": (HIDDEN, head * keys), "v_proj": (HIDDEN, head * keys),
            "o_proj": (head * queries, HIDDEN), "gate_proj": (HIDDEN, INNER), "up_proj": (HIDDEN, INNER),
            "down_proj": (INNER, HIDDEN)}


def random_adapter(name: str, seed: int, rank: int = 4, strength: float = 0.15) -> LoraAdapter:
    """Random factors for every module of every layer of a family's base."""
    generator = torch.Generator().manual_seed(seed)
    widths = widths_of(name)
    tensors = {module_path(layer, module, FAMILIES[name].layers): (
        torch.randn(rank, widths[module][0], generator=generator) * strength,
        torch.randn(widths[module][1], rank, generator=generator) * strength)
        for layer in range(NUMBER_OF_LAYERS) for module in MODULE_PARENTS}
    return LoraAdapter(rank, 1.5 * rank, tensors, name)
