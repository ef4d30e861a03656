"""Records: what a run leaves behind, for people and for machines.

`results` is the data, `comparison` puts several results side by side, `report` shows them, `certificate` signs them,
`ledger` keeps the history. Everything here works without torch: whoever checks a certificate needs no model library.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Results": "results",
    "Measurement": "results",
    "Comparison": "comparison",
    "certify": "certificate",
    "verify": "certificate",
    "inspect_certificate": "certificate",
    "Verification": "certificate",
    "new_key": "keys",
    "Ledger": "ledger",
    "render": "report",
    "write_report": "report",
}

__all__ = [
    "Comparison",
    "Ledger",
    "Measurement",
    "Results",
    "Verification",
    "certify",
    "inspect_certificate",
    "new_key",
    "render",
    "verify",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Load a name's module when the name is first used, so that verifying needs neither SQLAlchemy nor jinja2."""
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
