"""The oldest libraries that Headwater works with: older ones are named, not met as a crash."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

# As in pyproject.toml; a test holds them equal. What an extra brings is checked where it is imported.
LEAST = {
    "torch": "2.11",
    "zarr": "3.1.6",
    "numpy": "2",
    "xarray": "2025.6",
    "pyarrow": "16",
    "tokenizers": "0.20",
    "ray": "2.40",
    "obstore": "0.12",
    "fastapi": "0.120.1",
    "starlette": "0.49.1",
}
CORE = ("torch", "zarr", "numpy", "xarray", "pyarrow", "tokenizers")


class OldLibrary(RuntimeError):
    """A library is older than what Headwater works with; the message names both versions."""


def check_versions(*names: str) -> None:
    """Raise OldLibrary for the first of the named libraries that is too old; one that is missing is no concern here."""
    for name in names:
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        if _parts(found) < _parts(LEAST[name]):
            raise OldLibrary(
                f"{name} {found} is installed, but Headwater needs {LEAST[name]} or newer. Run "
                f"`pip install --upgrade '{name}>={LEAST[name]}'`."
            )


def _parts(text: str) -> tuple[int, ...]:
    """Read the numbers of a release, without what follows them: 2.13.0+cpu, 3.2.0rc1."""
    release = re.match(r"[\d.]*", text)
    numbers = [int(part) for part in (release[0] if release else "").split(".") if part]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
