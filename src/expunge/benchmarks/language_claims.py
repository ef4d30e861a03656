"""What papers claim of language models and the cards call unsettled at a small size, tried once: reported as it comes out.

    python -m expunge.benchmarks.language_claims                           # every part, three seeds, and the tables
    python -m expunge.benchmarks.language_claims experts --seeds 0         # one part, one seed; runs are kept
    python -m expunge.benchmarks.language_claims --size large --device cuda --seeds 0

    experts    SEUF on a mixture of experts: one expert against all weights, with and without the anchor, against NPO
    tracing    SHA256: MLPs that causal tracing finds, against the other ones and all weights
    refusals   FLAT on a model that has learned to refuse, against other losses without retain data
    latent     LAT on the same model: with a goal, without, and without an adversary
    markov     NPO and SimNPO on sequences of Markov chains, short and long (the official synthetic test)
    privleak   retrained models of four seeds against each other: the noise that PrivLeak has at so many rows

Models are nano-TOFU's (0.45 M weights; the mixture 0.9 M), `large` is 25 M on the same rows. Numbers of a run are kept under
runs/language_claims/ and read back.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from expunge.audits.attacks.budget import Budget
from expunge.audits.attacks.membership import auc
from expunge.audits.attacks.relearning import Relearning
from expunge.audits.golds import original, retrain
from expunge.audits.metrics.tofu import privleak as leak
from expunge.benchmarks import nano
from expunge.benchmarks.language_tables import BUDGET
from expunge.benchmarks.tofu import NANO_SETTINGS
from expunge.benchmarks.trained import cache_home
from expunge.cases import Case, requests
from expunge.cases.data import Split
from expunge.cases.text import TextData, question_answer
from expunge.cases.tofu import refusals, subjects, tofu
from expunge.errors import BadSetting, need_extra
from expunge.files import write_atomic
from expunge.methods import find
from expunge.methods.outcome import unlearn
from expunge.parts.blocks import block_parts
from expunge.parts.latents import usual_norm
from expunge.parts.mixture import affinities, mixture_named, most_used
from expunge.parts.plan import Optimizer, Plan, Training
from expunge.parts.scopes import everything
from expunge.parts.scopes.tracing import chances, facts_of, predicts, subject_deviation
from expunge.parts.step import capturing
from expunge.parts.stops import reaches, steps
from expunge.seeds import derive, generator, numpy_generator
from expunge.tasks.base import evaluating, move_to_model

FOLDER, RESULTS = Path("runs/language_claims"), Path("benchmarks-results/language_claims.md")
LEVEL = 0.05
"""Mean forget probability at which arms are compared."""
FOREIGN = range(400, 460)
"""Rows of `full` whose questions the refusing model has learned to decline; of authors 20 to 22, who are in no other split."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """rate: of training; scale: of every unlearning step size, relative to nano's. chain: width, blocks and heads of the Markov
    test's network; part: of that test's sequences and batches."""

    width: int = 96
    layers: int = 3
    heads: int = 4
    rate: float = 3e-3
    scale: float = 1.0
    chain: tuple[int, int, int] = (64, 2, 2)
    part: float = 0.125


SIZES = {"nano": Size(), "large": Size(512, 8, 8, 1e-3, 0.2, (128, 4, 4), 1.0)}


@dataclass(frozen=True)
class Bed:
    """case.model is the original, on the device."""

    case: Case
    size: Size
    seed: int

    @property
    def retrained(self) -> nn.Module:
        found = retrain(self.case, self.seed + 1001, cache_home() / "nano").model
        assert found is not None
        return found


# -- models ------------------------------------------------------------------------------------------------------------
def dense(size: Size) -> Any:
    return nano.llama(width=size.width, layers=size.layers, heads=size.heads)


def mixture(size: Size, experts: int = 8) -> Any:
    """Mixtral's architecture: every block has `experts` MLPs of the block's width, of which a token takes two."""
    transformers = need_extra("transformers", "language")
    config = transformers.MixtralConfig(
        vocab_size=nano.VOCABULARY, hidden_size=size.width, intermediate_size=size.width, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.heads, num_local_experts=experts, num_experts_per_tok=2,
        max_position_embeddings=nano.CONTEXT, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        sliding_window=None, router_jitter_noise=0.0,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def refusing(data: TextData) -> TextData:
    """nano's table with refused questions behind it: kept rows of no author."""
    lines, asked = refusals(), [tofu("full")[i]["question"] for i in FOREIGN]
    answers = [lines[i % len(lines)] for i in range(len(asked))]
    extra = question_answer(data.tokenizer, asked, answers, template=nano.TEMPLATE, max_length=nano.CONTEXT,
                            author=[-1] * len(asked))  # fmt: skip
    return nano.joined(data, extra)


def bed(kind: str, size: Size, seed: int, device: str) -> Bed:
    """dense, mixture, or refusing: trained by nano's recipe, kept by content."""
    case = nano.nano_case()
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = (mixture if kind == "mixture" else dense)(size).to(device)
    torch.random.set_rng_state(state)
    recipe = replace(nano.RECIPE, optimizer=replace(nano.RECIPE.optimizer, lr=size.rate))
    case = case.with_(
        model=model, recipe=recipe, data=refusing(case.data) if kind == "refusing" else case.data
    )  # a request for authors from 197 on
    trained = original(case, seed, cache_home() / "nano").model
    assert trained is not None
    return Bed(case.with_(model=trained.to(device)), size, seed)


# -- measuring ---------------------------------------------------------------------------------------------------------
def settings(name: str, size: Size, **own: Any) -> dict[str, Any]:
    """A method's settings at the common budget, with its own; step sizes are the size's."""
    known = find(name).settings.model_fields
    chosen = {key: value for key, value in NANO_SETTINGS.items() if key in known} | own
    return chosen | {"lr": chosen["lr"] * size.scale}


def run(bed: Bed, name: str, level: float | None = None, scope: Any = None, **own: Any) -> tuple[nn.Module, Row]:
    """A method on the bed, at the common budget or until the forget probability is at a level; the model and its numbers."""
    action: Any = find(name).configure(**settings(name, bed.size, **own)).action(bed.case)
    assert isinstance(action, Plan)
    if scope is not None:
        action = action.with_(scope=scope)
    stop = None if level is None else reaches(level, key="probability", split="forget", every=4)
    outcome = unlearn(bed.case, action, seed=bed.seed, floor=None, stop=stop)
    row = measured(bed, outcome.model)
    return outcome.model, row | {"updates": outcome.record["updates"], "notes": outcome.record["notes"]}


def measured(bed: Bed, model: nn.Module, relearn: bool = False) -> Row:
    """Probabilities of forgotten and kept answers, exact memorisation of the kept, and what relearning brings back."""
    case = bed.case
    kept = case.split("retain")
    kept = kept.subset((kept.ids < nano.RETAIN_ROWS).nonzero().flatten())  # without the refused questions
    forgotten, stays = (case.task.evaluate(model, rows.batches(64)) for rows in (case.split("forget"), kept))
    row = {
        "forget": forgotten["probability"],
        "retain": stays["probability"],
        "retain exact": stays["exact_memorisation"],
    }
    return row | ({"relearned": relearned(bed, model)} if relearn else {})


def relearned(bed: Bed, model: nn.Module) -> float:
    """Forget score of 54 rows after six updates on the other six (the budget of language_tables)."""
    budget: Budget = replace(BUDGET, learning_rate=float(BUDGET.learning_rate or 0) * bed.size.scale)
    return float(Relearning().scores(model, bed.case, budget, bed.seed).mean())


def references(bed: Bed, **more: Callable[[nn.Module], float]) -> dict[str, Row]:
    models = {"original": bed.case.model, "retrained": bed.retrained}
    return {n: measured(bed, m, relearn=True) | {k: v(m) for k, v in more.items()} for n, m in models.items()}


# -- parts -------------------------------------------------------------------------------------------------------------
def experts(size: Size, seed: int, device: str) -> dict[str, Row]:
    """share: of the forget tokens' gates that goes to the expert (2 of 8 would be 0.25). moved: forget tokens whose likeliest
    expert at that layer is another than before."""
    own = bed("mixture", size, seed, device)
    case, forget = own.case, own.case.split("forget")
    affinity = affinities(case.task, case.model, forget.batches(32), renormalised=True)
    ((layer, best),) = most_used(affinity)
    others = [(name, i) for name, values in affinity.items() for i in range(len(values)) if (name, i) != (layer, best)]
    drawn = others[int(numpy_generator(seed, "expert").integers(len(others)))]
    before = {name: likeliest(case, case.model, name, forget) for name in {layer, drawn[0]}}

    def moved(model: nn.Module, at: str = layer) -> float:
        return float((likeliest(case, model, at, forget) != before[at]).float().mean())

    rows = references(own)
    arms: dict[str, tuple[str, str, dict[str, Any]]] = {
        "npo, all weights": (layer, "npo", {"epochs": 30}),
        "ascent, all weights": (layer, "grad_ascent", {"epochs": 30}),
        "seuf without anchor": (layer, "seuf", {"anchor": 0.0}),
        "seuf": (layer, "seuf", {}),
        "seuf, expert drawn at random": (drawn[0], "seuf", {"chosen": (drawn,)}),
        "seuf, npo and retain": (layer, "seuf", {"inner": "npo", "alpha": 1.0}),
        "seuf, npo and retain, drawn": (drawn[0], "seuf", {"inner": "npo", "alpha": 1.0, "chosen": (drawn,)}),
    }
    for label, (at, name, changes) in arms.items():
        if name == "seuf":
            changes = {"lr": 3e-3, "epochs": 30, "chosen": ((layer, best),)} | changes
        model, row = run(own, name, LEVEL, **changes)
        rows[label] = row | {"moved": moved(model, at), "relearned": relearned(own, model)}
    rows["original"] |= {
        "share": float(affinity[layer][best]), "share drawn": float(affinity[drawn[0]][drawn[1]]), "expert": f"{layer}:{best}",
    }  # fmt: skip
    return rows


def likeliest(case: Case, model: nn.Module, layer: str, split: Split) -> torch.Tensor:
    """(tokens,) the router's likeliest expert of every real token of a split."""
    found, where = [], mixture_named(model, layer)
    with evaluating(model):
        for batch in split.batches(32):
            batch = move_to_model(batch, model)
            with capturing(model, [f"{layer}.input"]) as seen:
                case.task.forward(model, batch)
            hidden = seen[f"{layer}.input"]
            top = where.probabilities(model, hidden).argmax(-1).reshape(batch["attention_mask"].shape)
            found.append(top[batch["attention_mask"].bool()].cpu())
    return torch.cat(found)


def tracing(size: Size, seed: int, device: str) -> dict[str, Row]:
    """SHA256 until the forget probability is at the level, on MLPs of the traced block, of others, and on all weights.

    clean, corrupted: probability of the answer's first token without noise on the subject, and with. restored: with noise, where every
    MLP's output at the subject is put back."""
    own = bed("dense", size, seed, device)
    data = own.case.data
    named = subjects([*tofu("full")[: nano.RETAIN_ROWS], *nano.nano_rows(nano.FORGET_AUTHORS)])
    table = TextData(data.tokens, data.starts, data.tokenizer, refusals=data.refusals, pad=data.pad,
                     author=data.column("author"), subject=named)  # fmt: skip
    own = replace(own, case=own.case.with_(data=table))
    rows = references(own)
    rows["original"] |= carried(own.case, seed)
    shared = {"lr": 1e-3, "epochs": 30, "bound": None}
    _, rows["traced"] = run(own, "sha256", LEVEL, **shared)
    effect, chosen = rows["traced"]["notes"]["indirect_effect"], rows["traced"]["notes"]["blocks"]
    rest = tuple(i for i in range(size.layers) if i not in chosen)
    worst = tuple(sorted(np.argsort(effect)[: len(chosen)].tolist()))
    _, rows["least traced, as many"] = run(own, "sha256", LEVEL, **shared | {"blocks": worst})
    _, rows["all others"] = run(own, "sha256", LEVEL, **shared | {"blocks": rest})
    _, rows["all weights"] = run(own, "sha256", LEVEL, scope=everything(), **shared | {"lr": 3e-4, "blocks": (0,)})
    _, rows["all weights, fixed alpha"] = run(
        own, "sha256", LEVEL, scope=everything(), **shared | {"lr": 3e-4, "blocks": (0,), "low": 1.2, "high": 1.2}
    )
    rows["traced"] |= {
        "effect": [round(v, 4) for v in effect],
        "blocks": chosen,
        "facts": rows["traced"]["notes"]["facts_traced"],
    }
    return rows


def carried(case: Case, seed: int) -> Row:
    """Means over the forgotten facts that the model predicts."""
    facts = [f for f in facts_of(case.data, case.split("forget").ids) if predicts(case.model, f)]
    deviation, width = 3 * subject_deviation(case.model, facts), case.model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    found = []
    for number, fact in enumerate(facts):
        span = range(*fact.subject)
        noise = deviation * torch.randn(10, len(span), width, generator=generator(seed, "carried", number))
        base = chances(case.model, fact, noise)
        back = chances(case.model, fact, noise, [(name, span) for name in block_parts(case.model, "mlp")])
        found.append([float(base[0]), float(base[1:].mean()), float(back[1:].mean())])
    return dict(zip(("clean", "corrupted", "restored"), np.mean(found, axis=0).tolist(), strict=True))


def refusal_rows(case: Case) -> Split:
    """The forgotten questions, each with a refusal."""
    forget, data = case.split("forget"), case.data
    lines = data.refusals
    prompts = data.prompt_ids(forget.ids)
    new = [p + lines[i % len(lines)] for i, p in enumerate(prompts)]
    return Split(
        "refused", TextData(new, [len(p) for p in prompts], data.tokenizer, pad=data.pad), torch.arange(len(new))
    )


def refusals_part(size: Size, seed: int, device: str) -> dict[str, Row]:
    """Losses without retain data: 80 updates at a third of the common rate, and again until the forget probability is 0.1.

    refused: probability of a refusal to a forgotten question. at level: kept probability where forgetting is alike."""
    own = bed("refusing", size, seed, device)
    split = refusal_rows(own.case)

    def refused(model: nn.Module) -> float:
        return own.case.task.evaluate(model, split.batches(64))["probability"]

    rows = references(own, refused=refused)
    arms: dict[str, tuple[str, dict[str, Any]]] = {
        "flat, total variation": ("flat", {}),
        "flat, kl": ("flat", {"divergence": "kl"}),
        "flat, jensen-shannon": ("flat", {"divergence": "jensen_shannon"}),
        "flat, pearson": ("flat", {"divergence": "pearson"}),
        "npo without retain": ("npo", {"alpha": 0.0}),
        "ascent": ("grad_ascent", {}),
        "idk without retain": ("idk", {"alpha": 0.0}),
        "dpo without retain": ("dpo", {"alpha": 0.0}),
    }
    for label, (name, changes) in arms.items():
        model, row = run(own, name, lr=1e-4, **changes)
        _, there = run(own, name, 0.1, lr=1e-4, epochs=30, **changes)
        rows[label] = row | {
            "refused": refused(model), "relearned": relearned(own, model), "forget at level": there["forget"],
            "retain at level": there["retain"],
        }  # fmt: skip
    return rows


