"""The ratios of `language_cost`, `membership_cost` and `tofu_official` on a CUDA device, at a size that fills one.

    git clone https://github.com/locuslab/open-unlearning PEER
    python -m expunge.benchmarks.tofu_large                        # trains the model that "evaluation" is of
    python -m expunge.benchmarks.language_gpu --peer PEER

steps: seconds per step (median after the first two, the device waited for) and the largest memory that torch had allocated
for a run, both sides in turns in one process, the ratio of each round, and their median. Goals: NPO's time <= 0.80 and memory
<= 0.80, with adapters' memory <= 0.45, GradDiff's both <= 1.00. In bfloat16 by autocast on both sides, and in float32.
logits: loss and gradient of 4 x 1024 tokens over a vocabulary of 131,072. Goal: memory <= 0.25.
membership: six scores of a text over a bare forward pass. Goal: <= 1.15.
evaluation: TOFU's whole evaluation of `tofu_large`'s original over open-unlearning's. Goal: <= 0.5. Its holdout rows are the
forget questions with wrong answers, which no model has seen.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from expunge.audits.golds import original
from expunge.benchmarks import language_cost, membership_cost, tofu_large, tofu_official
from expunge.benchmarks.measuring import options, publish, spelled, table
from expunge.benchmarks.nano import CONTEXT, TEMPLATE
from expunge.cases import Case
from expunge.cases.tofu import candidates, tofu, tofu_table

NAME = "language_gpu"
PARTS = ("steps", "logits", "membership", "evaluation")
SIDES = {
    "npo": ("npo", False, 0.80, 0.80), "npo, adapters": ("npo", True, None, 0.45), "grad_diff": ("grad_diff", False, 1.0, 1.0),
}  # fmt: skip
"""Row -> method, whether ours moves adapters alone, goal of time and of memory."""


def clock() -> float:
    """Wall time, with all that was asked of the device done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak(run: Callable[[], Any]) -> tuple[Any, float]:
    """What the run returns, and the MiB that torch had allocated at most beyond what it had before (0 without CUDA)."""
    gc.collect()
    if not torch.cuda.is_available():
        return run(), 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = run()
    return found, (torch.cuda.max_memory_allocated() - before) / 2**20


def steps(size: str, count: int, rounds: int, peer: str, device: str) -> str:
    shape, lines = language_cost.SIZES[size], []
    for precision in ("bf16", None):
        for name, (method, adapters, faster, smaller) in SIDES.items():
            times: dict[str, list[float]] = {"ours": [], "theirs": []}
            memory: dict[str, list[float]] = {"ours": [], "theirs": []}
            for number in range(rounds):
                for side in ("ours", "theirs")[:: -1 if number % 2 else 1]:
                    ticks, most = peak(partial(one, side, method, shape, count, peer, adapters, precision, device))
                    times[side].append(language_cost.per_step(ticks))
                    memory[side].append(most)
            ratio = median(a / b for a, b in zip(times["ours"], times["theirs"], strict=True))
            share = median(a / b if b else 0.0 for a, b in zip(memory["ours"], memory["theirs"], strict=True))
            lines.append({
                "method": name, "precision": precision or "float32", "expunge, ms/step": 1e3 * median(times["ours"]),
                "open-unlearning, ms/step": 1e3 * median(times["theirs"]), "time ratio": ratio, "time goal": faster,
                "expunge, MiB": median(memory["ours"]), "open-unlearning, MiB": median(memory["theirs"]),
                "memory ratio": share, "memory goal": smaller,
                "met": share <= smaller and (faster is None or ratio <= faster),
            })  # fmt: skip
    return f"{shape.text}, {count} steps, {rounds} rounds.\n\n{table(lines)}"


def one(
    side: str, method: str, shape: language_cost.Size, count: int, peer: str, adapters: bool, precision: str | None, device: str
) -> list[float]:  # fmt: skip
    """One side's run on a fresh model, which is part of what it holds."""
    with torch.device(device):
        model = language_cost.llama(shape)
    if side == "ours":
        return language_cost.ours(method, shape, model, count, adapters, clock, precision)
    return language_cost.theirs(method, shape, model, count, peer, clock, precision)


