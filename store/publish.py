"""Write a run into an object store: stage 0 from a scratch directory, shards as their temporary files are finished."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from headwater.store.layout import ArraySpec
from headwater.store.manifest import Manifest, manifest_path
from headwater.store.objects import ObjectPath
from headwater.store.place import PlaceLike, place_of
from headwater.store.scratch import scratch_folder
from headwater.store.writer import INTERNAL, BlockWriter

UPLOADS = 4


def publish(made: Path, run: ObjectPath, manifest: Manifest) -> None:
    """Copy what stage 0 made in a scratch directory into the store, the manifest last: it commits the text."""
    # The order of a directory's stage 0. The list of what may come goes first, so that an interrupted copy can
    # be cleared; the manifest goes last, for it alone says that the text is whole. A PUT that was answered is
    # durable and visible whole: there is nothing to fsync or to rename.
    clear_unpublished(run)
    names = list(manifest.statics)
    (run / INTERNAL / "unfinished").write_bytes("".join(f"{name}\n" for name in names).encode())
    run.each(lambda name: (run / name).put_file(made / name), names)
    (run / INTERNAL / "manifest.json").put_file(made / INTERNAL / "manifest.json")
    (run / INTERNAL / "unfinished").unlink()


def clear_unpublished(run: ObjectPath) -> None:
    """Delete what an interrupted `publish` wrote, and nothing else."""
    # With a manifest stage 0 was committed, and a marker that is left is only late to be deleted.
    marker = run / INTERNAL / "unfinished"
    if not manifest_path(run).is_file() and marker.is_file():
        run.delete([run / name for name in marker.read_text().split("\n")[:-1]])


@contextmanager
def open_writer(
    run: PlaceLike, specs: Sequence[ArraySpec], block: int, n_threads: int = 1
) -> Iterator[BlockWriter]:
    """Open a writer for a run: into its directory, or through a scratch directory into an object store.

    `n_threads` write into a directory; UPLOADS threads into a store.
    """
    run = place_of(run)
    with ExitStack() as stack:
        if (prefix := run.remote) is not None:
            folder = stack.enter_context(scratch_folder("hw-shards-"))

            def send(finished: Path, path: str) -> None:
                (prefix / path).put_file(finished)
                finished.unlink()

            writer = BlockWriter(folder, specs, block, n_threads=UPLOADS, sink=send)
        else:
            assert run.local is not None
            writer = BlockWriter(run.local, specs, block, n_threads)
        stack.callback(writer.close)
        yield writer