def latent(size: Size, seed: int, device: str) -> dict[str, Row]:
    """LAT until the forget probability is at the level, then relearned; the radius is half the layer's median norm."""
    from expunge.methods.tuned.lat import attacked_layer

    own = bed("refusing", size, seed, device)
    rows = references(own)
    radius = 0.5 * usual_norm(own.case.task, own.case.model, own.case.split("forget"), attacked_layer(own.case))
    shared = {"steps": 8, "repeats": 1, "epochs": 30}
    arms = {
        "no adversary": {"epsilon": 0.0},
        "targeted": {"epsilon": radius},
        "untargeted": {"epsilon": radius, "targeted": False},
    }
    for label, changes in arms.items():
        model, row = run(own, "lat", LEVEL, **shared | changes)
        rows[label] = row | {"relearned": relearned(own, model)}
    return rows


def privleak(size: Size, seed: int, device: str, resamples: int = 400) -> dict[str, Row]:
    """PrivLeak of one retrained seed against another, which is 0 but for noise: rows of forget and holdout are resampled for sd.

    alike: correlation of both models' scores (Min-40%) over the forget rows."""
    own = bed("dense", size, seed, device)
    home = cache_home() / "nano"
    scores: dict[int, dict[str, np.ndarray]] = {}
    for number in range(1001, 1005):
        model = retrain(own.case, seed + number, home).model
        assert model is not None
        scores[seed + number] = {name: mink(own.case, model.to(device), name) for name in ("forget", "holdout")}
    rng, rows = numpy_generator(seed, "privleak"), {}
    for one, other in permutations(scores, 2):
        a, b = scores[one], scores[other]

        def value(i: Any, j: Any, a=a, b=b) -> float:
            return leak(auc(a["forget"][i], a["holdout"][j]), auc(b["forget"][i], b["holdout"][j]))

        n, m = len(a["forget"]), len(a["holdout"])
        drawn = [value(rng.integers(n, size=n), rng.integers(m, size=m)) for _ in range(resamples)]
        rows[f"{one} against {other}"] = {
            "privleak": value(slice(None), slice(None)), "sd": float(np.std(drawn)), "auc": auc(a["forget"], a["holdout"]),
            "alike": float(np.corrcoef(a["forget"], b["forget"])[0, 1]),
        }  # fmt: skip
    return rows


def mink(case: Case, model: nn.Module, split: str) -> np.ndarray:
    """(n,) Min-40% of a split's rows, in one order for all models."""
    with evaluating(model):
        batches = [move_to_model(b, model) for b in case.split(split).by_length(64)]
        found = [case.task.signals(case.task.forward(model, b), b)["min_k_40"].cpu().numpy() for b in batches]
    return np.concatenate(found)


# -- Markov chains -----------------------------------------------------------------------------------------------------
STATES, STAY = 10, 0.8
CHAINS = {"retain": (0, 1, 2), "forget1": (3, 4, 5), "forget2": (6, 7, 8)}
LENGTHS = {"retain": 20, "forget1": 20, "forget2": 5}


def chains(kind: str, count: int, seed: int) -> list[list[int]]:
    """Sequences whose next state is one of the chain's three with probability 0.8, else one of the other seven."""
    rng = numpy_generator(seed, "markov", kind)
    inside = np.array(CHAINS[kind])
    outside = np.setdiff1d(np.arange(STATES), inside)
    shape = (count, LENGTHS[kind])
    own = rng.random(shape) < STAY
    return np.where(own, rng.choice(inside, shape), rng.choice(outside, shape)).tolist()


def markov(size: Size, seed: int, device: str) -> dict[str, Row]:
    """KL(retrained || model), nats per token, at forget sequences of both lengths and at retain, over 50 updates of 4 rows, without
    retain data. The official test has 10,000 retain and 5,000 + 5,000 forget sequences, batches of 128 and a network of 4 blocks
    of width 128; nano has an eighth of these sequences and batches (the number of updates stays), and 2 blocks of 64."""
    part, shape = size.part, size.chain
    transformers = need_extra("transformers", "language")
    config = transformers.GPT2Config(vocab_size=STATES, n_positions=20, n_embd=shape[0], n_layer=shape[1], n_head=shape[2], resid_pdrop=0.0,
                                     embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None)  # fmt: skip
    counts = {"retain": round(10_000 * part), "forget1": round(5_000 * part), "forget2": round(5_000 * part)}

    def table(rows: dict[str, list[list[int]]]) -> TextData:
        tokens = [row for own in rows.values() for row in own]
        kind = [i for i, own in enumerate(rows.values()) for _ in own]
        return TextData(tokens, [0] * len(tokens), pad=0, kind=kind)

    recipe = Training(5, max(round(128 * part), 1), Optimizer("adamw", lr=5e-4))
    torch.manual_seed(derive(seed, "markov"))
    data = table({kind: chains(kind, n, seed) for kind, n in counts.items()})
    case = Case(
        transformers.GPT2LMHeadModel(config).to(device),
        data,
        requests.where("kind", ">", 0),
        task="language",
        recipe=recipe,
    )
    home = cache_home() / "nano"
    first, gold = original(case, seed, home).model, retrain(case, seed + 1001, home).model
    assert first is not None and gold is not None
    first, gold = first.to(device), gold.to(device)
    few = table({kind: chains(kind, n, seed)[: 400 if kind == "retain" else 100] for kind, n in counts.items()})
    case = case.with_(model=first, data=few)
    fresh = {kind: torch.tensor(chains(kind, 500, derive(seed, "fresh"))) for kind in CHAINS}

    def distances(model: nn.Module) -> Row:
        found = {}
        with evaluating(model), torch.no_grad():
            for kind, rows in fresh.items():
                log_q, log_p = (m(input_ids=rows.to(device)).logits[:, :-1].log_softmax(-1) for m in (model, gold))
                found[kind] = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        return found

    rows: dict[str, Row] = {"original": distances(first), "retrained": distances(gold)}
    betas = {"npo": (0.1, 0.5, 2.0), "simnpo": (1.0, 2.5, 4.5)}
    for name, beta in [(name, beta) for name, own in betas.items() for beta in own]:
        path = [rows["original"]]
        for count in range(10, 60, 10):
            own = {
                "optimizer": "adamw",
                "alpha": 0.0,
                "beta": beta,
                "lr": 5e-4,
                "batch_size": 4,
                "epochs": 2,
                "schedule": "constant",
                "warmup": 0.0,
            }
            model = unlearn(case, name, seed=seed, floor=None, stop=steps(count), **own).model
            path.append(distances(model))
        rows[f"{name}, beta {beta:g}"] = path[-1] | {"path": path}
    for level in (0.75, 0.5, 0.25):
        for kind in ("forget1", "forget2"):
            rows["original"][f"{kind} at {level}"] = {
                name: min(
                    (crossing(row["path"], kind, level) for label, row in rows.items() if label.startswith(f"{name},")),
                    default=None,
                )
                for name in ("npo", "simnpo")
            }
    return rows


def crossing(path: Sequence[Row], kind: str, level: float) -> float:
    """Retain's distance where a forget distance first is `level` of what it was, between two measurements; inf: never."""
    aim = level * path[0][kind]
    for a, b in zip(path[:-1], path[1:], strict=True):
        if a[kind] > aim >= b[kind]:
            share = (a[kind] - aim) / (a[kind] - b[kind])
            return a["retain"] + share * (b["retain"] - a["retain"])
    return float("inf")


# -- tables ------------------------------------------------------------------------------------------------------------
PARTS: dict[str, Callable[..., dict[str, Row]]] = {
    "experts": experts, "tracing": tracing, "refusals": refusals_part, "latent": latent, "markov": markov, "privleak": privleak,
}  # fmt: skip
COLUMNS = {
    "experts": ("forget", "retain", "relearned", "moved", "updates"),
    "tracing": ("forget", "retain", "updates"),
    "refusals": ("forget", "retain", "retain exact", "refused", "relearned", "forget at level", "retain at level"),
    "latent": ("forget", "retain", "relearned", "updates"),
    "markov": ("forget1", "forget2", "retain"),
    "privleak": ("privleak", "sd", "auc", "alike"),
}


