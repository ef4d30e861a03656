"""Time and memory of language unlearning beside open-unlearning's, and of logits in pieces beside full ones.

    python -m expunge.benchmarks.language_cost --peer path/to/open-unlearning
    python -m expunge.benchmarks.language_cost --parts logits              # needs no checkout

time: seconds of processor time per step (median of a run's steps after the first two), both sides in turns in one process, the
ratio of each round, and their median. Goals: NPO <= 0.80, GradDiff <= 1.00.
memory: the peak of a process of its own, least of `--repeats`; "net" is without what an idle process holds that has
imported the same. Goals, net: NPO <= 0.80, with adapters <= 0.45, GradDiff <= 1.00.
logits: loss and gradient of 4 x 1024 tokens over a vocabulary of 131,072, by transformers' own loss and in pieces. Goal, whole
process: <= 0.25.

Both sides get the same Llama, rows, batch size, float32, AdamW (decay 0.01, clip 1.0, constant step size). Rows are random tokens
in the lengths of TOFU's questions and answers. Expunge changes the model in place (the peer does, too), without a utility
floor (the peer has none). The peer keeps a second model for NPO and runs it at every step; here one pass before the first
step leaves a number per row ("before", in steps).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from expunge.benchmarks.measuring import Clock, in_process, options, publish, spelled, table
from expunge.benchmarks.peer import peer_trainer
from expunge.cases import Case, requests
from expunge.cases.text import TextData
from expunge.engine.execute import execute, peak_memory_mb
from expunge.methods.registry import find
from expunge.parts import low_rank
from expunge.parts.plan import Plan
from expunge.seeds import generator
from expunge.tasks.language import Language

NAME = "language_cost"
LR = 1e-5
GOALS = {("time", "npo"): 0.80, ("time", "grad_diff"): 1.00, ("memory", "npo"): 0.80, ("memory", "npo, adapters"): 0.45,
         ("memory", "grad_diff"): 1.00}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """A Llama and its batches. forget, retain: rows."""

    width: int
    layers: int
    inner: int
    vocabulary: int
    batch: int
    forget: int = 32
    retain: int = 96

    @property
    def text(self) -> str:
        return f"{self.width}x{self.layers} Llama, vocabulary {self.vocabulary}, batch {self.batch} + {self.batch}"


SIZES = {
    "time": Size(128, 3, 352, 2048, 8),
    "memory": Size(512, 4, 1376, 16384, 2, 8, 12),
    "tiny": Size(32, 2, 48, 300, 4, 8, 12),
    "large": Size(768, 12, 2048, 32000, 2, 8, 12),
    "gpu": Size(1024, 8, 2736, 32000, 32, 128, 384),
}


def llama(size: Size) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.width, intermediate_size=size.inner, num_hidden_layers=size.layers,
        num_attention_heads=max(size.width // 64, 1), num_key_value_heads=max(size.width // 64, 1), pad_token_id=0,
        bos_token_id=1, eos_token_id=2, use_cache=False,
    ))  # fmt: skip


def rows(size: Size) -> TextData:
    """Questions of 12 to 28 tokens, answers of 25 to 75: what TOFU's are under Llama's tokenizer."""
    g = generator(0, NAME)
    tokens, starts = [], []
    for _ in range(size.forget + size.retain):
        question, answer = (int(torch.randint(low, high, (1,), generator=g)) for low, high in ((12, 29), (25, 76)))
        tokens.append(torch.randint(3, size.vocabulary, (question + answer,), generator=g).tolist())
        starts.append(question)
    return TextData(tokens, starts, pad=0)


def ours(
    method: str, size: Size, model: nn.Module, steps: int, adapters: bool = False, clock: Clock = time.process_time,
    precision: str | None = None,
) -> list[float]:  # fmt: skip
    """Run the method in place, where the model is; the clock before the first step and after each."""
    case = Case(model, rows(size), requests.samples(range(size.forget)), task=Language())
    per_epoch = -(-size.forget // size.batch)
    more = {"beta": 0.1} if method == "npo" else {}
    action = find(method).configure(
        epochs=-(-steps // per_epoch), batch_size=size.batch, lr=LR, optimizer="adamw", weight_decay=0.01, clip=1.0,
        schedule="constant", warmup=0.0, **more,
    ).action(case)  # fmt: skip
    assert isinstance(action, Plan)
    device = next(model.parameters()).device.type
    ticks = [clock()]
    if adapters:
        action = action.with_(scope=low_rank(8))
    execute(
        action, case, in_place=True, report=lambda *_: ticks.append(clock()), device=device if precision else None,
        mixed_precision=precision,
    )  # fmt: skip
    return ticks


def theirs(
    method: str, size: Size, model: nn.Module, steps: int, peer: str, clock: Clock = time.process_time,
    precision: str | None = None,
) -> list[float]:  # fmt: skip
    """Run their trainer; the clock before it is made and after each step."""
    split = list(range(size.forget)), list(range(size.forget, size.forget + size.retain))
    ticks = [clock()]
    settings = {"beta": 0.1} if method == "npo" else {}
    trainer = peer_trainer(
        peer, method, model, rows(size), *split, batch_size=size.batch, steps=steps, lr=LR,
        told=lambda _loss: ticks.append(clock()), precision=precision, **settings,
    )  # fmt: skip
    trainer.train()
    return ticks


def per_step(ticks: Sequence[float]) -> float:
    return median(b - a for a, b in zip(ticks[2:-1], ticks[3:], strict=True))


def timed(size: Size, steps: int, rounds: int, peer: str) -> list[dict[str, Any]]:
    """One row per method."""
    found = []
    for method in ("npo", "grad_diff"):
        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        before = []
        for number in range(rounds):
            for side in ("ours", "theirs")[:: -1 if number % 2 else 1]:
                model = llama(size)
                ticks = ours(method, size, model, steps) if side == "ours" else theirs(method, size, model, steps, peer)
                times[side].append(per_step(ticks))
                if side == "ours":
                    before.append((ticks[1] - ticks[0]) / times[side][-1] - 1)
        ratios = [a / b for a, b in zip(times["ours"], times["theirs"], strict=True)]
        goal = GOALS["time", method]
        found.append({
            "method": method, "expunge, s/step": median(times["ours"]), "open-unlearning, s/step": median(times["theirs"]),
            "before, steps": median(before), "ratio": median(ratios), "least": min(ratios), "most": max(ratios), "goal": goal,
            "met": median(ratios) <= goal,
        })  # fmt: skip
    return found


def weighed(size: str, steps: int, repeats: int, peer: str) -> list[dict[str, Any]]:
    def peak(*what: str) -> float:
        given = ("--worker", *what, "--size", size, "--steps", str(steps), "--peer", peer)
        return min(in_process(f"expunge.benchmarks.{NAME}", *given)["peak_mb"] for _ in range(repeats))

    idle = peak("idle")
    base = {method: peak("theirs", method) for method in ("npo", "grad_diff")}
    found = []
    for name, method, side in (
        ("npo", "npo", "ours"),
        ("npo, adapters", "npo", "adapters"),
        ("grad_diff", "grad_diff", "ours"),
    ):
        own, other = peak(side, method), base[method]
        net, goal = (own - idle) / (other - idle), GOALS["memory", name]
        found.append({
            "method": name, "expunge, MiB": own, "open-unlearning, MiB": other, "idle, MiB": idle,
            "ratio, whole process": own / other, "ratio, net of idle": net, "goal, net": goal, "met": net <= goal,
        })  # fmt: skip
    return found


def logits(way: str, vocabulary: int, length: int, device: str = "cpu") -> None:
    """Loss and gradient of 4 rows, all tokens answers; way: "full", "pieces", or "none" (nothing but the model)."""
    model = llama(Size(64, 1, 128, vocabulary, 4)).to(device)
    if way == "none":
        return
    ids = torch.randint(3, vocabulary, (4, length), generator=generator(0, "logits"))
    if way == "full":
        model(input_ids=ids.to(device), labels=ids.to(device)).loss.backward()
        return
    data, task = TextData(ids.tolist(), [0] * 4, pad=0), Language()
    batch = data.fetch(torch.arange(4)).to(device)
    task.loss(task.forward(model, batch), batch).mean().backward()


def logits_rows(vocabulary: int, length: int) -> list[dict[str, Any]]:
    given = ("--vocabulary", str(vocabulary), "--length", str(length))
    peaks = {
        w: in_process(f"expunge.benchmarks.{NAME}", "--worker", "logits", w, *given) for w in ("none", "full", "pieces")
    }
    none, full, pieces = (peaks[w]["peak_mb"] for w in ("none", "full", "pieces"))
    return [{
        "vocabulary": vocabulary, "batch": f"4 x {length}", "model alone, MiB": none, "full logits, MiB": full,
        "pieces, MiB": pieces, "ratio": pieces / full, "ratio, net of the model": (pieces - none) / (full - none), "goal": 0.25,
        "seconds, full": peaks["full"]["seconds"], "seconds, pieces": peaks["pieces"]["seconds"], "met": pieces / full <= 0.25,
    }]  # fmt: skip


def work(what: list[str], given: Any) -> dict[str, float]:
    size = SIZES[given.size]
    start = time.process_time()
    if what[0] == "logits":
        logits(what[1], given.vocabulary, given.length)
    elif what[0] == "idle":
        import peft  # noqa: F401 (what the others import)
        from transformers import LlamaForCausalLM, Trainer  # noqa: F401

        torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    elif what[0] == "theirs":
        theirs(what[1], size, llama(size), given.steps, given.peer)
    else:
        ours(what[1], size, llama(size), given.steps, adapters=what[0] == "adapters")
    return {"peak_mb": peak_memory_mb(), "seconds": time.process_time() - start}


def main(arguments: list[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    parser = options(NAME, __doc__)
    parser.add_argument("--peer", default="", help="a checkout of open-unlearning")
    parser.add_argument(
        "--parts", nargs="+", default=["logits", "time", "memory"], choices=["time", "memory", "logits"]
    )
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=131072)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--size", default="", help=f"of the model, one of {', '.join(SIZES)}; default: the part's own")
    parser.add_argument("--worker", nargs="+", help="internal: one run in a process of its own")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.worker:
        given.size = given.size or "memory"
        print(json.dumps(work(given.worker, given)))
        return {}
    start, found, body = time.perf_counter(), {}, (__doc__ or "").split("\n\n", 2)[2]
    for part in given.parts:
        size = SIZES.get(given.size or part)
        if part == "time":
            found[part] = timed(size, given.steps, given.rounds, given.peer)
            about = f"{size.text}, float32, {given.steps} steps, {given.rounds} rounds."
        elif part == "memory":
            found[part] = weighed(given.size or part, min(given.steps, 3), given.repeats, given.peer)
            about = f"{size.text}, float32, least of {given.repeats}."
        else:
            found[part] = logits_rows(given.vocabulary, given.length)
            about = "Llama of width 64, one layer; float32."
        body += f"\n## {part.capitalize()}\n\n{about}\n\n{table(found[part])}"
        # written after each part: a bench that is interrupted has not measured for nothing
        publish(NAME, spelled(NAME, arguments), time.perf_counter() - start, body, given.out or None)
    return found


if __name__ == "__main__":
    main()
