"""TOFU's whole evaluation of one model here, and by open-unlearning's functions: the same numbers, and how long each takes.

    git clone https://github.com/locuslab/open-unlearning PEER
    python -m expunge.benchmarks.tofu_official --peer PEER            # goal: time ratio <= 0.5

Both sides get the same trained model (the nano testbed's original) and the same tokens: 60 forget, 60 holdout, 60 retain rows
and 40 each of real authors and world facts, with their wrong answers. The peer's side is its default list for TOFU (truth
ratio, probability, ROUGE, model utility's nine, Min-40% of forget and holdout, extraction strength), its metric functions
called with its own batch size of 32, each of its metrics once. What its configuration, downloads and tokenising cost is left
out on both sides. Here a probe table is run once for all metrics, only answers reach the head, the questions of all tables
are answered together, and an answer that has ended leaves its batch.
"""

from __future__ import annotations

import sys
import time
import types
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from expunge.audits import Subjects
from expunge.audits.attacks.membership import auc
from expunge.audits.metrics import tofu as formulas
from expunge.audits.metrics.memorisation import tokens
from expunge.audits.metrics.text import extraction_strength, extraction_strength_openunlearning
from expunge.audits.metrics.tofu_checks import FORGET, KNOWLEDGE, RETAIN, losses, recalls
from expunge.benchmarks.measuring import Clock, clock_of, in_turns, options, publish, spelled, table
from expunge.benchmarks.nano import CONTEXT, TEMPLATE, nano_tofu
from expunge.cases import Case
from expunge.cases.text import TextData
from expunge.cases.tofu import ANSWER, PARAPHRASE, WRONG, candidates, tofu
from expunge.errors import UnmetNeed

NAME = "tofu_official"
GOAL = 0.5
NEW_TOKENS = 200
Numbers = dict[str, float]


def nano_with_knowledge(rows: int = 60, knowledge: int = 40) -> Case:
    """The nano testbed's case with all four probe tables."""
    case = nano_tofu().case
    probe = partial(candidates, case.data.tokenizer, template=TEMPLATE, max_length=CONTEXT)
    return case.with_(
        probes={
            "forget_perturbed": case.probe("forget_perturbed"),
            "retain_perturbed": probe(tofu("retain_perturbed")[:rows]),
            "real_authors": probe(tofu("real_authors_perturbed")[:knowledge]),
            "world_facts": probe(tofu("world_facts_perturbed")[:knowledge]),
        }
    )


def here(case: Case, model: nn.Module) -> Numbers:
    """The evaluation by this library's own checks' functions."""
    subjects = Subjects(case, model, model)
    asked = (RETAIN, *KNOWLEDGE, FORGET)
    said = dict(zip(asked, recalls(subjects, "unlearned", asked, NEW_TOKENS), strict=True))
    nine = []
    for probe in (RETAIN, *KNOWLEDGE):
        own = losses(subjects, "unlearned", probe)
        known = (
            formulas.probability(own.answer)
            if probe == RETAIN
            else formulas.normalised_probability(own.answer, own.wrong)
        )
        nine += [
            known.mean(),
            said[probe].mean(),
            formulas.true_better(formulas.truth_ratio_geometric(own.right, own.wrong)),
        ]
    own = losses(subjects, "unlearned", FORGET)
    members, others = (subjects.signal("unlearned", split, "min_k_40") for split in ("forget", "holdout"))
    hits = tokens(subjects, "unlearned", "forget").hits
    return {
        "forget_truth_ratio": formulas.closer_to_1_better(formulas.truth_ratio_geometric(own.right, own.wrong)),
        "forget_probability": float(formulas.probability(own.answer).mean()),
        "forget_rouge": float(said[FORGET].mean()),
        "model_utility": formulas.model_utility(nine),
        "min_k_40_auc": auc(members, others),
        "extraction_strength": float(extraction_strength(hits).mean()),
        "extraction_strength_openunlearning": float(extraction_strength_openunlearning([h[:-1] for h in hits]).mean()),
    }


