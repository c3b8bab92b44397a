"""The script that made the demo model: it goes on from a checkpoint to the same weights, and its card is true."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from headwater.benchmarks.training import demo_card, train_demo
from headwater.benchmarks.training.demo_text import N_CTX
from headwater.extractor.model.hub import locate
from headwater.extractor.model.weights import load_checkpoint


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Train a tiny model on a little text."""
    text = "".join(f"def add_{i}(a, b):\n    return a + b * {i}\n" for i in range(200))
    monkeypatch.setattr(
        train_demo, "SHAPE", train_demo.SHAPE | {"n_layer": 1, "n_head": 2, "n_embd": 8}
    )
    monkeypatch.setattr(train_demo, "read_corpus", lambda root: ([text] * 6, [text]))
    threads = torch.get_num_threads()

    def run(name, *flags):
        common = [
            "--steps",
            "4",
            "--batch",
            "2",
            "--warmup",
            "2",
            "--checkpoint-every",
            "2",
            "--validate-every",
            "2",
        ]
        places = [
            "--out",
            str(tmp_path / name),
            "--checkpoint-dir",
            str(tmp_path / f"{name}-steps"),
        ]
        monkeypatch.setattr(sys, "argv", ["train_demo", *common, "--float32", *places, *flags])
        train_demo.main()
        return tmp_path / name

    yield run
    torch.set_num_threads(threads)


def test_training_goes_on_from_a_checkpoint_to_the_same_weights(train, tmp_path):
    whole = train("whole")
    again = train("again", "--resume", str(tmp_path / "whole-steps/step-2"))
    a, b = load_file(whole / "model.safetensors"), load_file(again / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    checkpoint = load_checkpoint(str(tmp_path / "whole-steps/step-4"))
    assert (
        checkpoint.tensors["wte.weight"].dtype == torch.float32 and checkpoint.tokenizer is not None
    )
    assert load_checkpoint(str(whole)).config == checkpoint.config
    facts = json.loads((whole / "training.json").read_text("utf-8"))
    assert facts["steps_done"] == 4 and facts["tokens"] == 4 * 2 * N_CTX
    shown = facts["weights_show"]
    assert (
        0 < shown["line_breaks_among_visible_keys"] < 1
        and len(shown["largest_residual_by_depth"]) == 2
    )
    assert f"{facts['val_loss']:.3f} nats" in (whole / "README.md").read_text("utf-8")


def test_packaged_card_tells_what_training_json_holds(tmp_path):
    """The card is written from training.json, and the weights are those of the card's size."""
    home = locate("demo")
    facts = json.loads((home / "training.json").read_text("utf-8"))
    demo_card.write_card(tmp_path, facts)
    for name in ("README.md", "training.json"):
        assert (tmp_path / name).read_bytes() == (home / name).read_bytes()
    checkpoint = load_checkpoint("demo")
    assert sum(t.numel() for t in checkpoint.tensors.values()) == facts["parameters"]
    assert (home / "model.safetensors").stat().st_size < 12e6
