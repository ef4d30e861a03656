"""Expunge changes what a trained model knows, and proves it.

from expunge import Case, Training, audit, requests, unlearn

case = Case(model, data=(X, y), test=(X_test, y_test), request=requests.label(3), recipe=Training(epochs=30))
outcome = unlearn(case, "salun", density=0.5)
print(audit(case, outcome))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_FACE = {
    "Case": "expunge.cases",
    "TensorData": "expunge.cases",
    "load_model": "expunge.cases.loading",
    "load_data": "expunge.cases.loading",
    "load_pipeline": "expunge.cases.loading",
    "pictures": "expunge.cases.pictures",
    "imagined": "expunge.cases.pictures",
    "load_pictures": "expunge.cases.pictures",
    "feedback": "expunge.cases.feedback",
    "Denoiser": "expunge.tasks.denoiser",
    "Diffusion": "expunge.tasks",
    "Sampling": "expunge.tasks.sampling",
    "sample": "expunge.tasks.sampling",
    "question_answer": "expunge.cases.text",
    "plain_text": "expunge.cases.text",
    "Classification": "expunge.tasks",
    "Gan": "expunge.tasks",
    "GanPair": "expunge.tasks",
    "Language": "expunge.tasks",
    "Regression": "expunge.tasks",
    "Vae": "expunge.tasks",
    "Curves": "expunge.engine.measured",
    "Optimizer": "expunge.parts.plan",
    "Plan": "expunge.parts.plan",
    "Term": "expunge.parts.plan",
    "Training": "expunge.parts.plan",
    "Outcome": "expunge.methods.outcome",
    "method": "expunge.methods",
    "prepare": "expunge.methods.outcome",
    "protect": "expunge.methods.outcome",
    "unlearn": "expunge.methods.outcome",
    "Audit": "expunge.records.audit",
    "audit": "expunge.records.audit",
    "compare": "expunge.records.compare",
    "matched": "expunge.records.matched",
    "search": "expunge.records.search",
    "fit": "expunge.engine",
    "verify": "expunge.records.certificate",
}
_MODULES = {
    "requests": "expunge.cases.requests",
    "forget_sets": "expunge.cases.forget_sets",
    "parts": "expunge.parts",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = importlib.import_module(_MODULES[name])
    elif name in _FACE:
        value = getattr(importlib.import_module(_FACE[name]), name)
    else:
        known = ", ".join(sorted([*_FACE, *_MODULES]))
        raise AttributeError(f"module 'expunge' has no attribute '{name}'; it has {known}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_FACE, *_MODULES])


if TYPE_CHECKING:
    from expunge.cases import Case as Case
    from expunge.cases import TensorData as TensorData
    from expunge.cases import requests as requests
    from expunge.cases.text import plain_text as plain_text
    from expunge.cases.text import question_answer as question_answer
    from expunge.engine.measured import Curves as Curves
    from expunge.methods.outcome import Outcome as Outcome
    from expunge.methods.outcome import unlearn as unlearn
    from expunge.parts.plan import Optimizer as Optimizer
    from expunge.parts.plan import Plan as Plan
    from expunge.parts.plan import Term as Term
    from expunge.parts.plan import Training as Training
    from expunge.tasks import Classification as Classification
    from expunge.tasks import Language as Language
    from expunge.tasks import Regression as Regression