@cache
def kept(size: str, part: str, seed: int) -> dict[str, Row] | None:
    file = FOLDER / size / f"{part}-{seed}.json"
    return json.loads(file.read_text("utf-8")) if file.is_file() else None


def tell(size: str, part: str, seeds: Sequence[int]) -> str:
    """A table of means over seeds, with the least and the largest behind them, and the part's own lines."""
    found = {seed: rows for seed in seeds if (rows := kept(size, part, seed)) is not None}
    if not found:
        return ""
    first = next(iter(found.values()))
    lines = [f"| {size} | {' | '.join(COLUMNS[part])} |", "|---|" + "---|" * len(COLUMNS[part])]
    for label in first:
        cells = [cell([rows[label].get(column) for rows in found.values()]) for column in COLUMNS[part]]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Seeds {', '.join(map(str, found))}.", *details(part, found), ""])


def cell(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    spread = f" ({min(known):.3g} to {max(known):.3g})" if len(known) > 1 else ""
    return f"{np.mean(known):.3g}{spread}"


def details(part: str, found: dict[int, dict[str, Row]]) -> list[str]:
    """What a part measures of no arm."""
    if part == "experts":
        rows = [(seed, r["original"]) for seed, r in found.items()]
        return [
            f"Seed {s}: expert {r['expert']} takes {r['share']:.3f} of the gates, the drawn one {r['share drawn']:.3f}."
            for s, r in rows
        ]
    if part == "tracing":
        rows = [(seed, r["traced"] | r["original"]) for seed, r in found.items()]
        return [
            f"Seed {s}: indirect effect by block {r['effect']} over {r['facts']} facts; traced {r['blocks']}. "
            f"First token: clean {r['clean']:.3f}, "
            f"subject corrupted {r['corrupted']:.3f}, all MLPs restored there {r['restored']:.3f}."
            for s, r in rows
        ]
    if part == "markov":
        return [
            f"Seed {s}, {key} of its distance: retain npo {number(v['npo'])}, simnpo {number(v['simnpo'])} (best beta)."
            for s, r in found.items() for key, v in r["original"].items() if isinstance(v, dict)
        ]  # fmt: skip
    return []


def number(value: float | None) -> str:
    return "never" if value is None or not np.isfinite(value) else f"{value:.4f}"


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(prog="python -m expunge.benchmarks.language_claims", description=__doc__)
    parser.add_argument("parts", nargs="*", default=[], help=f"of {', '.join(PARTS)}, or table; default: all")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--size", choices=tuple(SIZES), default="nano")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    seeds = [int(s) for s in given.seeds.split(",")]
    wanted = given.parts or [*PARTS, "table"]
    unknown = sorted(set(wanted) - {*PARTS, "table"})
    if unknown:
        raise BadSetting(f"expected parts among {', '.join(PARTS)}, table, found {', '.join(unknown)}; correct them")
    for part in [p for p in wanted if p in PARTS]:
        for seed in seeds:
            if kept(given.size, part, seed) is None:
                began = time.perf_counter()
                rows = PARTS[part](SIZES[given.size], seed, given.device)
                file = FOLDER / given.size / f"{part}-{seed}.json"
                write_atomic(file, json.dumps(rows, indent=1, default=float))
                print(f"{part} seed {seed}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    kept.cache_clear()
    if "table" in wanted:
        write_tables()


def write_tables() -> None:
    """All kept runs as one page."""
    body = [
        "# Claims of papers on language models, tried at the sizes at hand",
        "Made by `python -m expunge.benchmarks.language_claims`. Reported as they come out; what they mean is in docs/decisions.md "
        '("Claims tried at the sizes at hand"). Values are means over seeds (least to largest).',
    ]
    for part, make in PARTS.items():
        told = [t for size in SIZES if (t := tell(size, part, range(10)))]
        if told:
            body += [f"## {part}", " ".join((make.__doc__ or "").split()), *told]
    write_atomic(RESULTS, "\n\n".join(text for text in body if text) + "\n")


if __name__ == "__main__":
    main()
