"""Run the queue: as many jobs at once as memory and settings allow, each in a worker process, each to its one end."""

from __future__ import annotations

import json
import sqlite3
import threading
import traceback
from collections.abc import Mapping

from headwater.extractor.sites import RequestError
from headwater.extractor.units import show_bytes
from headwater.service.catalog import Catalog
from headwater.service.connections import BusyError
from headwater.service.documents import Json, JsonObject
from headwater.service.jobs.pool import EndingError, Outcome, WorkerProcess, Workers
from headwater.service.jobs.requests import resolve, run_name
from headwater.service.jobs.table import CANCELLED, DONE, FAILED, Job, JobQueue
from headwater.service.places import public
from headwater.service.settings import Settings

CANCEL_SECONDS = 30.0
PLAN_WAIT_SECONDS = 8.0
PAUSE_SECONDS = 5.0
RETRY_SECONDS = 2.0


class Executor:
    """Takes jobs from the queue. The server's end, of whatever kind, leaves them to the next start."""

    def __init__(self, settings: Settings, jobs: JobQueue, catalog: Catalog) -> None:
        self.settings = settings
        self.jobs = jobs
        self.catalog = catalog
        self.workers = Workers(settings.state / "work", (settings.local, *settings.models))
        self._wake = threading.Condition()
        self._closed = False
        # By number: the job, and its process once it has one.
        self._running: dict[int, tuple[Job, WorkerProcess | None]] = {}
        # Planning reads texts and loads torch: two at once leave the processor to jobs.
        self._planning = threading.BoundedSemaphore(2)
        self._thread = threading.Thread(target=self._schedule, daemon=True, name="jobs")

    def start(self) -> int:
        """Go on with what the last server left; return how many jobs that are."""
        n = self.jobs.recover()
        self._thread.start()
        return n

    def close(self) -> None:
        """Stop at once; running jobs stay marked as running, so that the next start goes on with them."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        self.workers.close()
        self._thread.join(5)

    def plan(self, kind: str, document: Mapping[str, Json]) -> tuple[str, JsonObject]:
        """Return the run that a job is about, and its price; raise ValueError for a job that cannot be done."""
        resolved = resolve(self.settings, kind, document)
        if not self._planning.acquire(timeout=PLAN_WAIT_SECONDS):
            raise BusyError("other jobs are being planned. Submit this one again in a moment.")
        try:
            worker = self.workers.take()
            try:
                request = {"do": "plan", "id": 0, "kind": kind, "document": resolved}
                outcome = worker.call(request, lambda _: None, self.settings.limits.plan_seconds)
            finally:
                self.workers.give_back(worker)
        finally:
            self._planning.release()
        if outcome.kind != "done":
            raise RequestError(public(str(outcome.value), self.settings.root))
        price: JsonObject = outcome.value
        if price["host_bytes"] > self.settings.memory:
            raise RequestError(
                f"this job needs {show_bytes(price['host_bytes'])} of memory, but the server gives all jobs together "
                f"{show_bytes(self.settings.memory)}. Use a smaller block, fewer sites or fewer workers."
            )
        return run_name(self.settings, kind, resolved), price

    def submit(
        self, kind: str, document: Mapping[str, Json], run: str, price: Mapping[str, Json]
    ) -> tuple[Job, bool]:
        """Put a planned job into the queue; return it and whether it is new."""
        if len(self.jobs.waiting()) >= self.settings.limits.queued:
            raise RequestError(
                f"{self.settings.limits.queued} jobs are waiting. Cancel some, or come back later."
            )
        job, new = self.jobs.add(kind, document, run, price)
        with self._wake:
            self._wake.notify_all()
        return job, new

    def cancel(self, number: int) -> Job:
        """End a job; a run that it was making can be resumed. One that has ended stays as it is."""
        with self._wake:
            job = self.jobs.cancel(number)
            _, worker = self._running.get(number, (None, None))
        # Asked first, so that what is under way can end well; a C call that does not return is killed.
        if worker is not None:
            worker.cancel(number)
            timer = threading.Timer(CANCEL_SECONDS, self._insist, (number, worker))
            timer.daemon = True
            timer.start()
        return job

    def _insist(self, number: int, worker: WorkerProcess) -> None:
        with self._wake:
            if self._running.get(number, (None, None))[1] is worker:
                worker.kill()

    def _schedule(self) -> None:
        with self._wake:
            while not self._closed:
                try:
                    saved = self.jobs.save()
                    job = self._next()
                    if job is not None:
                        self._running[job.id] = (job, None)
                        self._begin(job)
                        continue
                # No disk, or no thread: later perhaps.
                except (sqlite3.Error, RuntimeError):
                    traceback.print_exc()
                    saved = False
                pause = PAUSE_SECONDS if saved else RETRY_SECONDS
                self._wake.wait(pause)

    def _begin(self, job: Job) -> None:
        thread = threading.Thread(target=self._run, args=(job,), daemon=True, name=f"job {job.id}")
        try:
            thread.start()
        except RuntimeError:
            del self._running[job.id]
            raise

    def _next(self) -> Job | None:
        """Return the oldest job if there is room for it; no job writes or reads a run beside its writer."""
        if len(self._running) >= self.settings.parallel:
            return None
        used = sum(job.price["host_bytes"] for job, _ in self._running.values())
        busy = {job.run for job, _ in self._running.values()}
        for job in self.jobs.waiting():
            if job.run in busy:
                continue
            # A job that does not fit waits for room, and those after it wait with it: else small jobs would keep a
            # large one waiting for ever. Alone it may run in any case; planning has compared it with the memory.
            if self._running and used + job.price["host_bytes"] > self.settings.memory:
                return None
            return job
        return None

    def _run(self, job: Job) -> None:
        """Run one job to its end, whatever that is, and note it unless the server is ending."""
        try:
            outcome = self._outcome(job)
        except EndingError:
            outcome = None
        except (ValueError, LookupError) as error:
            outcome = Outcome("refused", str(error))
        # A damaged run, a full disk: the next job may be luckier.
        except Exception as error:
            traceback.print_exc()
            outcome = Outcome("failed", str(error) or repr(error))
        with self._wake:
            try:
                if outcome is not None and not self._closed:
                    self._end(job, outcome)
            except Exception as error:
                traceback.print_exc()
                self.jobs.end(job.id, FAILED, error=f"its end could not be noted: {error!r}")
            finally:
                self._running.pop(job.id, None)
                self._wake.notify_all()

    def _outcome(self, job: Job) -> Outcome:
        """Give a job to a worker; return how it ended."""
        # Again, since links and runs may have changed while the job waited.
        resolved = resolve(self.settings, job.kind, job.document)
        worker = self.workers.take()
        try:
            with self._wake:
                if self.jobs.get(job.id).state == CANCELLED:
                    return Outcome("cancelled", None)
                self._running[job.id] = (job, worker)
                self.jobs.start(job.id)
            request = {"do": "run", "id": job.id, "kind": job.kind, "document": resolved}
            outcome = worker.call(request, lambda progress: self.jobs.show(job.id, progress), None)
            # It may have been interrupted while it imported something, which nobody can repair.
            if outcome.kind == "cancelled":
                worker.kill()
            return outcome
        finally:
            self.workers.give_back(worker)

    def _end(self, job: Job, outcome: Outcome) -> None:
        # Cancelled before it began.
        if self.jobs.get(job.id).state == CANCELLED:
            return
        if outcome.kind == "done":
            result = json.loads(public(json.dumps(outcome.value), self.settings.root))
            if job.kind == "verify" and not result["quick"]:
                self.catalog.set_damage(
                    job.run,
                    {
                        "checked": "every byte",
                        "n_problems": result["n_problems"],
                        "problems": result["problems"],
                    },
                )
            self.jobs.end(job.id, DONE, result)
        elif outcome.kind == "cancelled" or self.jobs.get(job.id).cancel:
            self.jobs.end(job.id, CANCELLED)
        else:
            error = None
            if outcome.value is not None:
                error = public(str(outcome.value), self.settings.root)
            self.jobs.end(job.id, FAILED, error=error)
