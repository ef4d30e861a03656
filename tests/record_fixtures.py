"""Made-up but realistic results for the tests of the records: nothing here was measured; no product code uses it."""

from __future__ import annotations

import math
import random

from expunge.records.results import Results

SECRET = "jane.doe@example.org"
"""Stands for the content of an example; it must appear nowhere."""

METHODS = {  # forget score left, utility, share of retraining, verdict, score after relearning
    "salun": (0.13, 0.934, 0.11, "removed (as far as tested)", 0.17),
    "scrub": (0.16, 0.941, 0.14, "removed (as far as tested)", 0.21),
    "sparse": (0.15, 0.927, 0.09, "removed (as far as tested)", 0.19),
    "ssd": (0.22, 0.931, 0.012, "suppressed", 0.48),
    "bad_teacher": (0.11, 0.929, 0.07, "suppressed", 0.52),
    "finetune": (0.61, 0.944, 0.10, "retained", 0.66),
    "neg_grad_plus": (0.05, 0.921, 0.08, "over-forgotten", 0.14),
    "grad_ascent": (0.01, 0.41, 0.02, "collapsed", 0.03),
    "random_labels": (0.19, 0.925, 0.06, "inconclusive", 0.33),
}


def measurement(check, name, split, original, unlearned, retrained, floor, direction="match", **more):
    subjects = {"original": original, "unlearned": unlearned, "retrained": retrained}
    around = {key: (value - 0.021, value + 0.021) for key, value in subjects.items() if value is not None}
    return {
        "check": check,
        "name": name,
        "split": split,
        "floor": floor,
        "direction": direction,
        "unit": more.pop("unit", "fraction"),
        "range": (0, 1),
        "intervals": around,
        **subjects,
        **more,
    }


