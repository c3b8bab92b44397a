"""Run the queue: as many jobs at once as memory and settings allow, each in a worker process, each to its one end."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

from headwater.extractor.sites import RequestError
from headwater.extractor.units import show_bytes
from headwater.service.catalog import Catalog
from headwater.service.documents import resolve, run_name
from headwater.service.job_queue import CANCELLED, DONE, FAILED, Job, JobQueue
from headwater.service.places import public
from headwater.service.settings import Settings
from headwater.service.workers import Outcome, WorkerProcess, Workers

CANCEL_SECONDS, PLAN_WAIT_SECONDS = 30.0, 8.0


class BusyError(RuntimeError):
    """The server has no hand free for a request."""


class Executor:
    """Takes jobs from the queue. The server's end, of whatever kind, leaves them to the next start."""

    def __init__(self, settings: Settings, jobs: JobQueue, catalog: Catalog) -> None:
        self.settings, self.jobs, self.catalog = settings, jobs, catalog
        self.workers = Workers(settings.state / "work")
        self._wake, self._closed = threading.Condition(), False
        self._running: dict[int, tuple[Job, WorkerProcess | None]] = {}
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

    def plan(self, kind: str, document: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
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
        price: dict[str, Any] = outcome.value
        if price["host_bytes"] > self.settings.memory:
            raise RequestError(
                f"this job needs {show_bytes(price['host_bytes'])} of memory, but the server gives all jobs together "
                f"{show_bytes(self.settings.memory)}. Use a smaller block, fewer sites or fewer workers."
            )
        return run_name(self.settings, kind, resolved), price

    def submit(self, kind: str, document: Mapping[str, Any], run: str, price: Mapping[str, Any]) -> tuple[Job, bool]:
        """Put a planned job into the queue; return it and whether it is new."""
        if len(self.jobs.waiting()) >= self.settings.limits.queued:
            raise RequestError(f"{self.settings.limits.queued} jobs are waiting. Cancel some, or come back later.")
        job, new = self.jobs.add(kind, document, run, price)
        with self._wake:
            self._wake.notify_all()
        return job, new

    def cancel(self, number: int) -> Job:
        """End a job; a run that it was making can be resumed. One that has ended stays as it is."""
        with self._wake:
            job = self.jobs.cancel(number)
            _, worker = self._running.get(number, (None, None))
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
                job = self._next()
                if job is None:
                    self._wake.wait(5)
                    continue
                self._running[job.id] = (job, None)
                threading.Thread(target=self._run, args=(job,), daemon=True, name=f"job {job.id}").start()

    def _next(self) -> Job | None:
        """Return the oldest job if there is room for it; no job writes or reads a run beside its writer."""
        if len(self._running) >= self.settings.parallel:
            return None
        used = sum(job.price["host_bytes"] for job, _ in self._running.values())
        busy = {job.run for job, _ in self._running.values()}
        for job in self.jobs.waiting():
            if job.run in busy:
                continue
            fits = not self._running or used + job.price["host_bytes"] <= self.settings.memory
            return job if fits else None
        return None

    def _run(self, job: Job) -> None:
        """Run one job to its end, and note that end unless the server is ending."""
        worker = None
        try:
            resolved = resolve(self.settings, job.kind, job.document)
            worker = self.workers.take()
            with self._wake:
                if self.jobs.get(job.id).state == CANCELLED:
                    return
                self._running[job.id] = (job, worker)
                self.jobs.start(job.id)
            request = {"do": "run", "id": job.id, "kind": job.kind, "document": resolved}
            outcome = worker.call(request, lambda progress: self.jobs.show(job.id, progress), None)
            if outcome.kind == "cancelled":
                worker.kill()  # it may have been interrupted while it imported something, which nobody can repair
        except (ValueError, LookupError) as error:
            outcome = Outcome("refused", str(error))
        except RuntimeError:
            return
        finally:
            with self._wake:
                self._running.pop(job.id, None)
                closed = self._closed
                self._wake.notify_all()
            if worker is not None:
                self.workers.give_back(worker)
        if not closed:
            self._end(job, outcome)
        with self._wake:
            self._wake.notify_all()

    def _end(self, job: Job, outcome: Outcome) -> None:
        text = None if outcome.value is None else public(str(outcome.value), self.settings.root)
        if outcome.kind == "done":
            result = json.loads(public(json.dumps(outcome.value), self.settings.root))
            if job.kind == "verify" and not result["quick"]:
                self.catalog.set_damage(job.run, {"checked": "every byte", "n_problems": result["n_problems"],
                                                  "problems": result["problems"]})  # fmt: skip
            self.jobs.end(job.id, DONE, result)
        elif outcome.kind == "cancelled" or self.jobs.get(job.id).cancel:
            self.jobs.end(job.id, CANCELLED)
        else:
            self.jobs.end(job.id, FAILED, error=text)
