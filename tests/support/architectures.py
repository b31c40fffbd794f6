"""Tiny random models of the architectures that the documentation names, with the tokenizer of tests/support/tiny."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from dynrank_ds.training.architecture import auto_class
from tests.support.tiny import write_tokenizer

_COMMON: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "initializer_range": 0.15,
}
_NEOX = {key: value for key, value in _COMMON.items() if key not in ("num_key_value_heads", "head_dim")}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MULTIPLIERS = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.4}

_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
_OWN_SIZES = ("gpt_neox", "falcon", "llava")
"""Model types whose configuration refuses some of the common sizes."""

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "LLaMA": ("llama", {}),
    "Mistral": ("mistral", {"sliding_window": 8}),
    "Qwen2": ("qwen2", {}),
    "Qwen2.5, tied": ("qwen2", {"tie_word_embeddings": True}),
    "Qwen3": ("qwen3", {}),
    "Gemma-2": ("gemma2", {"final_logit_softcapping": 3.0, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "Gemma-3 (text)": ("gemma3_text", {"sliding_window": 8, "query_pre_attn_scalar": 8}),
    "Phi-3": ("phi3", {}),
    "Phi-4": ("phi3", {"partial_rotary_factor": 0.5}),
    "Cohere": ("cohere", {"logit_scale": 0.25}),
    "Cohere2": ("cohere2", {"logit_scale": 0.25, "sliding_window": 8}),
    "Granite": ("granite", {"logits_scaling": 4.0, **_MULTIPLIERS}),
    "OLMo-2": ("olmo2", {}),
    "SmolLM3": ("smollm3", {}),
    "DeepSeek-V3": (
        "deepseek_v3",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 12,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "head_dim": 8,
        },
    ),
    "GPT-NeoX": ("gpt_neox", _NEOX),
    "Mixtral": ("mixtral", {"num_local_experts": 4}),
    "Qwen2-MoE": ("qwen2_moe", {**_EXPERTS, "shared_expert_intermediate_size": 24}),
    "Qwen3-MoE": ("qwen3_moe", _EXPERTS),
    "Falcon-H1": (
        "falcon_h1",
        {
            "lm_head_multiplier": 0.3,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 16,
        },
    ),
    "LLaVA": (
        "llava",
        {
            "text_config": {"model_type": "llama", **_COMMON},
            "vision_config": {
                "model_type": "clip_vision_model",
                **_TOWER,
                "image_size": 28,
                "patch_size": 14,
            },
            "image_token_index": 99,
        },
    ),
    "OPT": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "BLOOM": ("bloom", {"n_layer": 2, "n_head": 4}),
    "Falcon": ("falcon", {**_NEOX, "alibi": False, "new_decoder_architecture": False}),
}
"""Name -> model type and what its configuration says beyond the common sizes."""


def architecture_config(model_type: str, changes: dict[str, Any]) -> Any:
    """The configuration of a model of that type with 2 layers of width 32."""
    common = {} if model_type in _OWN_SIZES else _COMMON
    return AutoConfig.for_model(model_type, **common | changes)


def write_architecture(folder: Path, model_type: str, changes: dict[str, Any]) -> Path:
    """A random model of that type with a tokenizer."""
    config = architecture_config(model_type, changes)
    torch.manual_seed(0)
    auto_class(config).from_config(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder
