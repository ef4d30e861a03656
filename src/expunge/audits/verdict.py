"""The verdict: did it go, was it only hidden, or was the model broken? One decision from the same numbers for every
kind of model and method (specs: verdict card; Expunge's own rule, no paper). The numbers are in `residue.py`.

First match, "above t" meaning that the whole 95% interval is above t:

    removed (proved), removed (bounded)   an exact or certified method's proof
    undetectable      m(O) - m(R) below 4 |m(R') - m(R)|, or its interval holds 0
    collapsed         d above 0.10
    retained          r above 0.25, or g above 0.10
    over-forgotten    r below -0.25, or g below -0.10
    suppressed        r_a above 0.15 for some attack a
    removed           r, every r_a and |g| wholly within these bounds: as far as tested, by this battery and budget
    inconclusive      otherwise

Averaging attacks would hide the one that works: the worst decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from expunge.audits.proof import examine
from expunge.audits.residue import (
    RESAMPLES,
    Estimate,
    Evidence,
    attacked_residue,
    floor,
    gap,
    membership_residue,
    over_seeds,
    residue,
    utility_loss,
)
from expunge.errors import BadData, BadSetting

VERDICTS = (
    "removed (proved)", "removed (bounded)", "undetectable", "collapsed", "retained", "over-forgotten", "suppressed",
    "removed", "inconclusive",
)  # fmt: skip


@dataclass(frozen=True)
class Thresholds:
    """The verdict's settings. floors: least m(O) - m(R) in units of |m(R') - m(R)|; the others bound d, |r|, |g|,
    r_a."""

    floors: float = 4.0
    utility_loss: float = 0.10
    residue: float = 0.25
    membership: float = 0.10
    attacked: float = 0.15

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise BadSetting(f"expected the threshold {name} above 0, found {value}; correct it")


@dataclass(frozen=True)
class Verdict:
    """The decision, why, and all numbers behind it. Numbers that could not be had are None.

    residue, membership_residue, utility_loss: r, g, d of the unlearned model. attacked: attack -> r_a. worst_attack:
    the attack with the largest r_a. advice: what to do next.
    """

    verdict: str
    reason: str
    residue: Estimate | None = None
    membership_residue: Estimate | None = None
    utility_loss: Estimate | None = None
    attacked: Mapping[str, Estimate] = field(default_factory=dict)
    worst_attack: str | None = None
    thresholds: Thresholds = Thresholds()
    numbers: Mapping[str, Any] = field(default_factory=dict)
    advice: str = ""

    def as_record(self) -> dict[str, Any]:
        """The fields of `expunge.records.VerdictRecord`, as plain data; numbers that are not finite become None."""
        return {
            "verdict": self.verdict,
            "reason": self.reason,
            "numbers": _plain(self.numbers),
            "thresholds": asdict(self.thresholds),
            "attack": self.worst_attack,
            "advice": self.advice,
        }


def decide(
    evidence: Evidence | Sequence[Evidence] | None,
    thresholds: Thresholds = Thresholds(),
    proof: Mapping[str, Any] | None = None,
    resamples: int = RESAMPLES,
) -> Verdict:
    """The verdict on one seed's evidence or several seeds'.

    proof: an exact method's own numbers (see `proof.py`); where they do not hold, the measurements decide.
    """
    failed = ""
    if proof is not None:
        settled = proved(proof, thresholds)
        if settled is not None:
            return settled
        failed = f"{examine(proof)[1]}, measured instead: "
    seeds = [evidence] if isinstance(evidence, Evidence) else list(evidence or [])
    if not seeds:
        raise BadData("expected evidence of at least one seed, found none; gather it with audits.battery.gather(...)")
    told = _Told(seeds, thresholds, resamples)
    verdict, reason, advice = told.rule()
    worst = max(told.attacked, key=lambda name: told.attacked[name].value) if told.attacked else None
    return Verdict(
        verdict, failed + reason, told.r, told.g, told.d, told.attacked, worst, thresholds, told.numbers(proof), advice
    )


class _Told:
    """All estimates of one decision, and the rules over them."""

    def __init__(self, seeds: list[Evidence], thresholds: Thresholds, resamples: int):
        self.seeds, self.limits = seeds, thresholds
        self.gap = over_seeds([gap(e, resamples) for e in seeds])
        self.floor = sum(floor(e) for e in seeds) / len(seeds)
        self.detectable = self.gap.value >= thresholds.floors * self.floor and self.gap.low > 0
        self.g = self.original_g = self.d = self.r = None
        self.attacked: dict[str, Estimate] = {}
        self.floors: dict[str, Estimate] = {}
        if all(e.membership is not None for e in seeds):
            self.g, self.original_g = (self._membership(name, resamples) for name in ("unlearned", "original"))
        if all(e.utility is not None and "untrained" in e.utility for e in seeds):
            losses = [utility_loss(e.utility, resamples) for e in seeds]
            self.d = over_seeds(losses) if None not in losses else None
        if all(gap(e, 2).value > 0 for e in seeds):
            self.r = over_seeds([residue(e, resamples=resamples) for e in seeds])
            self.second = over_seeds([residue(e, "second", resamples) for e in seeds])
            for name in seeds[0].attacks:
                if all(name in e.attacks for e in seeds):
                    self.attacked[name] = over_seeds([attacked_residue(e, name, resamples=resamples) for e in seeds])
                    if all(e.attacks[name].second is not None for e in seeds):
                        self.floors[name] = over_seeds([attacked_residue(e, name, "second", resamples) for e in seeds])

    def _membership(self, model: str, resamples: int) -> Estimate | None:
        if any(model not in e.membership for e in self.seeds):
            return None
        return over_seeds(
            [membership_residue(e.membership[model], e.membership["retrained"], resamples) for e in self.seeds]
        )

    # -- the rules -------------------------------------------------------------------------------------------------
    def rule(self) -> tuple[str, str, str]:
        """verdict, reason, advice: the first rule that matches."""
        t, r, g, d = self.limits, self.r, self.g, self.d
        if self.gap.n < 2:
            return "inconclusive", "one forgotten example has no interval; " + self._gap_text(), MORE_EXAMPLES
        if not self.detectable or r is None:
            why = "its interval holds 0" if self.gap.low <= 0 else f"that is below {t.floors:g} times this distance"
            return (
                "undetectable",
                f"there was nothing measurable to forget: {self._gap_text()}; {why}",
                self._other_score(),
            )
        if d is not None and d.above(t.utility_loss):
            return "collapsed", f"the utility loss {_show(d)} is above {t.utility_loss:g}", GENTLER
        for value, limit, name in ((r, t.residue, "residue"), (g, t.membership, "membership residue")):
            if value is not None and value.above(limit):
                return "retained", f"the {name} {_show(value)} is above {limit:g}", STRONGER
        for value, limit, name in ((r, t.residue, "residue"), (g, t.membership, "membership residue")):
            if value is not None and value.below(-limit):
                return (
                    "over-forgotten",
                    f"the {name} {_show(value)} is below {-limit:g}: the forget set stands out by being too bad",
                    GENTLER,
                )
        hit = {name: value for name, value in self.attacked.items() if value.above(t.attacked)}
        if hit:
            name = max(hit, key=lambda key: hit[key].value)
            reason = f"{name} brought back {_show(hit[name])}, above {t.attacked:g}; {self._spent(name)}"
            return "suppressed", reason, DEEPER
        open_ = self._open()
        lacking = self._lacking()
        if not open_ and not lacking:
            worst = max(self.attacked, key=lambda key: self.attacked[key].value)
            reason = (
                f"as far as tested: residue {_show(r)}, membership residue {_show(g)}, and after the worst of "
                f"{len(self.attacked)} attacks ({worst}) {_show(self.attacked[worst])}, all within their bounds"
            )
            return (
                "removed",
                reason,
                "holds for this battery and these budgets only; a failed attack is no proof of absence",
            )
        return self._undecided(open_, lacking)

    def _open(self) -> list[tuple[str, Estimate, float]]:
        """Measurements not wholly within their bounds, with the bound they straddle; the hardest to settle first."""
        t, found = self.limits, []
        for name, value, limit in (("residue", self.r, t.residue), ("membership residue", self.g, t.membership)):
            if value is not None and not value.within(-limit, limit):
                found.append((name, value, limit if value.high > limit else -limit))
        found += [
            (f"residue after {name}", value, t.attacked)
            for name, value in self.attacked.items()
            if not value.high <= t.attacked
        ]
        return sorted(found, key=lambda item: -_more(item[1], item[2]))

    def _lacking(self) -> list[str]:
        lacking = []
        if self.g is None:
            lacking.append("membership was not measured: pass Case(holdout=...) or Case(test=...)")
        if self.d is None:
            lacking.append(
                "utility loss was not measured: it takes an untrained model, and a retrained one that beats it"
            )
        if not self.attacked:
            lacking.append("no attack was run: give a battery")
        return lacking

    def _undecided(self, open_: list[tuple[str, Estimate, float]], lacking: list[str]) -> tuple[str, str, str]:
        parts, advice = [], list(lacking)
        for name, value, limit in open_:
            parts.append(f"the {name} {_show(value)} is too wide for the bound {limit:g}")
        if open_:
            name, value, limit = open_[0]
            need = _more(value, limit)
            what = f"about {need:.0f} {'seeds' if value.over == 'seeds' else 'forget and holdout examples'} (now "
            what += f"{value.seeds if value.over == 'seeds' else value.n}) would settle the {name}"
            advice.insert(
                0, what if math.isfinite(need) else f"the {name} lies on its bound: no number of examples settles it"
            )
            if value.over == "examples" and value.seeds < 3 and len(self.seeds) < 3:
                advice.insert(1, "3 or more seeds would show the spread over seeds")
        return "inconclusive", "; ".join(parts + lacking), "; ".join(advice)

    # -- words -----------------------------------------------------------------------------------------------------
    def _gap_text(self) -> str:
        return f"original minus retrained is {_show(self.gap)}, two retrained models lie {self.floor:.3g} apart"

    def _other_score(self) -> str:
        g = self.original_g
        if g is not None and g.above(0):
            shown = f"the original stands out by {_show(g)}"
            return f"membership (forget against holdout) would show it: {shown}; use shadow models"
        return (
            "nor does membership on the holdout split show it; per-example shadow models (u_lira) may, or a forget set "
            "that the model memorised (mislabelled or rare rows, a whole class), or a less regularised recipe"
        )

    def _spent(self, name: str) -> str:
        after = self.seeds[0].attacks[name]
        cost = (
            ", ".join(f"{after.cost[k]} {k}" for k in ("steps", "examples", "queries"))
            if after.cost
            else "cost unknown"
        )
        budget = ", ".join(f"{k}={v}" for k, v in (after.budget or {}).items() if v is not None)
        return f"cost: {cost}; budget: {budget or 'none'}"

    def numbers(self, proof: Mapping[str, Any] | None) -> dict[str, Any]:
        """All measured numbers as nested plain data."""

        def told(value: Estimate | None) -> Any:
            return None if value is None else value.describe()

        return {
            "original_minus_retrained": told(self.gap),
            "retrained_apart": self.floor,
            "mean_forget_score": {
                name: float(sum(getattr(e, name).mean() for e in self.seeds) / len(self.seeds))
                for name in ("original", "unlearned", "retrained", "second")
            },
            "residue": told(self.r),
            "residue_floor": None if self.r is None else abs(self.second.value),
            "membership_residue": told(self.g),
            "membership_residue_original": told(self.original_g),
            "utility_loss": told(self.d),
            "attacked": {
                name: {
                    **value.describe(),
                    "floor": abs(self.floors[name].value) if name in self.floors else None,
                    "budget": dict(self.seeds[0].attacks[name].budget or {}),
                    "cost": dict(self.seeds[0].attacks[name].cost or {}),
                }
                for name, value in self.attacked.items()
            },
            "skipped": dict(self.seeds[0].skipped),
            **({"proof": dict(proof)} if proof is not None else {}),
        }  # fmt: skip


GENTLER = "use fewer steps, a smaller rate or a narrower scope, keep a retain term, or stop at the holdout's loss"
STRONGER = "use more steps, a larger rate or a wider scope, or an exact method"
DEEPER = "the weights still hold it: widen the scope, train against an adversary, or use an exact method"
MORE_EXAMPLES = "a verdict on so few examples takes an exact method's proof, or more examples of the kind"


def proved(proof: Mapping[str, Any], thresholds: Thresholds = Thresholds()) -> Verdict | None:
    """The verdict of a proof that holds; None for one that does not."""
    held, reason = examine(proof)
    if not held:
        return None
    advice = "the proof is about these weights; copies, caches and outputs made earlier are not covered"
    word = f"removed ({proof['kind']})"
    return Verdict(word, reason, thresholds=thresholds, numbers={"proof": dict(proof)}, advice=advice)


def _more(value: Estimate, limit: float) -> float:
    """Examples or seeds at which the interval would leave the bound: its width falls with their square root."""
    half, distance = (value.high - value.low) / 2, abs(limit - value.value)
    now = value.seeds if value.over == "seeds" else value.n
    if not math.isfinite(half):
        return math.inf
    return math.ceil(now * max((half / distance) ** 2, 1.0)) if distance > 1e-3 else math.inf


def _show(value: Estimate | None) -> str:
    return "unknown" if value is None else f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
