"""Results are data: one typed record per run, from which the report, the certificate and the tables are made.

`results.json` has the schema "expunge.results/1", which the classes below spell out. The word of a subject is one of
`original`, `unlearned`, `retrained`; `floor` is how far a second retrained seed lies from the first, in the unit of the
measurement: a gap to `retrained` that is smaller than the floor is noise.

Plots (`results["plots"]`), each part optional; a missing part is left out of the report with a line saying why:

    loss_histograms  {split: {subject: [loss of one example, ...]}}        nats (or the task's energy), any order
    roc              {attack: {subject: {"fpr": [...], "tpr": [...]}}}     both rising from 0 to 1, equal lengths
    per_class        {subject: [accuracy of class 0, of class 1, ...]}     in [0, 1], null where a class is absent
    curves           [{"step": 0, "epoch": 0, "<name>": value, ...}, ...]  one row per evaluation, losses by split name

Numbers that JSON cannot hold (NaN, infinities) are written as the strings "NaN", "Infinity", "-Infinity" and come back
as numbers. Nothing in a record is the content of an example: ids, digests, counts and measurements only.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from expunge.errors import BadData
from expunge.files import write_atomic
from expunge.records.canonical import digest, plain

Number = float | None
Interval = tuple[Number, Number]
SUBJECTS = ("original", "unlearned", "retrained")


class Record(BaseModel):
    """What all records share: they do not change, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class StoredRecord(Record):
    """A record that is a file of its own."""

    kind: ClassVar[str] = "record"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a record; `BadData` names every field that does not fit."""
        name = Path(path).name
        try:
            return cls.from_dict(json.loads(Path(path).read_text("utf-8")), name)
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise BadData(
                f"Expected {cls.kind} as JSON in {name}, found a file that cannot be read ({error}). "
                "Check the path, or make the file again."
            ) from error

    @classmethod
    def from_dict(cls, data: Any, name: str = "the given record") -> Self:
        """Check a dict (as read from JSON) against the schema; `BadData` names every field that does not fit."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'record'}: {e['msg']}" for e in error.errors()[:8])
            raise BadData(
                f"Expected {cls.kind} with the fields of its schema, found in {name}: {wrong}. "
                "Correct these fields, or make the file again with this version of expunge."
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """What is written to JSON."""
        return plain(self.model_dump(by_alias=True))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the record in one step; on a full disk `DiskFull` is raised and an older file stays as it was."""
        return write_atomic(path, json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False, indent=1) + "\n")

    def digest(self) -> str:
        """SHA-256 of the record's canonical JSON; the same for the object and for the file it was saved to."""
        return digest(self.to_dict())


class DataRecord(Record):
    fingerprint: str
    rows: int = Field(ge=0)
    columns: tuple[str, ...] = ()


class CaseRecord(Record):
    """One request against one model. `request` is what the request says about itself, without data content."""

    name: str = "case"
    task: str
    request: dict[str, Any] = {}
    data: DataRecord
    splits: dict[str, int] = {}
    notes: dict[str, Any] = {}


class MethodRecord(Record):
    name: str
    family: str = ""
    formula: str = ""
    settings: dict[str, Any] = {}
    intention: str = "removal"
    guarantee: str = "empirical"
    paper: str = ""


class Seeds(Record):
    training: int | None = None
    unlearning: int | None = None
    audit: int | None = None


class Cost(Record):
    """Wall time of the unlearning, of retraining, and their ratio (filled in when both are known)."""

    seconds: float = Field(ge=0)
    retrain_seconds: float | None = Field(default=None, ge=0)
    relative: float | None = Field(default=None, ge=0)
    peak_memory_mb: float | None = Field(default=None, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _fill_relative(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("relative") is None and data.get("retrain_seconds"):
            return {**data, "relative": float(data["seconds"]) / float(data["retrain_seconds"])}
        return data


class Measurement(Record):
    """One number of one check on one split, for every subject.

    direction: "higher" or "lower" is better, or "match": nearest to retrained is best.
    range: lowest and highest possible value. intervals: subject -> 95% interval.
    """

    check: str
    name: str
    version: str = "1"
    unit: str = ""
    direction: Literal["higher", "lower", "match"] = "match"
    range: Interval = (None, None)
    split: str = ""
    original: Number = None
    unlearned: Number = None
    retrained: Number = None
    floor: Number = None
    intervals: dict[str, Interval | None] = {}
    note: str = ""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for what, pair in {"range": self.range, **self.intervals}.items():
            low, high = pair or (None, None)
            if low is not None and high is not None and low > high:
                raise ValueError(f"{what} runs backwards: {low} > {high}")
        return self

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes it the same measurement in another run: check, name, split."""
        return self.check, self.name, self.split

    @property
    def gap(self) -> Number:
        """unlearned - retrained, in the measurement's unit; None where one of them is missing."""
        return None if self.unlearned is None or self.retrained is None else self.unlearned - self.retrained


class VerdictRecord(Record):
    """The one decision: its word, the reason in a sentence, the numbers it rests on and the thresholds it used."""

    verdict: str
    reason: str = ""
    numbers: dict[str, Any] = {}
    thresholds: dict[str, Any] = {}
    attack: str | None = None
    advice: str = ""


class Weights(Record):
    """SHA-256 of the weights (`expunge.files.digest_weights`) before and after."""

    before: str | None = None
    after: str | None = None


class Curve(Record):
    fpr: tuple[float, ...]
    tpr: tuple[float, ...]

    @model_validator(mode="after")
    def _same_length(self) -> Self:
        if len(self.fpr) != len(self.tpr):
            raise ValueError(f"fpr has {len(self.fpr)} points and tpr {len(self.tpr)}")
        return self


class Plots(Record):
    """Arrays for the report; see the head of this file."""

    loss_histograms: dict[str, dict[str, tuple[Number, ...]]] = {}
    roc: dict[str, dict[str, Curve]] = {}
    per_class: dict[str, tuple[Number, ...]] = {}
    curves: tuple[dict[str, Number | str | list[Any]], ...] = ()


class Results(StoredRecord):
    """Everything measured about one run of one method on one case (`results.json`)."""

    kind: ClassVar[str] = "results"

    schema_name: Literal["expunge.results/1"] = Field(default="expunge.results/1", alias="schema")
    case: CaseRecord
    method: MethodRecord
    seeds: Seeds = Seeds()
    versions: dict[str, str] = {}
    machine: dict[str, Any] = {}
    cost: Cost
    measurements: tuple[Measurement, ...] = ()
    attacks: tuple[Measurement, ...] = ()
    verdict: VerdictRecord | None = None
    history: tuple[dict[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()
    weights: Weights = Weights()
    plots: Plots = Plots()
    command: str = ""
    """How to make this file again, if it came from the command line."""

    def find(self, name: str, split: str | None = None) -> Measurement | None:
        """The first measurement or attack of that name (on that split)."""
        for row in (*self.measurements, *self.attacks):
            if row.name == name and split in (None, row.split):
                return row
        return None
