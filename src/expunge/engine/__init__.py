"""The engine: the one loop, run directories and resume, devices and processes, ensembles and per-example gradients."""

from expunge.engine.execute import Result, changed_fraction, execute, fit, weights_digest
from expunge.engine.loop import Trace, run_plan
from expunge.engine.rundir import RunDirectory
from expunge.engine.workbench import Workbench

__all__ = [
    "Result", "RunDirectory", "Trace", "Workbench", "changed_fraction", "execute", "fit", "run_plan", "weights_digest",
]  # fmt: skip
