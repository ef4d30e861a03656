"""The ledger: a durable, append-only account of deletion requests, the runs that served them, and the models they made.

    requests   what was asked, by digests (no ids, no data)
    events     what happened to a request: received, done, ...
    deletions  one row digest for each example asked for
    runs       method, settings, seeds, verdict, cost, files
    models     weights digest, its parent's digest, the run that made it: the lineage

Nothing is ever changed or removed: a request's status is its latest event. The ORM refuses updates and deletes, and on
SQLite the database itself does (triggers). SQLite is the default; any SQLAlchemy URL works. Several processes may
write: on SQLite each write takes the lock at its start (BEGIN IMMEDIATE) and waits for others up to 30 seconds.

A row digest tells whether an example was already deleted. It is a plain hash of content, so whoever can guess an
example can confirm it: keep the ledger as private as the data's index.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

from sqlalchemy import select
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from expunge.errors import BadRequest, BadSetting, DiskFull
from expunge.records.canonical import digest_ids, plain
from expunge.records.ledger_tables import (
    CLOSED,
    DONE,
    OPEN,
    STATUSES,
    Base,
    DeletionRow,
    EventRow,
    ModelRow,
    RequestRow,
    RunRow,
    open_engine,
)


@dataclass(frozen=True)
class Receipt:
    """What recording a request found: `repeated` maps row digests that an earlier request already named to that
    request; `fresh` are those never seen."""

    id: str
    repeated: dict[str, str]
    fresh: tuple[str, ...]


class Ledger:
    """Open (or make) the ledger at a SQLAlchemy URL."""

    def __init__(self, url: str | URL = "sqlite:///expunge.db") -> None:
        self._engine = open_engine(make_url(url))
        self._reading = self._engine.execution_options(reading=True)
        with self._translated():
            Base.metadata.create_all(self._engine)

    # -- writing -----------------------------------------------------------------------------------------------------
    def record_request(
        self,
        fingerprint: str,
        kind: str,
        summary: str = "",
        ids: Iterable[int | str] | None = None,
        row_digests: Iterable[str] = (),
        ids_digest: str | None = None,
    ) -> Receipt:
        """Write a request about the data of that fingerprint. Of the ids only one digest is kept; `row_digests` (of the
        examples' contents, `Data.row_digests`) tell at once which were asked for before."""
        rows = tuple(dict.fromkeys(row_digests))
        with self._writing() as session:
            repeated = self._seen(session, fingerprint, rows)
            asked = ids_digest if ids is None else digest_ids(ids)
            request = RequestRow(fingerprint=fingerprint, kind=kind, summary=summary, ids_digest=asked)
            session.add(request)
            session.flush()
            session.add(EventRow(request=request.id, status=OPEN))
            session.add_all(DeletionRow(request=request.id, fingerprint=fingerprint, row_digest=row) for row in rows)
            return Receipt(request.id, repeated, tuple(row for row in rows if row not in repeated))

    def record_event(self, request: str, status: str, note: str = "") -> None:
        """Append to a request's history."""
        if status not in STATUSES:
            raise BadSetting(f"Expected a status, one of {', '.join(STATUSES)}, found {status!r}. Use one of them.")
        with self._writing() as session:
            self._known_request(session, request)
            session.add(EventRow(request=request, status=status, note=note))

    def record_run(
        self,
        request: str,
        method: str,
        settings: Mapping[str, Any] | None = None,
        seeds: Mapping[str, Any] | None = None,
        verdict: str | None = None,
        cost: Mapping[str, Any] | None = None,
        results_path: str | None = None,
        certificate_digest: str | None = None,
        closes: bool = False,
    ) -> str:
        """Write a run and return its id. `closes`: the request counts as done by this run (a person or a policy decides
        that; a comparison of ten methods serves one request with ten runs)."""
        with self._writing() as session:
            self._known_request(session, request)
            run = RunRow(
                request=request,
                method=method,
                settings=plain(dict(settings or {})),
                seeds=plain(dict(seeds or {})),
                verdict=verdict,
                cost=plain(dict(cost or {})),
                results_path=None if results_path is None else str(results_path),
                certificate_digest=certificate_digest,
            )
            session.add(run)
            session.flush()
            if closes:
                session.add(EventRow(request=request, status=DONE, note=f"run {run.id}"))
            return run.id

    def record_model(
        self, digest: str, fingerprint: str, parent: str | None = None, run: str | None = None
    ) -> ModelRow:
        """Write a model by its weights' digest. Writing the same fact again changes nothing (a model that a later
        request starts from may be named without its parent). Another parent for known weights is an error."""
        if parent == digest:
            raise BadRequest(
                "Expected a new model to have other weights than its parent, found the same digest. "
                "The method changed nothing: record the run without a model."
            )
        with self._writing() as session:
            known = session.get(ModelRow, digest)
            if known is None:
                known = ModelRow(digest=digest, fingerprint=fingerprint, parent=parent, run=run)
                session.add(known)
                session.flush()
            elif parent not in (None, known.parent) or known.fingerprint != fingerprint:
                raise BadRequest(
                    f"Expected weights {digest[:12]}... to keep their recorded parent and data, found others. "
                    "Check which model was given; the ledger's past cannot be rewritten."
                )
            return known

    # -- reading -----------------------------------------------------------------------------------------------------
    def lineage(self, digest: str) -> list[ModelRow]:
        """The model, its parent, its grandparent, ... as far as the ledger knows; empty for unknown weights."""
        line: list[ModelRow] = []
        with self._session(self._reading) as session:
            row = session.get(ModelRow, digest)
            while row is not None and row not in line:
                line.append(row)
                row = session.get(ModelRow, row.parent) if row.parent else None
        return line

    def open_requests(self, fingerprint: str | None = None) -> list[RequestRow]:
        """Requests not yet done or refused, oldest first."""
        return [request for request in self.requests(fingerprint) if request.status not in CLOSED]

    def requests(self, fingerprint: str | None = None) -> list[RequestRow]:
        """All requests (about that data), oldest first."""
        query = select(RequestRow).order_by(RequestRow.received_at, RequestRow.id)
        with self._session(self._reading) as session:
            return list(
                session.scalars(query if fingerprint is None else query.where(RequestRow.fingerprint == fingerprint))
            )

    def runs(self, request: str | None = None) -> list[RunRow]:
        """All runs (for that request), oldest first."""
        query = select(RunRow).order_by(RunRow.recorded_at, RunRow.id)
        with self._session(self._reading) as session:
            return list(session.scalars(query if request is None else query.where(RunRow.request == request)))

    def alive(self, fingerprint: str) -> list[ModelRow]:
        """The models of that data that no later model came from, oldest first: those a new request must reach."""
        parents = select(ModelRow.parent).where(ModelRow.parent.is_not(None))
        query = select(ModelRow).where(ModelRow.fingerprint == fingerprint, ModelRow.digest.not_in(parents))
        with self._session(self._reading) as session:
            return list(session.scalars(query.order_by(ModelRow.recorded_at, ModelRow.digest)))

    def seen(self, fingerprint: str, row_digests: Iterable[str]) -> dict[str, str]:
        """Row digest -> the first request that named it; a row that was never asked for is not in the answer."""
        with self._session(self._reading) as session:
            return self._seen(session, fingerprint, tuple(row_digests))

    def close(self) -> None:
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- inside ------------------------------------------------------------------------------------------------------
    @contextmanager
    def _writing(self) -> Iterator[Session]:
        """One transaction: all of it is written or none."""
        with self._session(self._engine) as session, session.begin():
            yield session

    @contextmanager
    def _session(self, engine: Engine) -> Iterator[Session]:
        with self._translated(), Session(engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except IntegrityError as error:
            raise BadRequest(
                f"Expected the run that a model names to be in the ledger, found: {error.orig}. Record the run first."
            ) from error
        except DBAPIError as error:
            if "disk is full" in str(error.orig):
                raise DiskFull(
                    "Expected room to write to the ledger, and the disk is full. "
                    "Free some space and repeat the call; what was recorded before is intact."
                ) from error
            raise

    def _known_request(self, session: Session, request: str) -> None:
        if session.get(RequestRow, request) is None:
            raise BadRequest(f"Expected the id of a recorded request, found {request!r}. Call record_request first.")

    @staticmethod
    def _seen(session: Session, fingerprint: str, rows: tuple[str, ...]) -> dict[str, str]:
        found: dict[str, str] = {}
        for start in range(0, len(rows), 500):  # databases bound the number of parameters of one query
            query = select(DeletionRow.row_digest, DeletionRow.request).where(
                DeletionRow.fingerprint == fingerprint, DeletionRow.row_digest.in_(rows[start : start + 500])
            )
            for row, request in session.execute(query.order_by(DeletionRow.number)):
                found.setdefault(row, request)
        return found
