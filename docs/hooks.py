"""What mkdocs needs of pages that lie outside docs: it gets them as they are, with links that it can follow."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Where a file of the repository becomes a page of the site.
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "store/FORMAT.md": "reference/format.md",
    "extractor/demo/README.md": "reference/demo.md",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs."""
    for source, target in OUTSIDE.items():
        text = (ROOT / source).read_text("utf-8")
        files.append(File.generated(config, target, content=text))
    return files


def site_path(repository_path: str) -> str | None:
    """Return where a file of the repository lies on the site; None where it is not there."""
    if repository_path in OUTSIDE:
        return OUTSIDE[repository_path]
    if repository_path.startswith("docs/") and (ROOT / repository_path).is_file():
        inside = repository_path.removeprefix("docs/")
        return None if inside.endswith((".py", ".toml")) else inside
    return None


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at pages of the site; name the file where the site does not hold it."""
    here = page.file.src_uri
    sources = {target: source for source, target in OUTSIDE.items()}
    source = sources.get(here, f"docs/{here}")

    def rewritten(match: re.Match[str]) -> str:
        image, text, target, anchor = match.groups(default="")
        if ":" in target or target.startswith("/"):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        there = site_path(path)
        if there is None:
            return f"{text} (`{path}` in the repository)"
        relative = posixpath.relpath(there, posixpath.dirname(here) or ".")
        return f"{image}[{text}]({relative}{anchor})"

    return LINK.sub(rewritten, markdown)
