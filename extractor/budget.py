"""Refuse a run that this machine cannot hold, before it is begun: its disk and its memory against the plan."""

from __future__ import annotations

from headwater.extractor.machine import available_memory
from headwater.extractor.plan import Plan
from headwater.extractor.sites import RequestError
from headwater.extractor.units import show_bytes
from headwater.store.place import PlaceLike, place_of

ENDLESS = 1 << 62


def check_resources(plan: Plan, out: PlaceLike, done: float = 0.0, at_least: bool = False) -> None:
    """Refuse a run that the disk or the memory cannot hold, with both numbers; `done` is the share that is there.

    `at_least` says that the plan is a lower bound, made before the sequences are counted.

    An array with a codec does not count, since nobody knows what is left of it.
    """
    needed = int(plan.certain_bytes * (1 - done))
    free = free_disk(out)
    if needed > free:
        bound = "at least " if at_least else ""
        raise RequestError(
            f"the run needs {bound}{show_bytes(needed)} on disk, but the disk of {out} has "
            f"{show_bytes(free)} free. Ask for fewer sites, layers or sequences (--preset statistics is about 85 times "
            "smaller than patterns), or choose another --out."
        )
    memory = available_memory()
    if plan.host_bytes > memory and not plan.elsewhere:
        raise RequestError(
            f"the run needs {show_bytes(plan.host_bytes)} of memory, but {show_bytes(memory)} are available. Use a "
            f"smaller --block than {plan.geometry.block}, fewer sites or --workers, or a smaller model, or end other "
            "programs."
        )


def free_disk(out: PlaceLike) -> int:
    """Return the free bytes of the file system that will hold `out`; an object store has no end."""
    free = place_of(out).free_bytes()
    return ENDLESS if free is None else free
