"""What one extraction does once: it makes its plan, opens its text, and reads the manifest."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

import headwater
from headwater.benchmarks.breaking import faults
from headwater.extractor import resume
from headwater.extractor import run as driver
from headwater.extractor.plan import make_plan
from headwater.extractor.text import source as text
from headwater.extractor.text.documents import iter_documents
from headwater.store import reader
from headwater.store.manifest import read_manifest


@pytest.fixture
def calls(monkeypatch):
    """Count calls, under whichever module's name they are made."""
    counted = Counter()

    def count(module, name, function):
        def counting(*arguments, **options):
            counted[function.__name__] += 1
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, counting)

    for module in (driver, resume):
        count(module, "make_plan", make_plan)
    for module in (driver, reader):
        count(module, "read_manifest", read_manifest)
    count(text, "iter_documents", iter_documents)
    count(text.Source, "__init__", text.Source.__init__)
    return counted


def test_a_fresh_run_plans_once_and_opens_its_text_once(tmp_path, calls):
    config = faults.make_case(tmp_path)
    assert headwater.extract(config, lambda progress: None).complete.all()
    assert calls == {"make_plan": 1, "__init__": 1, "iter_documents": 1}


def test_a_resumed_run_reads_its_manifest_once_and_no_text(tmp_path, calls):
    config = faults.make_case(tmp_path)
    run = headwater.extract(config, lambda progress: None)
    for names, remove in (("finished", []), ("half", [0])):
        run.ledger.remove(*remove)
        calls.clear()
        assert headwater.extract(replace(config), lambda progress: None).complete.all(), names
        assert calls == {"make_plan": 1, "read_manifest": 1}, names
