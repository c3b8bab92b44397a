"""Tiny random models of four architectures on the headwater attention against transformers' eager path."""

import pytest
import torch

from headwater.kernels import huggingface
from headwater.kernels.huggingface import collect, make_mask, register

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=50,
        n_positions=64,
        n_embd=48,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "llama": lambda: transformers.LlamaConfig(**SMALL, num_key_value_heads=2),
    "qwen2": lambda: transformers.Qwen2Config(
        **SMALL,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=7,
        max_window_layers=1,
    ),
    "neox": lambda: transformers.GPTNeoXConfig(**SMALL),
}


@pytest.fixture(scope="module")
def models():
    """Return architecture → (eager model, the same weights on headwater attention)."""
    register()
    made = {}
    for name, config in CONFIGS.items():
        pair = []
        for implementation in ("eager", "headwater"):
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(
                config(), attn_implementation=implementation
            )
            pair.append(model.eval())
        for parameter, other in zip(pair[0].parameters(), pair[1].parameters(), strict=True):
            parameter.data.mul_(3)
            other.data.copy_(parameter.data)
        made[name] = pair
    return made


def padded_mask(side):
    mask = torch.ones(2, 19, dtype=torch.long)
    mask[0, slice(0, 6) if side == "left" else slice(13, 19)] = 0
    return mask


TOKENS = torch.randint(3, 50, (2, 19), generator=torch.Generator().manual_seed(1))
INPUTS = {
    "plain": lambda: {},
    "left": lambda: {
        "attention_mask": padded_mask("left"),
        "position_ids": (padded_mask("left").cumsum(1) - 1).clamp(min=0),
    },
    "right": lambda: {"attention_mask": padded_mask("right")},
    "packed": lambda: {
        "position_ids": torch.cat([torch.arange(8), torch.arange(11)]).expand(2, -1)
    },
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", INPUTS)
@torch.no_grad()
def test_logits_and_attentions_agree_with_eager(models, name, kind):
    inputs = {"input_ids": TOKENS, "use_cache": False, "output_attentions": True, **INPUTS[kind]()}
    want, got = (model(**inputs) for model in models[name])
    real = inputs.get("attention_mask", torch.ones_like(TOKENS)).bool()
    torch.testing.assert_close(got.logits[real], want.logits[real], atol=1e-4, rtol=1e-4)
    assert len(got.attentions) == 2
    for a, b in zip(got.attentions, want.attentions, strict=True):
        assert a.shape == b.shape == (2, 4, 19, 19) and a.dtype == b.dtype
        torch.testing.assert_close(
            a.transpose(1, 2)[real], b.transpose(1, 2)[real], atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_padding_and_packing_matter(models, name):
    """Without the mask function these would agree, so the tests above would prove nothing."""
    plain = models[name][1](input_ids=TOKENS, use_cache=False).logits
    for kind in ("left", "packed"):
        inputs = INPUTS[kind]()
        other = models[name][1](input_ids=TOKENS, use_cache=False, **inputs).logits
        assert (plain[0, 10:] - other[0, 10:]).abs().max() > 1e-2


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["plain", "left"])
@torch.no_grad()
def test_generation_with_a_cache_agrees_with_eager(models, name, kind):
    mask = (
        {"attention_mask": padded_mask("left")}
        if kind == "left"
        else {"attention_mask": torch.ones_like(TOKENS)}
    )
    want, got = (
        model.generate(
            TOKENS,
            max_new_tokens=6,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **mask,
        )
        for model in models[name]
    )
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(
        torch.stack(got.logits), torch.stack(want.logits), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_chunked_prefill_with_a_cache_agrees_with_eager(models, name):
    outs = []
    for model in models[name]:
        first = model(input_ids=TOKENS[:, :9], use_cache=True)
        name = (
            "cache" if "cache" in first else "past_key_values"
        )  # what transformers calls it now, and before
        outs.append(model(input_ids=TOKENS[:, 9:], use_cache=True, **{name: first[name]}).logits)
    torch.testing.assert_close(outs[1], outs[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_statistics_are_those_of_the_eager_pattern(models, name):
    want = models[name][0](input_ids=TOKENS, use_cache=False, output_attentions=True)
    with collect() as layers:
        models[name][1](input_ids=TOKENS, use_cache=False)
    assert sorted(layers) == [0, 1]
    for layer, out in layers.items():
        p = want.attentions[layer]
        torch.testing.assert_close(out.column, p.sum(-2), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            out.row["attn_entropy"], -torch.special.xlogy(p, p).sum(-1), atol=1e-4, rtol=1e-3
        )
        torch.testing.assert_close(out.row["attn_max"], p.amax(-1), atol=1e-5, rtol=1e-4)
        assert out.pattern is None


def test_gradients_take_the_plain_path(models):
    losses = []
    for model in models["llama"]:
        model.zero_grad()
        loss = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
        loss.backward()
        losses.append((loss, model.model.layers[0].self_attn.q_proj.weight.grad))
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-3)
    with pytest.raises(RuntimeError, match="nothing can be collected"), collect():
        models["llama"][1](input_ids=TOKENS, use_cache=False)


def test_a_mask_that_is_no_range_falls_back():
    def holes(batch_idx, head_idx, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (kv_idx != 2)

    mask = make_mask(1, 5, 5, mask_function=holes)
    assert mask.shape == (1, 1, 5, 5) and mask[0, 0, 4].lt(-1).tolist() == [
        False,
        False,
        True,
        False,
        False,
    ]


def test_long_masks_are_read_in_blocks_of_rows():
    def window(batch_idx, head_idx, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (kv_idx > q_idx - 100)

    start = make_mask(2, 1100, 1100, mask_function=window)
    assert start.dtype == torch.int32
    assert torch.equal(start, (torch.arange(1100) - 99).clamp(min=0).int().expand(2, -1))


def test_masks_are_asked_for_by_positions_too(monkeypatch):
    """transformers before 5.4 passes cache_position to a mask function, and takes nothing else itself."""
    masks = pytest.importorskip("transformers.masking_utils")
    padding = torch.ones(2, 9, dtype=torch.bool)
    padding[1, :3] = False
    common = {"batch_size": 2, "kv_length": 9, "mask_function": masks.causal_mask_function}

    def by_positions(function):
        def take(*, cache_position=None, **options):
            if cache_position is None:  # eager_mask asks sdpa_mask
                return function(**options)
            n, first = len(cache_position), int(cache_position[0])
            return function(q_length=n, q_offset=first, **options)

        return take

    found = {}
    for first in (0, 5):  # a whole square, and the end of one behind a cache
        sizes = {"q_length": 9 - first, "q_offset": first}
        found[first] = make_mask(**common, **sizes, attention_mask=padding)
    for name in ("sdpa_mask", "eager_mask"):
        monkeypatch.setattr(masks, name, by_positions(getattr(masks, name)))
    for first, expected in found.items():
        positions = torch.arange(first, 9)
        old = make_mask(**common, cache_position=positions, attention_mask=padding)
        assert torch.equal(old, expected)


def test_an_old_transformers_is_named(monkeypatch):
    monkeypatch.setattr(huggingface, "version", lambda name: "4.56.2")
    with pytest.raises(ImportError, match=r"transformers 4\.56\.2 is installed.* needs 4\.57"):
        huggingface.register()
