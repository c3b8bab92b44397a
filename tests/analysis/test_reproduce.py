"""`headwater reproduce`: its machinery on small random models, and GPT-2's figures where the weights are given."""

import json
import os

import numpy as np
import pytest

import headwater
from headwater.analysis.studies import published, reproduce
from headwater.analysis.studies.published import Figure


def test_a_model_of_another_size_is_measured(cli, tiny_gpt2, tiny_text, tmp_path):
    answer = cli(
        "reproduce",
        "--model",
        tiny_gpt2,
        "--text",
        tiny_text,
        "--sequences",
        3,
        "--out",
        tmp_path,
        "--json",
    )
    assert answer.code == 0, answer.err
    rows = {(r["quantity"], *r["place"]): r for r in json.loads(answer.out)["rows"]}
    run = headwater.open_run(tmp_path / "reproduce-32")
    size = np.abs(run["resid"][2])
    np.testing.assert_allclose(rows["max_size", 1]["measured"], size.max(), 1e-6)
    np.testing.assert_allclose(rows["median_size", 1]["measured"], np.median(size), 1e-6)
    place = np.unravel_index(size.argmax(), size.shape)
    assert (rows["max_position", 1]["measured"], rows["max_dimension", 1]["measured"]) == place[1:]
    assert all(r["published"] is None and r["agrees"] is None for r in rows.values())
    table = cli(
        "reproduce", "--model", tiny_gpt2, "--text", tiny_text, "--sequences", 3, "--out", tmp_path
    )
    assert table.code == 0 and "nothing is published for a model of this size" in table.out
    assert "largest |resid_post|, layer 1" in table.out
    assert "last 32 of 32 positions, layer 1" in table.out
    assert "second half of 32 positions" in published.title_of("share_second_half", 32)
    assert "second half of 40 positions" in published.title_of("share_second_half_40", 1024)
    assert "512" not in table.out and "40 positions" not in table.out


def test_figures_are_compared_and_a_miss_fails(cli, tiny_gpt2, tiny_text, tmp_path, monkeypatch):
    arguments = (
        "reproduce",
        "--model",
        tiny_gpt2,
        "--text",
        tiny_text,
        "--sequences",
        2,
        "--out",
        tmp_path,
    )
    measured = {
        (r["quantity"], *r["place"]): r["measured"]
        for r in json.loads(cli(*arguments, "--json").out)["rows"]
    }
    largest, dimension = measured["max_size", 0], measured["max_dimension", 0]

    def publish(*figures):
        monkeypatch.setitem(published.PUBLISHED, (2, 16), figures)
        monkeypatch.setitem(published.COORDINATES, (2, 16), ())

    publish(Figure("max_size", (0,), largest * 1.08), Figure("max_dimension", (0,), dimension))
    answer = cli(*arguments)
    assert (
        answer.code == 0
        and answer.out.count("  agrees") == 3
        and "3 of 3 published figures agree" in answer.out
    )
    publish(Figure("max_size", (0,), largest * 1.2), Figure("max_dimension", (0,), dimension + 1))
    answer = cli(*arguments)
    assert answer.code == 1 and answer.out.count("  DIFFERS") == 2
    publish(Figure("share_second_half", (), 0.5))  # of 512 positions, where the model has 32
    answer = cli(*arguments)
    assert answer.code == 0 and "1 of 1 published figures agree" in answer.out
    cli("reproduce", "--model", tiny_gpt2, "--sequences", 0).error(2, "--sequences is 0")
    cli("reproduce", "--model", tmp_path / "nothing").error(2, "nothing")


def test_gpt2_small_has_a_place_for_every_published_figure():
    assert all(
        figure.quantity in published.TITLES
        for figures in published.PUBLISHED.values()
        for figure in figures
    )
    assert len(published.LAST_64) == 12


def test_gpt2_meets_its_published_figures(tmp_path):
    model = os.environ.get("HEADWATER_GPT2")
    if not model:
        pytest.skip(
            "GPT-2's weights are not given: set HEADWATER_GPT2 to their directory or hub id"
        )
    from importlib.resources import files

    rows = reproduce.reproduce(model, (str(files("pydoc_data") / "topics.py"),), tmp_path)
    assert rows and all(row.agrees for row in rows), [row for row in rows if not row.agrees]
