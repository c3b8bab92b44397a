"""Sites are found under Headwater's and TransformerLens's names, and a request selects what it says."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.extractor.selection import Selection, parse_indices, select
from headwater.extractor.sites import PRESETS, SITES, RequestError, parse_site, split_names

SMALL = SimpleNamespace(n_layer=6, n_head=4)
NAMES = {
    "blocks.3.hook_resid_post": ("resid", 4),
    "resid_post.3": ("resid", 4),
    "resid_post[3]": ("resid", 4),
    "blocks.3.hook_resid_pre": ("resid", 3),
    "resid_pre.0": ("resid", 0),
    "resid.4": ("resid", 4),
    "resid[6]": ("resid", 6),
    "resid": ("resid", None),
    " resid ": ("resid", None),
    "resid_pre": ("resid", None),
    "pattern.5": ("pattern", 5),
    "blocks.5.attn.hook_pattern": ("pattern", 5),
    "attn.hook_pattern": ("pattern", None),
    "hook_resid_mid": ("resid_mid", None),
    "hook_resid_mid.2": ("resid_mid", 2),
    "attn.hook_q": ("q", None),
    "hook_z": ("z", None),
    "blocks.0.hook_attn_out": ("attn_out", 0),
    "mlp.hook_post": ("mlp_post", None),
    "post.1": ("mlp_post", 1),
    "mlp_pre": ("mlp_pre", None),
    "ln1.hook_scale": ("ln1_scale", None),
    "blocks.2.ln2.hook_scale": ("ln2_scale", 2),
    "ln_final.hook_scale": ("ln_final_scale", None),
    "scale": ("ln_final_scale", None),
    "attn_logits.1": ("attn_scores", 1),
    "loss": ("loss", None),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_both_kinds_are_known(name):
    assert parse_site(name) == NAMES[name]


@given(st.sampled_from([site for site in SITES.values() if site.alias]), st.integers(0, 99))
def test_aliases_lead_back_to_their_site(site, n):
    index = None if site.axis is None else n
    assert parse_site(site.alias.format(n)) == (site.name, index)
    assert parse_site(site.alias.format(n).removeprefix(f"blocks.{n}.")) == (site.name, None)
    assert parse_site(f"{site.name}.{n}" if site.axis else site.name) == (site.name, index)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("patern", "did you mean 'pattern'"),
        ("", "there is no site ''"),
        ("hook_embed", "'hook_embed' is no site: it is a row of the weights"),
        ("mlp.hook_q", "there is no site 'mlp.hook_q'; did you mean"),
        ("blocks.1.resid", "there is no site 'blocks.1.resid'"),
        ("blocks.x.hook_z", "there is no site"),
        ("resid.-1", "there is no site"),
        (
            "resid_post",
            "'resid_post' needs its layer, as in resid_post.3; for all depths ask for 'resid'",
        ),
        ("loss.2", "'loss.2' names a layer, but loss has none. Ask for 'loss'"),
    ],
)
def test_other_names_are_refused(name, message):
    with pytest.raises(RequestError) as error:
        parse_site(name)
    assert message in str(error.value)


def test_sites_are_whole():
    assert all(name in SITES for names in PRESETS.values() for name in names)
    assert len({site.alias for site in SITES.values() if site.alias}) == len(
        [s for s in SITES.values() if s.alias]
    )
    assert split_names("a, b,,c ") == split_names(["a", " b", "", "c"]) == ("a", "b", "c")


@given(st.integers(1, 20), st.data())
def test_selections_are_python_slices(size, data):
    bound = st.none() | st.integers(-size, size)
    start, stop, step = data.draw(bound), data.draw(bound), data.draw(st.none() | st.integers(1, 5))
    single = data.draw(st.integers(-size, size - 1))
    shown = ["" if n is None else str(n) for n in (start, stop, step)]
    text = ":".join(shown[: 2 if step is None else 3])
    expected = {*range(size)[slice(start, stop, step)], range(size)[single]}
    assert parse_indices(f"{text}, {single}", size, "layers") == tuple(sorted(expected))


OUTLYING = (
    "",
    " ",
    ",",
    "1,",
    "a",
    "1-2",
    "1:2:0",
    "1:2:00",
    "1:2:-1",
    "1.5",
    "::",
    "--1",
    "7",
    "-7",
    "7:",
    ":8",
    "3:3",
    "last",
    "9" * 5000,
)


@pytest.mark.parametrize("text", OUTLYING, ids=lambda text: text[:9])
def test_malformed_and_outlying_selections_are_refused(text):
    with pytest.raises(RequestError, match="--layers"):
        parse_indices(text, 6, "layers")


def test_a_request_is_resolved():
    whole = select(SMALL, 16, ["pattern", "resid"])
    assert whole == Selection(
        ("resid", "pattern"), tuple(range(6)), tuple(range(7)), (0, 1, 2, 3), None
    )
    part = select(SMALL, 16, ["z", "resid"], "0,-1", "2:4", "1", "last")
    assert part == Selection(("resid", "z"), (0, 5), (2, 3), (1,), (-1,))
    assert (
        part.along("layer") == (0, 5) and part.along("depth") == (2, 3) and part.along(None) == (0,)
    )
    assert select(SMALL, 16, ["resid"], positions="-1,:2").positions == (0, 1, 15)
    assert select(SMALL, 16, ["resid"], ":", positions=" : ") == replace(whole, sites=("resid",))


def test_names_with_a_layer_select_it():
    chosen = select(
        SMALL, 16, ["blocks.3.hook_resid_post", "resid.0", "pattern.5", "pattern.5", "loss"]
    )
    assert (chosen.sites, chosen.layers, chosen.depths) == (
        ("resid", "pattern", "loss"),
        (5,),
        (0, 4),
    )


@pytest.mark.parametrize(
    ("sites", "selection", "message"),
    [
        ([], {}, "no site was asked for"),
        (
            ["pattern.6"],
            {},
            "--sites 'pattern.6' is layer 6, which is out of range; there are 6 layers, 0 to 5",
        ),
        (["resid_post.6"], {}, "--sites 'resid_post.6' is depth 7"),
        (
            ["pattern.1", "q"],
            {},
            "'pattern.1' is named with its layer and cannot be combined with 'q'",
        ),
        (["pattern.1"], {"layers": "2"}, "cannot be combined with --layers"),
        (
            ["resid"],
            {"layers": "2"},
            "--layers '2' would select nothing: resid has no layers. Use --depths",
        ),
        (
            ["q", "k"],
            {"depths": "2"},
            "--depths '2' would select nothing: none of q, k has depths. Use --layers",
        ),
        (["loss"], {"heads": "2"}, "loss has no heads. Leave it out"),
        (["loss", "pattern"], {"positions": "2"}, "has positions to select"),
        (["resid"], {"positions": "16"}, "there are 16 positions, 0 to 15"),
        (["resid"], {"depths": ""}, "--depths ''"),
    ],
)
def test_requests_that_do_not_fit_are_refused(sites, selection, message):
    with pytest.raises(RequestError) as error:
        select(SMALL, 16, sites, **selection)
    assert message in str(error.value)
