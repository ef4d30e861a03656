"""The smallest language cases: random token rows, a Llama (or another architecture) of a few thousand weights, no training."""

from __future__ import annotations

import torch
from torch import nn

from expunge import Case, Training, requests
from expunge.cases.text import TextData
from expunge.parts.plan import Optimizer
from expunge.seeds import generator

VOCABULARY = 40


def llama(layers: int = 3, width: int = 16, tied: bool = False, vocabulary: int = VOCABULARY) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def mixtral(layers: int = 2, width: int = 16, experts: int = 4) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=width, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=experts, num_experts_per_tok=2, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


def rows(n: int, seed: int = 0) -> TextData:
    """n rows of 4..6 prompt tokens and 2..4 answer tokens, the last of which ends the text; tokens 1..2 of a prompt are the
    subject (column `subject` names its end for tests)."""
    g = generator(seed, "tiny language")
    tokens, starts = [], []
    for _ in range(n):
        prompt = torch.randint(3, VOCABULARY, (int(torch.randint(4, 7, (1,), generator=g)),), generator=g).tolist()
        answer = torch.randint(3, VOCABULARY, (int(torch.randint(1, 4, (1,), generator=g)),), generator=g).tolist()
        tokens.append([*prompt, *answer, 2])
        starts.append(len(prompt))
    return TextData(tokens, starts, pad=0)


def language_case(model: nn.Module | None = None, n: int = 24, forget: int = 8, seed: int = 0, **settings) -> Case:
    torch.manual_seed(seed)
    model = llama() if model is None else model
    recipe = Training(epochs=2, batch_size=8, optimizer=Optimizer("adamw", lr=1e-3))
    settings = {"recipe": recipe, "test": rows(12, seed + 1)} | settings
    return Case(model, rows(n, seed), requests.samples(range(forget)), task="language", **settings)
