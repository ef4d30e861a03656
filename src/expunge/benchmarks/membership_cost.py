"""Six membership scores of a text for the price of one forward pass, and TOFU's whole evaluation beside open-unlearning's.

    python -m expunge.benchmarks.membership_cost                          # goal: scores / bare pass <= 1.15
    git clone https://github.com/locuslab/open-unlearning PEER
    python -m expunge.benchmarks.membership_cost --peer PEER              # goal: evaluation / open-unlearning's <= 0.5

bare: the model's forward on a batch, log-softmax of its logits and the answer tokens' entries, which is what one score of one
attack takes. scores: the same batches through `Language.forward` and `Language.signals`: loss, zlib, Min-20/40%, Min-20/40%++
(and three more). Rows with a prompt have it left out of the head; in plain text every token is scored. The model is the
nano testbed's, untrained: what it says does not change what it costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from expunge.audits.attacks.token_membership import ONE_PASS
from expunge.benchmarks.measuring import Times, clock_of, in_turns, options, publish, spelled, table
from expunge.benchmarks.nano import CONTEXT, TEMPLATE, llama, nano_tokenizer
from expunge.cases.text import TextData, plain_text
from expunge.cases.tofu import tofu, tofu_table
from expunge.tasks.base import Batch, evaluating, move_to_model
from expunge.tasks.language import Language

NAME = "membership_cost"
GOAL = 1.15


def bare(model: nn.Module, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """Log-probabilities (B, T - 1) of the given tokens by the shortest code."""
    found = []
    with evaluating(model):
        for batch in batches:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
            log_p = F.log_softmax(logits[:, :-1], dim=-1)
            found.append(log_p.gather(2, batch["input_ids"][:, 1:, None]).squeeze(2))
    return found


def scores(model: nn.Module, batches: Sequence[Batch]) -> list[dict[str, torch.Tensor]]:
    """All scores of one pass."""
    task, found = Language(), []
    with evaluating(model):
        for batch in batches:
            found.append(task.signals(task.forward(model, batch), batch))
    return found


def compare(model: nn.Module, data: TextData, batch_size: int, rounds: int, device: str) -> Times:
    """Both in turns on the same batches; their losses must agree."""
    batches = [move_to_model(data.fetch(ids), model) for ids in torch.arange(len(data)).split(batch_size)]
    own = torch.cat([part["loss"] for part in scores(model, batches)])
    for name in ONE_PASS:
        assert name in scores(model, batches[:1])[0], name
    given = []
    for batch, log_p in zip(batches, bare(model, batches), strict=True):
        counted = batch["labels"][:, 1:] != -100
        given.append((log_p * counted).sum(1) / counted.sum(1))
    assert torch.allclose(own, torch.cat(given).double(), atol=1e-4), "both sides must score the same"

    def finished(run: Callable[..., Any]) -> Callable[[], None]:
        def action() -> None:
            run(model, batches)
            if device != "cpu":
                torch.cuda.synchronize()

        return action

    return in_turns({"bare": finished(bare), "scores": finished(scores)}, rounds, clock=clock_of(device))


def rows(count: int, tokenizer: Any = None) -> dict[str, TextData]:
    """The same TOFU rows with prompts, and as plain text. tokenizer: default: the embedded model's."""
    tokenizer, found = tokenizer or nano_tokenizer(), tofu("full")[:count]
    return {
        "question and answer": tofu_table(tokenizer, found, template=TEMPLATE, max_length=CONTEXT),
        "plain text": plain_text(tokenizer, [f"{row['question']} {row['answer']}" for row in found], window=CONTEXT),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(NAME, __doc__)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = time.perf_counter()
    model = llama().to(given.device)
    lines = lines_of(model, rows(given.rows), given.batch_size, given.rounds, given.device)
    publish(NAME, spelled(NAME, arguments), time.perf_counter() - start, table(lines), given.out or None)


def lines_of(
    model: nn.Module, tables: dict[str, TextData], batch_size: int, rounds: int, device: str
) -> list[dict[str, Any]]:
    """One line of the table for each of the row tables."""
    lines = []
    for name, data in tables.items():
        times = compare(model, data, batch_size, rounds, device)
        low, high = times.range("scores", "bare")
        lines.append({
            "rows": name, "texts": len(data), "bare s": times.median("bare"), "six scores s": times.median("scores"),
            "ratio": times.ratio("scores", "bare"), "from": low, "to": high,
            f"<= {GOAL}": times.ratio("scores", "bare") <= GOAL,
        })  # fmt: skip
    return lines


if __name__ == "__main__":
    main()
