"""The ledger's tables, and how a database is opened.

Nothing is changed or removed once written: the ORM refuses it on every database, and on SQLite triggers do too. SQLite
writers take the lock at their start and wait for each other.
"""

from __future__ import annotations

import time
import uuid
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import DDL, JSON, ForeignKey, Index, UniqueConstraint, create_engine, event
from sqlalchemy.engine import URL, Engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from expunge.errors import BadSetting

OPEN, DONE = "received", "done"
STATUSES = (OPEN, "running", "failed", DONE, "refused")
CLOSED = (DONE, "refused")
_WAIT_MS = 30_000


def _identity() -> str:
    return uuid.uuid4().hex


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


class Base(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: JSON}


class RequestRow(Base):
    __tablename__ = "requests"
    id: Mapped[str] = mapped_column(primary_key=True, default=_identity)
    fingerprint: Mapped[str] = mapped_column(index=True)
    kind: Mapped[str]
    summary: Mapped[str]
    ids_digest: Mapped[str | None]
    received_at: Mapped[str] = mapped_column(default=_now)
    events: Mapped[list[EventRow]] = relationship(order_by="EventRow.number", lazy="selectin")

    @property
    def status(self) -> str:
        """The latest event's."""
        return self.events[-1].status if self.events else OPEN


class EventRow(Base):
    __tablename__ = "events"
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    request: Mapped[str] = mapped_column(ForeignKey("requests.id"), index=True)
    status: Mapped[str]
    at: Mapped[str] = mapped_column(default=_now)
    note: Mapped[str] = mapped_column(default="")


class DeletionRow(Base):
    __tablename__ = "deletions"
    __table_args__ = (
        Index("deletions_by_content", "fingerprint", "row_digest"),
        UniqueConstraint("request", "row_digest"),
    )
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    request: Mapped[str] = mapped_column(ForeignKey("requests.id"))
    fingerprint: Mapped[str]
    row_digest: Mapped[str]


class RunRow(Base):
    __tablename__ = "runs"
    id: Mapped[str] = mapped_column(primary_key=True, default=_identity)
    request: Mapped[str] = mapped_column(ForeignKey("requests.id"), index=True)
    method: Mapped[str]
    settings: Mapped[dict[str, Any]]
    seeds: Mapped[dict[str, Any]]
    verdict: Mapped[str | None]
    cost: Mapped[dict[str, Any]]
    results_path: Mapped[str | None]
    certificate_digest: Mapped[str | None]
    recorded_at: Mapped[str] = mapped_column(default=_now)


class ModelRow(Base):
    __tablename__ = "models"
    digest: Mapped[str] = mapped_column(primary_key=True)
    parent: Mapped[str | None] = mapped_column(index=True)
    run: Mapped[str | None] = mapped_column(ForeignKey("runs.id"))
    fingerprint: Mapped[str] = mapped_column(index=True)
    recorded_at: Mapped[str] = mapped_column(default=_now)


def open_engine(url: URL) -> Engine:
    engine = create_engine(url)
    if url.get_backend_name() == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # transactions are begun by `_begin_sqlite`, not guessed by the driver
    connection.execute(f"PRAGMA busy_timeout = {_WAIT_MS}")
    connection.execute("PRAGMA foreign_keys = ON")
    for attempt in range(50):  # two processes that both switch a new file to WAL: SQLite does not wait here by itself
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            break
        except Exception as error:
            if "locked" not in str(error) or attempt == 49:
                raise
            time.sleep(0.05)


def _begin_sqlite(connection: Any) -> None:
    reading = connection.get_execution_options().get("reading", False)
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")


@event.listens_for(Session, "before_flush")
def _append_only(session: Session, *_: Any) -> None:
    touched = [row for row in (*session.dirty, *session.deleted) if isinstance(row, Base)]
    if any(session.is_modified(row) or row in session.deleted for row in touched):
        raise BadSetting(
            "Expected only new rows, found a changed or deleted one. The ledger is append-only: record an event."
        )


for _table in Base.metadata.tables.values():
    for _verb in ("UPDATE", "DELETE"):
        event.listen(
            _table,
            "after_create",
            DDL(
                f"CREATE TRIGGER {_table.name}_no_{_verb.lower()} BEFORE {_verb} ON {_table.name} "
                "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
            ).execute_if(dialect="sqlite"),
        )