def logits(vocabulary: int, length: int, device: str) -> str:
    most, seconds = {}, {}
    for way in ("none", "full", "pieces", "full", "pieces"):  # the first of each warms up
        start = clock()
        _, most[way] = peak(partial(language_cost.logits, way, vocabulary, length, device))
        seconds[way] = clock() - start
    ratio = most["pieces"] / max(most["full"], 1e-9)
    return table([{
        "vocabulary": vocabulary, "batch": f"4 x {length}", "model alone, MiB": most["none"], "full logits, MiB": most["full"],
        "pieces, MiB": most["pieces"], "ratio": ratio, "goal": 0.25, "seconds, full": seconds["full"],
        "seconds, pieces": seconds["pieces"], "met": ratio <= 0.25,
    }])  # fmt: skip


def membership(size: str, device: str, texts: int, rounds: int) -> str:
    case = tofu_large.large_case(tofu_large.SIZES[size], device)
    tables = membership_cost.rows(texts, case.data.tokenizer)  # type: ignore[attr-defined]
    lines = []
    for batch in (32, 128):
        found = membership_cost.lines_of(case.model, tables, batch, rounds, device)
        lines += [{"batch": batch, **line} for line in found]
    return table(lines)


def with_knowledge(case: Case, questions: int, knowledge: int) -> Case:
    """The case with all probe tables and rows that were never trained on."""
    words = case.data.tokenizer  # type: ignore[attr-defined]
    probe = partial(candidates, words, template=TEMPLATE, max_length=CONTEXT)
    forget = tofu("forget10_perturbed")[-questions:]
    unseen = [{"question": row["question"], "answer": row["perturbed_answer"][0]} for row in forget]
    return case.with_(
        holdout=tofu_table(words, unseen, template=TEMPLATE, max_length=CONTEXT),
        probes={
            "forget_perturbed": probe(forget), "retain_perturbed": probe(tofu("retain_perturbed")[:questions]),
            "real_authors": probe(tofu("real_authors_perturbed")[:knowledge]),
            "world_facts": probe(tofu("world_facts_perturbed")[:knowledge]),
        },
    )  # fmt: skip


def evaluation(size: str, device: str, peer: str, golds: Path, rounds: int, questions: int, knowledge: int) -> str:
    case = tofu_large.large_case(tofu_large.SIZES[size], device)
    known = tofu_large.trained_file(case, 0, golds).exists()
    model = original(case, 0, golds).model if known else case.model
    assert model is not None
    case = with_knowledge(case.with_(model=model), questions, knowledge)
    body = tofu_official.compared(case, model, Path(peer), rounds, clock)
    return f"{'The trained original' if known else 'An untrained model'}, {questions} questions each.\n\n{body}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(NAME, __doc__)
    parser.add_argument("--peer", required=True, help="a checkout of locuslab/open-unlearning")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", default="gpu", help="of the model of the steps, a size of language_cost")
    parser.add_argument("--trained", default="large", help="a size of tofu_large, for the other parts")
    parser.add_argument("--folder", default=f"runs/{tofu_large.NAME}", help="where tofu_large keeps its models")
    parser.add_argument("--vocabulary", type=int, default=131072)
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--questions", type=int, default=128)
    parser.add_argument("--knowledge", type=int, default=64)
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: nothing measured; the CPU ratios are of language_cost and the others")
        return
    torch.set_float32_matmul_precision("high")
    start, body = time.perf_counter(), (__doc__ or "").split("\n\n", 2)[2]
    golds = Path(given.folder) / given.trained / "golds"
    made = {
        "steps": lambda: steps(given.size, given.steps, given.rounds, given.peer, given.device),
        "logits": lambda: logits(given.vocabulary, 1024, given.device),
        "membership": lambda: membership(given.trained, given.device, given.texts, given.rounds),
        "evaluation": lambda: evaluation(
            given.trained, given.device, given.peer, golds, given.rounds, given.questions, given.knowledge
        ),
    }
    for part in given.parts:
        body += f"\n## {part.capitalize()}\n\n{made[part]()}"
        # written after each part: a bench that is interrupted has not measured for nothing
        publish(NAME, spelled(NAME, arguments), time.perf_counter() - start, body, given.out or None)


if __name__ == "__main__":
    main()
