"""Audits: checks over the original, the unlearned and the retrained model, with the noise floor of a second retrained
seed."""

from __future__ import annotations

from expunge.audits.base import Check, Measured, Measurement, check, checks, find_check, run_checks
from expunge.audits.golds import GOLDS, Gold, make_gold
from expunge.audits.subjects import Subjects

__all__ = [
    "GOLDS",
    "Check",
    "Gold",
    "Measured",
    "Measurement",
    "Subjects",
    "check",
    "checks",
    "find_check",
    "make_gold",
    "run_checks",
]
