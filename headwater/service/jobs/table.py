"""The queue of jobs, in SQLite: what was accepted survives any crash, and what changed can be followed.

Where the disk is full a job is not accepted, but a job's start, cancellation and end are kept in memory, shown as they
are, and written when that is possible again. A server that ends before that goes on with the job: it runs once more.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from headwater.service.documents import Json, JsonObject, read_json
from headwater.service.places import NotHereError

QUEUED = "queued"
RUNNING = "running"
DONE = "done"
FAILED = "failed"
CANCELLED = "cancelled"
ACTIVE = (QUEUED, RUNNING)
SCHEMA = """
create table if not exists job (
    id integer primary key autoincrement, kind text not null, document text not null, run text not null,
    state text not null, price text not null, progress text not null default '{}', result text, error text,
    created real not null, started real, finished real, starts integer not null default 0,
    cancel integer not null default 0
) strict;
create index if not exists job_state on job (state);
"""
# Kept as text, read as JSON.
JSON_COLUMNS = ("document", "price", "progress", "result")


@dataclass
class Job:
    """One job. `progress` is what the worker said last, `starts` how often it was begun."""

    id: int
    kind: str
    document: JsonObject
    run: str
    state: str
    price: JsonObject
    progress: JsonObject
    result: Json
    error: str | None
    created: float
    started: float | None
    finished: float | None
    starts: int
    cancel: int = field(default=0)

    def to_json(self) -> JsonObject:
        return asdict(self)


class JobQueue:
    """Jobs in a file. A change of state is durable when the call returns, where that can be; progress is not kept."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        # One connection under one lock; isolation_level=None commits every statement by itself.
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        self._db.execute("pragma journal_mode = wal")
        # Each commit is on the disk when it returns: an accepted job survives a power cut.
        self._db.execute("pragma synchronous = full")
        self._db.executescript(SCHEMA)
        # Milliseconds since 1970, or one more than the last change: it also grows over restarts.
        self._clock = int(time.time() * 1000)
        self._changed: dict[int, int] = {}
        # Progress of running jobs, in memory alone: writing it ten times a second would wear the disk.
        self._live: dict[int, JsonObject] = {}
        # Changes that the disk has not taken yet; they win over what the file says.
        self._unsaved: dict[int, JsonObject] = {}

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def recover(self) -> int:
        """Put back what ran when the server ended; return how many jobs that are."""
        running = self.newest((RUNNING,), most=1 << 30)
        for job in running:
            self._change(job.id, state=QUEUED)
        return len(running)

    def add(
        self, kind: str, document: Mapping[str, Json], run: str, price: Mapping[str, Json]
    ) -> tuple[Job, bool]:
        """Accept a job; where the same one is waiting or running, return that one and False."""
        # Sorted, so that the same settings in another order are the same job.
        text = json.dumps(document, sort_keys=True)
        with self._lock:
            rows = self._db.execute(
                "select * from job where kind = ? and document = ? and state in (?, ?)",
                (kind, text, *ACTIVE),
            )
            for job in map(self._job, rows.fetchall()):
                if job.state in ACTIVE:
                    return job, False
            done = self._write(
                "insert into job (kind, document, run, state, price, created) values (?, ?, ?, ?, ?, ?)",
                kind,
                text,
                run,
                QUEUED,
                json.dumps(price),
                time.time(),
            )
            return self._touch(int(done.lastrowid or 0)), True

    def get(self, number: int) -> Job:
        """Return a job; raise NotHereError where there is none."""
        with self._lock:
            row = self._db.execute("select * from job where id = ?", (number,)).fetchone()
        if row is None:
            raise NotHereError(f"there is no job {number}.")
        return self._job(row)

    def newest(
        self, states: tuple[str, ...] = (), before: int | None = None, most: int = 100
    ) -> list[Job]:
        """Return the newest jobs, those in certain states and with a smaller number where that is asked for."""
        where = "1"
        if states:
            marks = ", ".join("?" * len(states))
            where = f"state in ({marks})"
        query = f"select * from job where {where} and id < ? order by id desc limit ?"
        with self._lock:
            rows = self._db.execute(query, (*states, before or 1 << 62, most)).fetchall()
            found = {job.id: job for job in map(self._job, rows)}
            # Those the file still has under their old state.
            for number in self._unsaved:
                if number < (before or 1 << 62):
                    found[number] = self.get(number)
        jobs = [job for job in found.values() if not states or job.state in states]
        return sorted(jobs, key=lambda job: -job.id)[:most]

    def waiting(self) -> list[Job]:
        """Return the queued jobs, the oldest first."""
        return self.newest((QUEUED,), most=1 << 30)[::-1]

    def start(self, number: int) -> Job:
        """Note that a job runs."""
        with self._lock:
            job = self.get(number)
            # A job that is begun again after a restart keeps its first start.
            began = job.started
            if began is None:
                began = time.time()
            return self._change(number, state=RUNNING, starts=job.starts + 1, started=began)

    def end(self, number: int, state: str, result: Json = None, error: str | None = None) -> Job:
        """Note how a job ended, with the progress that it had."""
        with self._lock:
            progress = self._live.pop(number, None) or self.get(number).progress
            return self._change(
                number,
                state=state,
                result=json.dumps(result),
                error=error,
                progress=json.dumps(progress),
                finished=time.time(),
            )

    def cancel(self, number: int) -> Job:
        """Note that a job shall end; one that waits is ended at once."""
        with self._lock:
            job = self.get(number)
            if job.state == QUEUED:
                return self.end(number, CANCELLED)
            if job.state == RUNNING:
                return self._change(number, cancel=1)
            return self._touch(number)

    def save(self) -> bool:
        """Try to write what could not be written; return whether all is durable now."""
        with self._lock:
            for number in list(self._unsaved):
                self._write_change(number)
            return not self._unsaved

    def _change(self, number: int, **values: object) -> Job:
        """Change columns of a job, in memory first, so that what a full disk refuses is not lost."""
        with self._lock:
            self._unsaved[number] = self._unsaved.get(number, {}) | values
            self._write_change(number)
            return self._touch(number)

    def _write_change(self, number: int) -> None:
        values = self._unsaved[number]
        columns = ", ".join(f"{name} = ?" for name in values)
        try:
            self._write(f"update job set {columns} where id = ?", *values.values(), number)
        except sqlite3.Error:
            return
        del self._unsaved[number]

    def show(self, number: int, progress: JsonObject) -> None:
        """Keep the progress of a running job, for whoever looks."""
        with self._lock:
            self._live[number] = progress
            self._tick(number)

    def changed(self, since: int) -> tuple[int, list[Job]]:
        """Return the clock and the jobs that changed after `since`, an earlier clock."""
        with self._lock:
            # A job counts once, with its last change; what lies between is no news any more.
            numbers = [n for n, clock in self._changed.items() if clock > since]
            return self._clock, [self.get(n) for n in sorted(numbers)]

    @property
    def clock(self) -> int:
        """A number that grows with every change, also over restarts."""
        return self._clock

    def _touch(self, number: int) -> Job:
        with self._lock:
            self._tick(number)
            return self.get(number)

    def _tick(self, number: int) -> None:
        self._clock = max(self._clock + 1, int(time.time() * 1000))
        self._changed[number] = self._clock

    def _write(self, query: str, *values: object) -> sqlite3.Cursor:
        with self._lock:
            return self._db.execute(query, values)

    def _job(self, row: sqlite3.Row) -> Job:
        raw = dict(row) | self._unsaved.get(row["id"], {})
        for name in JSON_COLUMNS:
            if raw[name] is not None:
                raw[name] = read_json(raw[name])
        raw["progress"] = self._live.get(raw["id"], raw["progress"])
        return Job(**raw)
