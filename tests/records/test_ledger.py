"""The ledger remembers, forgets nothing, and takes writers from several processes at once."""

from __future__ import annotations

import sqlite3
import subprocess
import sys

import pytest
from sqlalchemy.exc import OperationalError

from expunge.errors import BadRequest, BadSetting, DiskFull
from expunge.records.ledger import Ledger
from expunge.records.ledger_tables import ModelRow


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'expunge.db'}"


@pytest.fixture
def ledger(url):
    with Ledger(url) as opened:
        yield opened


def test_lineage_and_the_models_alive(ledger):
    """original -> first -> second, and a sibling of first; another data set beside it."""
    request = ledger.record_request("data", "samples", "3 rows", ids=[1, 2, 3]).id
    run = ledger.record_run(
        request, "ssd", {"alpha": 10}, {"training": 2**62}, "removed", {"seconds": 1.5}, "runs/1/results.json"
    )
    ledger.record_model("original", "data")
    ledger.record_model("first", "data", parent="original", run=run)
    ledger.record_model("sibling", "data", parent="original", run=run)
    ledger.record_model("second", "data", parent="first", run=run)
    ledger.record_model("stranger", "other")
    assert [row.digest for row in ledger.lineage("second")] == ["second", "first", "original"]
    assert ledger.lineage("second")[0].run == run and ledger.lineage("unknown") == []
    assert {row.digest for row in ledger.alive("data")} == {"second", "sibling"}
    (stored,) = ledger.runs(request)
    assert (stored.settings, stored.seeds, stored.cost) == ({"alpha": 10}, {"training": str(2**62)}, {"seconds": 1.5})


def test_a_repeated_deletion_is_recognised_and_a_new_one_too(ledger):
    first = ledger.record_request("data", "samples", row_digests=["a", "b", "b"])
    assert first.repeated == {} and first.fresh == ("a", "b")
    second = ledger.record_request("data", "samples", row_digests=["b", "c"])
    assert second.repeated == {"b": first.id} and second.fresh == ("c",)
    assert ledger.seen("data", ["a", "b", "c", "z"]) == {"a": first.id, "b": first.id, "c": second.id}
    assert ledger.seen("other data", ["a"]) == {}
    many = [f"row{i}" for i in range(1201)]
    ledger.record_request("data", "class", row_digests=many)
    assert len(ledger.seen("data", many)) == 1201


def test_status_is_the_latest_event_and_history_stays(ledger):
    first = ledger.record_request("data", "samples").id
    second = ledger.record_request("data", "class").id
    assert [row.id for row in ledger.open_requests()] == [first, second]
    ledger.record_event(first, "failed", "out of memory")
    assert ledger.open_requests()[0].status == "failed"
    ledger.record_run(first, "ssd")
    assert len(ledger.open_requests()) == 2
    ledger.record_run(first, "salun", verdict="removed", closes=True)
    assert [row.id for row in ledger.open_requests("data")] == [second] and ledger.open_requests("other") == []
    assert [event.status for event in ledger.requests()[0].events] == ["received", "failed", "done"]


def test_ids_are_kept_as_a_digest_only(ledger, tmp_path):
    ledger.record_request("data", "samples", ids=[987654321, 123454321])
    (row,) = ledger.requests()
    assert len(row.ids_digest) == 64
    ledger.close()
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"987654321" not in stored and row.ids_digest.encode() in stored


def test_nothing_can_be_changed_or_removed(ledger, tmp_path):
    ledger.record_model("m", "data")
    with pytest.raises(BadSetting, match="append-only"), ledger._writing() as session:
        session.get(ModelRow, "m").parent = "x"
    with pytest.raises(BadSetting, match="append-only"), ledger._writing() as session:
        session.delete(session.get(ModelRow, "m"))
    raw = sqlite3.connect(tmp_path / "expunge.db")
    for command in ("UPDATE models SET parent = 'x'", "DELETE FROM models"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            raw.execute(command)
    raw.close()
    assert ledger.lineage("m")[0].parent is None


def test_history_cannot_be_rewritten(ledger):
    ledger.record_model("original", "data")
    ledger.record_model("first", "data", parent="original")
    ledger.record_model("first", "data", parent="original")
    ledger.record_model("first", "data")  # named again as the start of the next request
    assert ledger.lineage("first")[0].parent == "original" and len(ledger.alive("data")) == 1
    with pytest.raises(BadRequest, match="keep their recorded parent"):
        ledger.record_model("first", "data", parent="another")
    with pytest.raises(BadRequest, match="changed nothing"):
        ledger.record_model("first", "data", parent="first")


def test_what_refers_to_nothing_is_refused_and_leaves_nothing(ledger):
    with pytest.raises(BadRequest, match="record_request first"):
        ledger.record_run("nobody", "ssd")
    with pytest.raises(BadRequest, match="Record the run first"):
        ledger.record_model("m", "data", run="nobody")
    with pytest.raises(BadSetting, match="one of received"):
        ledger.record_event(ledger.record_request("data", "samples").id, "perhaps")
    assert ledger.alive("data") == [] and ledger.runs() == []


def test_a_failed_write_writes_nothing_at_all(ledger, monkeypatch):
    """A request whose deletions cannot be written is not half there; a full disk has its own error."""
    monkeypatch.setattr(
        Ledger,
        "_seen",
        staticmethod(lambda *_: (_ for _ in ()).throw(OperationalError("", {}, Exception("database or disk is full")))),
    )
    with pytest.raises(DiskFull, match="Free some space"):
        ledger.record_request("data", "samples", row_digests=["a"])
    monkeypatch.undo()
    assert ledger.requests() == [] and ledger.seen("data", ["a"]) == {}


WRITER = """
import sys
from expunge.records.ledger import Ledger
name, url = sys.argv[1:3]
sys.stdin.readline()  # both start together, also at making the tables
with Ledger(url) as ledger:
    for i in range(40):
        request = ledger.record_request("data", "samples", row_digests=[f"{name}{i}", f"shared{i}"])
        run = ledger.record_run(request.id, name, closes=True)
        ledger.record_model(f"{name}{i}", "data", parent=f"{name}{i - 1}" if i else None, run=run)
"""


def test_two_processes_write_at_once(url):
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, name, url],
            stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={"PYTHONPATH": ":".join(sys.path)},
        )
        for name in ("left", "right")
    ]  # fmt: skip
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        _, errors = writer.communicate(timeout=60)
        assert writer.returncode == 0, errors
    with Ledger(url) as ledger:
        assert len(ledger.requests()) == len(ledger.runs()) == 80 and ledger.open_requests() == []
        assert len(ledger.lineage("left39")) == len(ledger.lineage("right39")) == 40
        assert {row.digest for row in ledger.alive("data")} == {"left39", "right39"}
        first = {row.id: row for row in ledger.requests()}
        named = ledger.seen("data", [f"shared{i}" for i in range(40)])
        assert len(named) == 40 and set(named.values()) <= set(first)
