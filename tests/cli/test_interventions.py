"""The commands plateau, patch and ablate: what they keep and print, and what they refuse before anything runs."""

import json

import numpy as np
import pytest

from headwater.analysis.engine.results import load


def test_plateau(cli, tiny_gpt2, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        '{"a": "the quick brown", "b": "the lazy dog", "label": "fox"}\n{"a": [1, 2, 3], "b": [4, 5]}\n'
    )
    answer = cli(
        "plateau",
        "--model",
        tiny_gpt2,
        "--pairs",
        pairs,
        "--steps",
        9,
        "--depths",
        "1,0",
        "--parts",
        "--heads",
        "--jacobian",
        1,
        "--paths",
        "linear,random",
        "--out",
        tmp_path / "out",
        "--json",
    )
    assert answer.code == 0, answer
    found = {one["analysis"]: one for one in json.loads(answer.out)}
    assert list(found) == ["plateau", "plateau_parts", "plateau_heads", "plateau_jacobian"]
    data = load(tmp_path / "out", "plateau")
    assert (
        data.pair.values[0] == "fox"
        and data.depth.values.tolist() == [0, 1]
        and data.sizes["step"] == 9
    )
    np.testing.assert_allclose(
        found["plateau"]["figures"]["width at the logits, linear"],
        data.width.sel(path="linear", output=-1).mean("pair"),
        1e-3,
    )
    np.testing.assert_allclose(found["plateau_parts"]["figures"]["width, all held"], 0.2, 1e-3)
    one = ("plateau", "--model", tiny_gpt2, "--a", "the dog", "--b", "the fox", "--steps", 5)
    printed = cli(*one, "--out", tmp_path / "o")
    assert printed.code == 0 and f"kept in {tmp_path / 'o.analysis' / 'plateau'}" in printed.out


def test_results_of_other_settings_are_neither_overwritten_nor_mixed(cli, tiny_gpt2, tmp_path):
    flags = (
        "plateau",
        "--model",
        tiny_gpt2,
        "--a",
        "the dog",
        "--steps",
        5,
        "--out",
        tmp_path / "o",
    )
    assert cli(*flags, "--b", "the fox", "--parts").code == 0
    first = load(tmp_path / "o", "plateau").load()
    again = cli(*flags, "--b", "the fox", "--parts")
    assert "earlier results" not in again.out
    other = cli(*flags, "--b", "the cat")
    names = sorted(path.name for path in (tmp_path / "o.analysis").iterdir())
    aside = f"plateau@{first.attrs['request']}"
    assert names == ["plateau", aside, f"plateau_parts@{first.attrs['request']}"]
    assert other.out.count("earlier results of other settings are kept in") == 2
    assert load(tmp_path / "o", aside).load().identical(first)
    assert not load(tmp_path / "o", "plateau").load().identical(first)


def test_patch(cli, tiny_gpt2, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"clean": [9, 2, 3], "corrupt": [9, 5, 3], "answer": 7, "wrong": 8}\n')
    answer = cli(
        "patch",
        "--model",
        tiny_gpt2,
        "--pairs",
        pairs,
        "--sites",
        "resid,z",
        "--by-head",
        "--edit",
        "mlp_out[0] scale=0.5",
        "--out",
        tmp_path / "out",
    )
    assert answer.code == 0 and "most restored by resid" in answer.out
    np.testing.assert_allclose(load(tmp_path / "out", "patch").resid[0, -1, -1], 1, 1e-4)


def test_ablate(cli, tiny_gpt2, tiny_text, tmp_path):
    run = tmp_path / "run"
    assert (
        cli(
            "extract", "--model", tiny_gpt2, "--text", tiny_text, "--seq-len", 16, "--out", run
        ).code
        == 0
    )
    answer = cli(
        "ablate",
        "--run",
        run,
        "--target",
        "resid[1] position=first dim=3",
        "--scales",
        "0,1,2",
        "--effects",
        "--repeated",
        "5,6+7",
        "--lengths",
        "4,8",
        "--max-sequences",
        3,
    )
    assert answer.code == 0, answer
    data = load(run, "ablate")
    np.testing.assert_allclose(data.loss[0, 1], data.loss_unchanged, 1e-6)
    np.testing.assert_allclose(data.dloss, data.dloss_check, 1e-5)
    assert data.attrs["n_sequences"] == 3 and load(run, "effects").total.shape == (2, 2)
    assert load(run, "repeated").repeated.values.tolist() == ["5", "6+7", "different"]
    text = cli(
        "ablate",
        "--model",
        tiny_gpt2,
        "--text",
        tiny_text,
        "--seq-len",
        16,
        "--target",
        "z[1]",
        "--sweep",
        "head",
        "--scales",
        0,
        "--out",
        tmp_path / "text",
    )
    assert text.code == 0 and load(tmp_path / "text", "ablate").target.values.tolist() == [
        "head 0",
        "head 1",
    ]


def test_bos_is_put_in_front_or_refused(cli, oracle, tmp_path):
    """A config may name an id outside its vocabulary: then --bos cannot be kept, and is not dropped."""
    oracle.gpt2(bos_token_id=50256, eos_token_id=50256).save_pretrained(tmp_path / "m")
    (tmp_path / "p.jsonl").write_text('{"a": [1, 2], "b": [3, 4]}\n')
    for flags in (["ablate", "--repeated", "5"], ["plateau", "--pairs", tmp_path / "p.jsonl"]):
        flags += ["--model", tmp_path / "m", "--bos", "--out", tmp_path / "out"]
        cli(*flags).error(2, "--bos: ", "no beginning-of-text token inside its vocabulary of 31")


@pytest.mark.parametrize(
    "flags, parts",
    [
        (["plateau"], ["--pairs", "--a"]),
        (["plateau", "--a", "the", "--b", "dog", "--steps", "2"], ["--steps", "from 3 on"]),
        (["plateau", "--a", "the", "--b", "dog", "--depths", "2"], ["out of range"]),
        (["plateau", "--a", "the", "--b", "dog", "--paths", "curved"], ["--paths", "slerp"]),
        (["plateau", "--a", "the", "--b", "dog", "--tau", "0.7"], ["--tau is 0.7"]),
        (["plateau", "--a", "the", "--b", "dog", "--compute", "int8"], ["'int8'"]),
        (["plateau", "--pairs", "missing.jsonl"], ["missing.jsonl"]),
        (["patch"], ["--pairs is missing"]),
        (["ablate"], ["--target"]),
        (["ablate", "--target", "z[0]"], ["--run, --tokens and --text"]),
        (["ablate", "--target", "z[9]", "--text", "x"], ["z[9]"]),
        (["ablate", "--target", "loss", "--text", "x"], ["loss"]),
        (["ablate", "--target", "z[0]", "--text", "x", "--scales", "a"], ["--scales is 'a'"]),
        (["ablate", "--repeated", "9999"], ["token ids from 0 to"]),
    ],
)
def test_what_the_commands_refuse(cli, tiny_gpt2, tiny_text, flags, parts):
    flags = [str(tiny_text) if flag == "x" else flag for flag in flags]
    cli(*flags, "--model", tiny_gpt2).error(2, *parts)
