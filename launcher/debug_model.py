"""Writes the tiny random model of a recipe part such as llama2_debug, with a tokenizer of words.

    python launcher/debug_model.py llama2_debug

Its 16 layers have 112 linears, so that every method's settings for LLaMA fit it. Words that the prompts do not have are
the tokenizer's unknown token: losses say that training runs, not that anything is learned.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dynrank_ds.composing import read_recipe
from dynrank_ds.prompts import PROMPTS

SHAPES: dict[str, dict[str, Any]] = {
    # As in LLaMA-2-7B every head has its own keys and values.
    "llama2_debug": {
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    # As in LLaMA-3-8B four heads share them.
    "llama3_debug": {
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
}
_SPECIAL = ("<unk>", "<s>", "</s>")


def write_model(name: str, folder: Path) -> None:
    """Write configuration, weights and tokenizer of SHAPES[name]."""
    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=16,
        num_attention_heads=4,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        **SHAPES[name],
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token a word or mark of the prompts, or a character of ASCII; a text begins with <s>."""
    words = re.findall(r"\w+|[^\w\s]", " ".join(PROMPTS.values()))
    characters = [chr(code) for code in range(33, 127)]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*_SPECIAL, *words, *characters]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write the tiny random model that a debug recipe trains.",
        epilog="example: python launcher/debug_model.py llama2_debug",
    )
    parser.add_argument("name", choices=sorted(SHAPES))
    parser.add_argument("--output", type=Path, help="folder; by default where the recipe has it")
    arguments = parser.parse_args()
    folder = arguments.output or Path(read_recipe(arguments.name)["model"]["path"])
    write_model(arguments.name, folder)
    print(folder)


if __name__ == "__main__":
    main()