def results_dict(method="salun", seed=0, plots=True, noise=True):
    """One run on digits with mislabelled rows, as a dict of the schema."""
    score, utility, share, verdict, relearned = METHODS[method]
    rng = random.Random(f"{method}{seed}")
    wobble = (lambda size: rng.gauss(0, size)) if noise else (lambda size: 0.0)
    score, utility, relearned = score + wobble(0.012), utility + wobble(0.004), relearned + wobble(0.015)
    # The reference belongs to the training seed, so that every method of a seed is beside the same retrained model.
    shared = random.Random(f"training{seed}")
    original, retrained, best, gold = (m + shared.gauss(0, 0.006) for m in (0.93, 0.14, 0.948, 0.942))
    rows = [
        measurement("forgetting", "forget_score", "forget", original, score, retrained, 0.021, unit="probability"),
        measurement("forgetting", "ua", "forget", 0.02, 1 - score, 1 - retrained, 0.034),
        measurement("utility", "ra", "retain", 0.999, min(utility + 0.05, 1.0), 0.998, 0.002, "higher"),
        measurement("utility", "ta", "test", best, utility, gold, 0.006, "higher"),
        measurement("membership", "mia_efficacy", "forget", 0.04, 0.8 - score / 2, 0.83, 0.041),
        measurement("ulira", "auc", "forget", 0.94, 0.5 + abs(score - retrained), 0.503, 0.018, unit="auc"),
        measurement(
            "distance", "js_divergence", "forget", 0.51, abs(score - 0.14) + 0.02, 0.0, 0.017, "lower", unit="nats"
        ),
        measurement("distance", "activation_distance", "forget", 1.21, 0.2 + abs(score - 0.14), 0.0, 0.16, "lower"),
        measurement("zrf", "zrf", "forget", 0.55, 0.9 - score / 4, 0.87, 0.012, note="against a random teacher"),
        measurement("tow", "tow", "all", 0.12, 1 - abs(score - 0.14), 1.0, None, "higher"),
        measurement("relearn_time", "epochs", "forget", 1.0, 6.0, 7.0, 0.0, unit="epochs"),
    ]
    attacks = [
        measurement(
            "benign_relearn",
            "forget_score",
            "forget",
            original,
            relearned,
            retrained + 0.01,
            0.023,
            note="1 epoch on retain data only, 24 steps",
        ),
        measurement(
            "relearn_tenth", "forget_score", "forget", 0.95, relearned + 0.05, 0.19, 0.03, note="20 steps, 3 examples"
        ),
        measurement("quantise_8bit", "forget_score", "forget", original, score + 0.002, retrained, 0.021),
        measurement("quantise_4bit", "forget_score", "forget", 0.91, score + 0.02, 0.15, 0.022),
        measurement("prune_half", "forget_score", "forget", 0.87, score + 0.01, 0.16, 0.03),
        measurement("linear_probe", "auc", "forget", 0.97, 0.62, 0.58, 0.03, unit="auc"),
    ]
    return {
        "schema": "expunge.results/1",
        "case": {
            "name": "digits, 32 mislabelled rows",
            "task": "classification",
            "request": {"kind": "samples", "summary": "32 rows by id", "count": 32, "ids_digest": "5d" * 32},
            "data": {"fingerprint": "ab" * 32, "rows": 400, "columns": ["inputs", "labels"]},
            "splits": {"forget": 32, "retain": 368, "holdout": 180, "test": 180},
        },
        "method": {
            "name": method,
            "family": "tuned",
            "settings": {"density": 0.5, "lr": 0.013, "epochs": 10},
            "formula": "minimise  relabel(forget) + 1.0 \u00b7 nll(retain)   over saliency(\u2207nll(forget), 0.5)",
            "intention": "removal",
            "guarantee": "empirical",
            "paper": "Fan et al., SalUn, ICLR 2024 (arXiv 2310.12508)",
        },
        "seeds": {"training": seed, "unlearning": 100 + seed, "audit": 2**62 + seed},
        "versions": {"expunge": "0.1.0", "python": "3.11.7", "torch": "2.9.0", "numpy": "2.3.1"},
        "machine": {"system": "Linux", "processor": "x86_64", "cores": 2, "device": "cpu"},
        "cost": {"seconds": 41 * share, "retrain_seconds": 41.0, "peak_memory_mb": 388.0 + 100 * share},
        "measurements": rows,
        "attacks": attacks,
        "verdict": {
            "verdict": verdict,
            "reason": f"Residue {score - 0.14:.2f}; the worst attack, benign relearning: {relearned:.2f}.",
            "numbers": {
                "residue": score - 0.14,
                "attacked": {"benign_relearn": relearned - 0.15},
                "utility_loss": 0.01,
                "membership": 0.02,
                "interval": [0.01, 0.04],
            },
            "thresholds": {"collapsed": 0.1, "retained": 0.25, "attacked": 0.15},
        },
        "history": [
            {"step": i, "epoch": i // 12, "forget": 0.1 + 2 * i / 120, "retain": 0.02} for i in range(0, 121, 12)
        ],
        "warnings": ["utility fell to 0.88 at step 30 and recovered"] if method == "salun" else [],
        "weights": {"before": "1a" * 32, "after": "2b" * 32},
        "plots": make_plots(rng, score, utility) if plots else {},
        "command": f"expunge run cases/digits.yaml method={method} seeds.training={seed}",
    }


def make_plots(rng, score, utility):
    def losses(count, middle, spread):
        return [math.exp(rng.gauss(math.log(middle), spread)) for _ in range(count)]

    def roc(power):
        fpr = [i / 60 for i in range(61)]
        return {"fpr": fpr, "tpr": [f**power for f in fpr]}

    forget = -math.log(min(max(score, 0.01), 0.99))
    curves = [
        {
            "step": i,
            "epoch": i / 12,
            "forget": 0.08 + forget * (1 - math.exp(-i / 30)) + rng.gauss(0, 0.05),
            "retain": 0.05 + 0.5 * math.exp(-((i - 25) ** 2) / 200) + abs(rng.gauss(0, 0.01)),
            "holdout": 0.35 + rng.gauss(0, 0.02),
        }
        for i in range(0, 121, 4)
    ]
    return {
        "loss_histograms": {
            "forget": {
                "original": losses(32, 0.07, 0.7),
                "unlearned": losses(32, forget, 0.6),
                "retrained": losses(32, 1.97, 0.6),
            },
            "retain": {
                "original": losses(368, 0.01, 1),
                "unlearned": losses(368, 0.02, 1.1),
                "retrained": losses(368, 0.01, 1),
            },
            "test": {
                "original": losses(180, 0.12, 1.4),
                "unlearned": losses(180, 0.14, 1.4),
                "retrained": losses(180, 0.12, 1.4),
            },
        },
        "roc": {
            "loss threshold": {"original": roc(0.1), "unlearned": roc(0.9), "retrained": roc(1.0)},
            "ulira": {"original": roc(0.06), "unlearned": roc(0.8), "retrained": roc(0.98)},
        },
        "per_class": {
            name: [min(max(middle + rng.gauss(0, 0.03), 0), 1) for _ in range(10)]
            for name, middle in (("original", 0.95), ("unlearned", utility), ("retrained", 0.942))
        },
        "curves": curves,
    }


def results(method="salun", seed=0, **more) -> Results:
    return Results.from_dict(results_dict(method, seed, **more))
