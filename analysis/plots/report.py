"""A report of runs: one HTML page that holds its figures and asks for nothing from outside."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from headwater.analysis.engine.analysis import Shown
from headwater.analysis.engine.results import RunResults
from headwater.analysis.plots.catalogue import Drawn, draw
from headwater.analysis.plots.draw import render
from headwater.analysis.suite.registry import base_name, kinds, sections

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1b1b1b;max-width:58rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2.2rem;border-bottom:1px solid #ddd;padding-bottom:.2rem}
figure{margin:1.2rem 0}figure img{width:100%;height:auto}figcaption{font-size:.87rem;color:#444}
table{border-collapse:collapse;font-size:.85rem;margin:.8rem 0}
th,td{text-align:left;vertical-align:top;padding:.2rem .7rem .2rem 0}
thead th{border-bottom:1px solid #999}tr.new td{border-top:1px solid #ddd}td.text{font-family:ui-monospace,monospace}
mark{background:#ffd76a;border-radius:2px}i{color:#999;font-style:normal}summary{cursor:pointer;color:#0059a0}
details{font-size:.87rem;margin:.6rem 0}.number{font-variant-numeric:tabular-nums}.scroll{overflow-x:auto}
nav a{margin-right:.9rem;display:inline-block}
"""


def report(
    runs: Sequence[RunResults], skipped: Mapping[str, Mapping[str, str]] | None = None
) -> str:
    """Return a page with the provenance, figures and headline numbers of runs; ValueError where they hold no result.

    `skipped` names, for a run's label, analyses that could not be done and why.
    """
    drawn = draw(runs)
    labels = [run.label for run in runs]
    title = f"Headwater: {', '.join(labels[:4])}{' …' if len(labels) > 4 else ''}"
    made = [
        _section(at, heading, shown, runs, drawn)
        for at, (heading, shown) in enumerate(sections().items())
    ]
    there = [(at, heading) for at, heading in enumerate(sections()) if made[at]]
    nav = " ".join(f'<a href="#s{at}">{escape(heading)}</a>' for at, heading in there)
    missing = [
        (label, name, why)
        for label, reasons in (skipped or {}).items()
        for name, why in reasons.items()
    ]
    parts = [
        f"<h1>{escape(title)}</h1><nav>{nav}</nav><h2>The runs</h2>",
        _provenance(runs),
        *made,
    ]
    if missing:
        parts += ["<h2>What was left out</h2>", _table(("run", "analysis", "why"), missing)]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _section(
    at: int,
    heading: str,
    shown: Sequence[type[Shown]],
    runs: Sequence[RunResults],
    drawn: Sequence[Drawn],
) -> str:
    """Return a section: figures, what analyses show besides, headline numbers, and definitions; "" for nothing."""
    names = [kind.name for kind in shown]
    figures = "".join(_figure(one) for one in drawn if one.kind.name in names)
    numbers: list[tuple[str, ...]] = []
    notes = []
    pages = []
    for run in runs:
        for key, dataset in run.results.items():
            name = base_name(key)
            if name not in names:
                continue
            kind = kinds()[name]
            for label, value in kind.headline(dataset).items():
                numbers.append((run.label, key, label.replace("_", " "), _number(value)))
            notes.append(_notes(run.label, key, dataset))
            if page := kind.page(dataset):
                title = f"{escape(run.label)}: {escape(key)}"
                pages.append(f"<h3>{title}</h3><div class=scroll>{page}</div>")
    if not figures and not numbers and not pages:
        return ""
    table = ""
    if numbers:
        rows = _table(("run", "analysis", "figure", "value"), numbers)
        table = f"<div class=scroll>{rows}</div>"
    title = f'<h2 id="s{at}">{escape(heading)}</h2>'
    return "".join([title, figures, *pages, table, *notes])


def _figure(one: Drawn) -> str:
    data = base64.b64encode(render(one.figure, "svg")).decode("ascii")
    who = ", ".join(one.labels)
    alt = escape(f"{one.plot.name}: {who}", quote=True)
    return (
        f'<figure><img alt="{alt}" src="data:image/svg+xml;base64,{data}"><figcaption><b>{escape(who)}.</b> '
        f"{escape(one.plot.caption)}</figcaption></figure>"
    )


def _provenance(runs: Sequence[RunResults]) -> str:
    rows = []
    for run in runs:
        a = max(
            (one.attrs for one in run.results.values()),
            key=lambda attributes: "fingerprint" in attributes,
        )
        text = json.loads(a.get("text", "{}"))
        versions = json.loads(a.get("versions", "{}"))
        sources = text.get("sources", [])
        shown = ", ".join(str(s) for s in sources[:2]) + (
            f" and {len(sources) - 2} more" if len(sources) > 2 else ""
        )
        rows += [
            (run.label, "model", f"{a.get('model')} (weights {str(a.get('model_digest'))[:16]})"),
            (
                "",
                "text",
                f"{shown or 'none'}; {a.get('n_sequences', 0):,} sequences of {a.get('n_positions', 0):,}, "
                f"{a.get('n_tokens', 0):,} tokens{', partial' if a.get('partial') else ''}",
            ),
            ("", "run", f"{run.path}, fingerprint {str(a.get('fingerprint'))[:16]}"),
            (
                "",
                "analysed with",
                ", ".join(f"{name} {version}" for name, version in versions.items()),
            ),
        ]
    return _table(("run", "", ""), rows)


def _notes(label: str, key: str, dataset: Any) -> str:
    a = dataset.attrs
    said = f"<p>{escape(a['conventions'])}</p>"
    said += f"<p>Arguments: <code>{escape(a['arguments'])}</code>; passes: {a['passes']}.</p>"
    return f"<details><summary>{escape(label)}, {escape(key)}: definitions and arguments</summary>{said}</details>"


def _number(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_number, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th>{escape(str(name))}</th>" for name in heads)
    body = []
    last = None
    for row in rows:
        new = row[0] != last and row[0] != ""
        last = row[0] or last
        body.append(
            f"<tr{' class=new' if new else ''}>{''.join(f'<td class=number>{escape(str(c))}</td>' for c in row)}</tr>"
        )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
