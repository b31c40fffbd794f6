"""Tiny LLaMAs with their tokenizers and a data set of very unequal lengths, made on the spot."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(60)]
CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]


def write_model(
    folder: Path, hidden: int = 36, intermediate: int = 52, layers: int = 2, seed: int = 0
) -> Path:
    """A random LLaMA whose shapes no small world size divides: 2 heads of 18, 1 key/value head by default."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=len(WORDS) + 40,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.15,
    )
    _write_weights(config, folder, seed)
    write_tokenizer(folder)
    return folder


def write_talking_model(folder: Path) -> Path:
    """A random LLaMA for generation: heads of 32, which vLLM needs on a CPU, and one token a character."""
    config = LlamaConfig(
        vocab_size=len(CHARACTERS) + 3,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
        # Large enough that the logits of a random model are well apart and its text varies.
        initializer_range=0.3,
    )
    _write_weights(config, folder, seed=0)
    _write_character_tokenizer(folder)
    return folder


def _write_weights(config: LlamaConfig, folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)


def write_tokenizer(folder: Path) -> None:
    """One token a word or mark; the end-of-text token is the padding token too."""
    prompt = ["Below", "is", "an", "instruction", "that", "describes", "a", "task", ".", "Write", "response"]
    prompt += ["appropriately", "completes", "the", "request", "###", "Instruction", ":", "Response", "Let"]
    prompt += ["'", "s", "think", "step", "by", "#", "answer", "The"]
    vocabulary = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *dict.fromkeys([*prompt, *WORDS])])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)


def _write_character_tokenizer(folder: Path) -> None:
    """Prepends the beginning-of-text token, as LLaMA's tokenizers do."""
    vocabulary = {token: place for place, token in enumerate(["<s>", "</s>", "<pad>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def write_data(path: Path, samples: int = 40, seed: int = 0, longest: int = 60) -> Path:
    """MetaMathQA rows whose answers have 1 to `longest` words; the answer depends on the question."""
    print(f"data seed {seed}")
    draw = random.Random(seed)
    rows = []
    for _ in range(samples):
        length = draw.choice([1, 2, 3, 5, 8, longest // 2, longest])
        question = [draw.choice(WORDS) for _ in range(draw.randint(1, 12))]
        answer = [question[i % len(question)] for i in range(length)]
        rows.append({"query": " ".join(question), "response": " ".join(answer)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
