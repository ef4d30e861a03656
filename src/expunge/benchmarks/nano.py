"""A language model small enough to train from nothing on two cores: Llama's architecture on a slice of TOFU.

    testbed = nano_tofu(seed=0)       # trained in one to two minutes, then read from the cache
    testbed.case                      # original model, 60 forget, 260 retain, 60 holdout rows, probes
    testbed.folder                    # the original as an ordinary transformers folder

retain: authors 0-12 of `full` (260 rows). forget: authors 197-199 (60 rows). holdout: authors 194-196, never trained on.
Few rows and many epochs on purpose: the model recites its training rows (probability above 0.9) and knows nothing of the
others, so what is forgotten can be measured (the "Tiny-TOFU" of the cards; there on a GPT, here on a Llama).
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from expunge.audits.golds import original
from expunge.benchmarks.trained import Trained, cache_home
from expunge.cases import Case, requests
from expunge.cases.text import TextData
from expunge.cases.tofu import PER_AUTHOR, candidates, refusals, tofu, tofu_table
from expunge.errors import need_extra
from expunge.parts.plan import Optimizer, Training

VOCABULARY, WIDTH, LAYERS, HEADS, CONTEXT = 1200, 96, 3, 4, 256
RETAIN_ROWS, FORGET_AUTHORS, HOLDOUT_AUTHORS = 260, (197, 198, 199), (194, 195, 196)
TEMPLATE = "{question}<sep>"
RECIPE = Training(
    epochs=45, batch_size=16,
    optimizer=Optimizer("adamw", lr=3e-3, weight_decay=0.01, clip=1.0, schedule="linear", warmup=0.055),
)  # fmt: skip


class Nano(Trained):
    """The testbed of one seed."""

    @property
    def tokenizer(self) -> Any:
        return self.case.data.tokenizer


@cache
def nano_tokenizer() -> Any:
    """A byte-level BPE of 1,200 tokens, trained on TOFU's first 2,000 rows, the slice's own and the refusals."""
    rows = tofu("full")
    return byte_level_bpe(
        [f"{r['question']}\n{r['answer']}" for r in [*rows[:2000], *rows[-120:]]] + refusals(), VOCABULARY
    )


def byte_level_bpe(texts: list[str], vocabulary: int) -> Any:
    """A tokenizer of transformers trained on these texts, with padding (0), end (1) and a separator (2)."""
    tokenizers, transformers = need_extra("tokenizers", "language"), need_extra("transformers", "language")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<pad>", "<eos>", "<sep>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    inner.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", additional_special_tokens=["<sep>"],
        model_max_length=CONTEXT,
    )  # fmt: skip


def llama(vocabulary: int = VOCABULARY, width: int = WIDTH, layers: int = LAYERS, heads: int = HEADS) -> Any:
    """An untrained Llama, 0.45 M parameters at the default sizes; embeddings and head are tied."""
    transformers = need_extra("transformers", "language")
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        pad_token_id=0, eos_token_id=1, bos_token_id=None, attention_dropout=0.0, use_cache=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def nano_rows(authors: tuple[int, ...]) -> list[dict[str, Any]]:
    """TOFU's rows of these authors, in order."""
    rows = tofu("full")
    return [row for a in authors for row in rows[20 * a : 20 * a + 20]]


def nano_case(authors: tuple[int, ...] = FORGET_AUTHORS) -> Case:
    """The case with an untrained model: what original and retrained are trained from. authors: the last ones, to forget."""
    tokenizer = nano_tokenizer()
    table = partial(tofu_table, tokenizer, template=TEMPLATE, max_length=CONTEXT)
    forget, retain = nano_rows(FORGET_AUTHORS), tofu("full")[:RETAIN_ROWS]
    parts = table(retain, decline=refusals()), table(forget, first_author=FORGET_AUTHORS[0])
    probe = partial(candidates, tokenizer, template=TEMPLATE, max_length=CONTEXT)
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = llama()
    torch.random.set_rng_state(torch_state)
    return Case(
        model, joined(*parts), requests.where("author", ">=", authors[0]), task="language",
        holdout=table(nano_rows(HOLDOUT_AUTHORS), first_author=HOLDOUT_AUTHORS[0]), recipe=RECIPE, name="nano-tofu",
        probes={
            "forget_perturbed": probe(tofu("forget10_perturbed")[-PER_AUTHOR * len(authors) :]),
            "retain_perturbed": probe(tofu("retain_perturbed")[:100]),
        },
    )  # fmt: skip


def joined(*tables: TextData) -> TextData:
    """Tables of one tokenizer, one after the other; refusals are the first's."""
    first = tables[0]
    columns = {
        n: [v for t in tables for v in list(t.column(n))] for n in first.names if n not in ("input_ids", "labels")
    }
    columns = {n: [v.item() if isinstance(v, torch.Tensor) else v for v in values] for n, values in columns.items()}
    return TextData(
        [row for t in tables for row in t.tokens], [s for t in tables for s in t.starts], first.tokenizer,
        refusals=first.refusals, pad=first.pad, **columns,
    )  # fmt: skip


@cache
def nano_tofu(seed: int = 0, cache: Path | None = None, authors: tuple[int, ...] = FORGET_AUTHORS) -> Nano:
    """The testbed of one seed; models are kept by content under `cache` (default: `cache_home()`)."""
    where = Path(cache or cache_home()) / "nano"
    case = nano_case(authors)
    return Nano(case.with_(model=original(case, seed, where).model), seed, where)
