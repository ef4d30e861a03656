"""Every error and warning Expunge raises on purpose.

An error says three things in this order: what was expected, what was found, what to do. The tree is small on purpose:
catch `ExpungeError` for all of them, or one branch for a stage.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ExpungeError(Exception):
    """Root of all errors that Expunge raises on purpose."""


class BadRequest(ExpungeError, ValueError):
    """The deletion request does not fit the data (ids out of range, empty, everything, ...)."""


class BadData(ExpungeError, ValueError):
    """The data cannot be used (NaN, overlapping splits, labels outside the model's range, ...)."""


class BadModel(ExpungeError, ValueError):
    """The model cannot be loaded safely or does not fit the task."""


class BadSetting(ExpungeError, ValueError):
    """A setting is unknown or outside its range."""


class UnmetNeed(ExpungeError):
    """A method or an audit needs something that the case does not have. Lists every unmet need."""


class MissingGold(UnmetNeed):
    """A check compares with `retrained`, and no gold was given and none can be made."""


class JudgeBelowFloor(UnmetNeed):
    """A judge of generated images is wrong too often on held-out real ones, so no table is made with it."""


class OriginalBelowFloor(UnmetNeed):
    """The model before unlearning does not draw what it is asked, so a table of what was removed from it would say nothing."""


class BadCheckpoint(ExpungeError):
    """A checkpoint is corrupt, truncated, or of another run."""


class RunBusy(ExpungeError):
    """Another process holds the run directory."""


class DiskFull(ExpungeError, OSError):
    """Nothing was written because the disk is full; what was there before is intact."""


class OutOfMemory(ExpungeError, MemoryError):
    """The machine's memory, or the accelerator's, does not hold the run; the message says which knobs there are."""


class MissingExtra(ExpungeError, ImportError):
    """An optional library is not installed; the message gives the install line."""


class VerificationFailed(ExpungeError):
    """A certificate does not verify."""


class ExpungeWarning(UserWarning):
    """Root of all warnings; each is also kept in the run's record and shown in the report."""


class ChangedNothing(ExpungeWarning):
    """The method left every weight as it was."""


class CollapsedUtility(ExpungeWarning):
    """Utility fell below the floor; the best earlier state was restored."""


class Diverged(ExpungeWarning):
    """A loss became NaN or infinite; the last good state was restored."""


class EmptyScope(ExpungeWarning):
    """A scope or a mask selected no weight."""


class ConstantTerm(ExpungeWarning):
    """A term of the plan never changed."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def need_extra(module: str, extra: str):
    """Import and return `module`, or raise `MissingExtra` with the install line."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"This feature uses the library '{module.split('.')[0]}', which is not installed. "
            f"Install it with: pip install 'expunge[{extra}]'"
        ) from error
