"""What an exact method's own numbers settle.

{"kind": "proved", "relative_difference": x, "bound": y}         weights against a clean retraining; y = 0 unless given,
                                                                 0 being equality byte for byte
{"kind": "proved", "by": "keys"}                                 by construction: all that was trained on is keyed by live rows
{"kind": "bounded", "epsilon": e, "delta": d, "residual": s, "budget": t}      certified removal; holds while s <= t
{"kind": "unproved", ...}                                        the method's own check failed

`scope`: "all", or "head" where nothing is proved about a backbone below it: such a proof does not settle the verdict, the
measurements do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from expunge.errors import BadSetting

NEEDED = {"proved": ("relative_difference",), "bounded": ("epsilon", "delta", "residual")}


def examine(proof: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether the proof holds, and a sentence that says so with its numbers."""
    kind = proof.get("kind")
    if kind == "unproved":
        value = proof.get("relative_difference", proof.get("residual"))
        return False, "the proof does not hold" + (f" ({float(value):.3g})" if value is not None else "")
    if proof.get("scope") == "head":
        return False, "exact for the head, and nothing is proved about the backbone below it"
    if kind == "proved" and proof.get("by") == "keys" and proof.get("relative_difference") is None:
        return True, "everything the model was trained on is keyed by the rows that are live, by construction"
    if kind not in NEEDED:
        raise BadSetting(
            f"expected a proof of kind 'proved', 'bounded' or 'unproved', found {kind!r}; pass what the exact method gave"
        )
    missing = [name for name in NEEDED[kind] if proof.get(name) is None]
    if missing:
        raise BadSetting(
            f"expected a proof '{kind}' to tell {', '.join(NEEDED[kind])}, found no {', '.join(missing)}; add it"
        )
    if kind == "proved":
        value, bound = float(proof["relative_difference"]), float(proof.get("bound") or 0.0)
        how = (
            "byte for byte" if value == 0 else f"to a relative difference of {value:.3g}, within the bound {bound:.3g}"
        )
        held, text = value <= bound, f"the weights equal those of a clean retraining {how}"
        broken = f"the proof does not hold (relative difference {value:.3g}, bound {bound:.3g})"
    else:
        value, bound = float(proof["residual"]), float(proof.get("budget", math.inf))
        held = value <= bound
        text = f"certified removal: epsilon {proof['epsilon']:.3g}, delta {proof['delta']:.3g}, residual {value:.3g}"
        broken = f"the certificate does not hold (residual {value:.3g}, budget {bound:.3g})"
    return held, text if held else broken