# -- the peer ----------------------------------------------------------------------------------------------------------
def official(peer: Path) -> Any:
    """open-unlearning's metric functions and collator. Its packages' own entry files, which load trainers and harnesses, are
    passed over; omegaconf, of which it uses one call here, is replaced where it is not installed."""
    source = Path(peer) / "src"
    if not (source / "evals" / "metrics" / "memorization.py").exists():
        raise UnmetNeed(
            f"expected open-unlearning at {peer}, found no src/evals/metrics there; clone locuslab/open-unlearning"
        )
    sys.path.insert(0, str(source))
    for name in [n for n in sys.modules if n.partition(".")[0] == "data"]:  # what `peer.py` put in its place
        del sys.modules[name]
    evals = types.ModuleType("evals")
    evals.__path__ = [str(source / "evals")]
    sys.modules.setdefault("evals", evals)
    try:
        import omegaconf  # noqa: F401
    except ImportError:
        stand_in = types.ModuleType("omegaconf")
        stand_in.OmegaConf = types.SimpleNamespace(to_container=lambda given, resolve: dict(given))  # type: ignore[attr-defined]
        stand_in.DictConfig = stand_in.ListConfig = dict  # type: ignore[attr-defined]
        sys.modules["omegaconf"] = stand_in
    from data.collators import DataCollatorForSupervisedDataset
    from evals.metrics import memorization
    from evals.metrics.mia.min_k import MinKProbAttack
    from evals.metrics.mia.utils import mia_auc
    from evals.metrics.utility import hm_aggregate

    return types.SimpleNamespace(
        metrics=memorization, attack=partial(mia_auc, MinKProbAttack), utility=hm_aggregate,
        collator=DataCollatorForSupervisedDataset,
    )  # fmt: skip


