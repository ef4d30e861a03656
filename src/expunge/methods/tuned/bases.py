"""Forget terms that hardening methods are put around, by the names of the methods whose they are."""

from __future__ import annotations

from typing import Literal

from expunge.cases.case import Case
from expunge.errors import BadSetting
from expunge.methods.tuned.common import stay
from expunge.methods.tuned.rmu import steered_layer
from expunge.parts.objectives import ascend, hold, npo, simnpo, steer
from expunge.parts.plan import Term

Base = Literal["npo", "simnpo", "grad_diff", "rmu"]


def base_terms(
    case: Case, base: str, beta: float, gamma: float, alpha: float, average: str = "tokens", cap: float | None = None
) -> tuple[Term, ...]:
    """The forget and the retain term of a method, with weights gamma and alpha. beta: of npo and simnpo. cap: of grad_diff's
    ascent, nats."""
    if base == "rmu":
        layer = steered_layer(case)
        return Term(steer(layer), weight=gamma), *((Term(hold(layer), "retain", alpha),) if alpha else ())
    forget = {"npo": lambda: npo(beta), "simnpo": lambda: simnpo(beta), "grad_diff": lambda: ascend(cap, average)}
    if base not in forget:
        raise BadSetting(f"expected a base, one of {', '.join([*forget, 'rmu'])}, found {base!r}; use one of them")
    return Term(forget[base](), weight=gamma), *stay(alpha, average)