@dataclass
class Peer:
    """The peer's evaluation of a model, on items made from the same tables beforehand."""

    code: Any
    case: Case
    batch_size: int = 32

    def __post_init__(self) -> None:
        self.right = self.code.collator(self.case.data.tokenizer, index="index")
        self.left = self.code.collator(self.case.data.tokenizer, padding_side="left", index="index")
        self.items = {name: self._by_role(self.case.probe(name)) for name in self.case.probes}
        self.members = {
            "forget": self._plain(self.case.data, self.case.split("forget").ids.tolist()),
            "holdout": self._plain(self.case.split("holdout").data, self.case.split("holdout").ids.tolist()),
        }

    def evaluate(self, model: nn.Module) -> Numbers:
        metrics, nine = self.code.metrics, {}
        forget = self.items["forget_perturbed"]
        ratio = self._ratio(model, forget, "closer_to_1_better")
        for name in ("retain_perturbed", "real_authors", "world_facts"):
            own = self.items[name]
            answer = self._probability(model, own["answer"])
            if name == "retain_perturbed":
                nine[f"{name} p"], right, wrong = answer, None, None
            else:  # its model utility reads the plain answer for both, computed once
                right, wrong = answer, self._probability(model, own["wrong"])
                nine[f"{name} p"] = metrics.probability_w_options._metric_fn(
                    model, pre_compute={"correct": answer, "wrong": wrong}
                )
            nine[f"{name} rouge"] = self._rouge(model, own["ask"])
            nine[f"{name} ratio"] = self._ratio(model, own, "true_better", right, wrong)
        area = self.code.attack(model, data=self.members, collator=self.right, batch_size=self.batch_size, k=0.4)
        strength = metrics.extraction_strength._metric_fn(
            model, data=forget["answer"], collators=self.right, batch_size=self.batch_size
        )
        return {
            "forget_truth_ratio": ratio["agg_value"],
            "forget_probability": self._probability(model, forget["answer"])["agg_value"],
            "forget_rouge": self._rouge(model, forget["ask"])["agg_value"],
            "model_utility": self.code.utility._metric_fn(model, pre_compute=nine)["agg_value"],
            "min_k_40_auc": area["agg_value"],
            "extraction_strength_openunlearning": strength["agg_value"],
        }

    def _probability(self, model: nn.Module, items: list) -> Any:
        return self.code.metrics.probability._metric_fn(
            model, data=items, collators=self.right, batch_size=self.batch_size
        )

    def _ratio(self, model: nn.Module, own: dict, aggregator: str, right: Any = None, wrong: Any = None) -> Any:
        right = right or self._probability(model, own["right"])
        wrong = wrong or self._probability(model, own["wrong"])
        return self.code.metrics.truth_ratio._metric_fn(
            model, aggregator=aggregator, pre_compute={"correct": right, "wrong": wrong}
        )

    def _rouge(self, model: nn.Module, items: list) -> Any:
        greedy = {
            "do_sample": False,
            "top_p": None,
            "temperature": None,
            "max_new_tokens": NEW_TOKENS,
            "use_cache": True,
        }
        return self.code.metrics.rouge._metric_fn(
            model, data=items, collators=self.left, batch_size=self.batch_size, tokenizer=self.case.data.tokenizer,
            generation_args=greedy, rouge_type="rougeL_recall",
        )  # fmt: skip

    def _by_role(self, data: TextData) -> dict[str, list]:
        role = np.asarray(data.column("role"))
        answer, paraphrase, wrong = (np.flatnonzero(role == kind) for kind in (ANSWER, PARAPHRASE, WRONG))
        many = wrong.reshape(len(answer), -1)
        return {
            "answer": self._plain(data, answer), "right": self._plain(data, paraphrase if len(paraphrase) else answer),
            "wrong": [{k: self._item(data, i, n) for k, i in enumerate(own)} for n, own in enumerate(many)],
            "ask": [self._item(data, i, n, ask=True) for n, i in enumerate(answer)],
        }  # fmt: skip

    def _plain(self, data: TextData, ids: Sequence[int]) -> list:
        return [self._item(data, i, n) for n, i in enumerate(ids)]

    @staticmethod
    def _item(data: TextData, row: int, index: int, ask: bool = False) -> dict[str, Any]:
        text, start = torch.tensor(data.tokens[row]), data.starts[row]
        given, labels = (text[:start], text) if ask else (text, text.clone())
        if not ask:
            labels[:start] = -100
        return {"input_ids": given, "labels": labels, "attention_mask": torch.ones_like(given), "index": index}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(NAME, __doc__)
    parser.add_argument("--peer", type=Path, required=True, help="a checkout of locuslab/open-unlearning")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=60, help="questions of the retain table")
    parser.add_argument("--knowledge", type=int, default=40, help="questions each of real authors and world facts")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    start = time.perf_counter()
    case = nano_with_knowledge(given.rows, given.knowledge)
    body = compared(case, case.model, given.peer, given.rounds, clock_of("cpu"))
    publish(NAME, spelled(NAME, arguments), time.perf_counter() - start, body, given.out or None)


def compared(case: Case, model: nn.Module, checkout: Path, rounds: int, clock: Clock) -> str:
    """Both evaluations of one model: their times and their numbers, as tables."""
    peer = Peer(official(checkout), case)
    own, other = here(case, model), peer.evaluate(model)
    rows = [{"number": name, "here": own[name], "open-unlearning": other.get(name)} for name in own]
    actions = {"here": lambda: here(case, model), "open-unlearning": lambda: peer.evaluate(model)}
    times = in_turns(actions, rounds, warm=False, clock=clock)
    ratio = times.ratio("here", "open-unlearning")
    low, high = times.range("here", "open-unlearning")
    told = {
        "here s": times.median("here"), "open-unlearning s": times.median("open-unlearning"), "ratio": ratio, "from": low,
        "to": high, f"<= {GOAL}": ratio <= GOAL,
    }  # fmt: skip
    return f"{table([told])}\n{table(rows)}"


if __name__ == "__main__":
    main()
