"""Attention over pages against a sequence at a time in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.kernels import device
from jaxscale.kernels.attention import api as attention_api
from jaxscale.kernels.paged_attention import api as paged_api
from jaxscale.kernels.paged_attention.api import ragged_attention
from jaxscale.ops import device as ops_device
from jaxscale.ops.attention import AttentionContext, BlockLayout, paged, paged_kernels
from jaxscale.ops.attention.paged_cache import PagedCache, RaggedRows, empty_pages

PAGE, N, K, H = 4, 4, 2, 8
# (tokens in the cache before, new tokens, pages); the first two decode.
SEQUENCES = [(6, 1, [7, 2]), (0, 1, [5]), (3, 5, [1, 4]), (0, 7, [6, 3])]
NUM_SINGLE, NUM_PAGES = 3, 9
T = 16  # 14 tokens, and 2 of padding


def softmax_attention(q, k, v, *, window=None, softcap=None, scale=None):
    """The last queries of one sequence, [t, N, H] over [s, K, H], in float64."""
    first = len(k) - len(q)
    out = np.zeros_like(q)
    for i, query in enumerate(q):
        low = 0 if window is None else max(first + i - window + 1, 0)
        for head in range(N):
            keys = k[low : first + i + 1, head // (N // K)]
            values = v[low : first + i + 1, head // (N // K)]
            logits = keys @ query[head] * (H**-0.5 if scale is None else scale)
            if softcap is not None:
                logits = softcap * np.tanh(logits / softcap)
            weights = np.exp(logits - logits.max())
            out[i, head] = weights @ values / weights.sum()
    return out


def layout():
    """(rows, positions [T], the tokens of each sequence) of SEQUENCES."""
    slots, positions = np.zeros(T, np.int32), np.full(T, -1, np.int32)
    segments, table = np.zeros(T, np.int32), np.zeros((NUM_SINGLE, 2), np.int32)
    prompt_pages, page_segments, first_pages, own, at = [], [], [0], [], 0
    for number, (before, new, pages) in enumerate(SEQUENCES):
        tokens, where = np.arange(at, at + new), before + np.arange(new)
        positions[tokens] = where
        slots[tokens] = np.asarray(pages)[where // PAGE] * PAGE + where % PAGE
        if new == 1:
            table[number, : len(pages)] = pages
        else:
            segments[tokens] = segment = number - 1
            first_pages.append(len(prompt_pages))
            prompt_pages += pages
            page_segments += [segment] * len(pages)
        own.append(tokens)
        at += new
    margin = [0]
    prompt_pages, page_segments = prompt_pages + margin, page_segments + margin
    arrays = (slots, table, segments, prompt_pages, page_segments, first_pages)
    return RaggedRows(*(jnp.asarray(each, jnp.int32) for each in arrays)), positions, own


@pytest.mark.parametrize(
    "settings",
    [{}, {"window": 4}, {"softcap": 1.5, "scale": 0.6}],
    ids=["full", "window", "soft-cap"],
)
def test_mixed_tokens_attend_to_their_own_sequence(settings):
    rng = np.random.default_rng(0)
    rows, positions, own = layout()
    new = {name: rng.normal(size=(T, heads, H)) for name, heads in zip("qkv", (N, K, K))}
    old = {name: rng.normal(size=(NUM_PAGES, PAGE, K, H)) for name in "kv"}
    cache = PagedCache(*(jnp.asarray(old[name], jnp.float32) for name in "kv"))
    context = AttentionContext(jnp.asarray(positions)[None], **settings)
    attend = jax.jit(functools.partial(paged.attend, rows=rows))
    arrays = [jnp.asarray(new[name], jnp.float32)[None] for name in "qkv"]
    o, cache = attend(*arrays, context, cache)
    for (before, _, pages), tokens in zip(SEQUENCES, own, strict=True):
        whole = {}
        for name in "kv":
            cached = old[name][pages].reshape(-1, K, H)[:before]
            whole[name] = np.concatenate([cached, new[name][tokens]])
            written = np.asarray(getattr(cache, name))[pages].reshape(-1, K, H)
            np.testing.assert_allclose(written[: len(whole[name])], whole[name], rtol=1e-6)
        wanted = softmax_attention(new["q"][tokens], whole["k"], whole["v"], **settings)
        np.testing.assert_allclose(np.asarray(o)[0, tokens], wanted, atol=2e-6)
    untouched = np.asarray(cache.k)[8]
    np.testing.assert_array_equal(untouched, old["k"][8].astype(np.float32))


@pytest.mark.parametrize("window", [None, 4])
def test_the_intervals_of_the_kernel_are_the_keys_that_tokens_of_prompts_see(window):
    rows, positions, own = layout()
    context = AttentionContext(jnp.asarray(positions)[None], window=window)
    low, high = map(np.asarray, paged_kernels.key_intervals(context, rows, PAGE))
    places = np.asarray(rows.prompt_pages)
    for (_, _, pages), tokens in zip(SEQUENCES, own, strict=True):
        for token in tokens if len(tokens) > 1 else ():
            seen = np.arange(low[token], high[token])
            position = positions[token]
            first = 0 if window is None else max(position - window + 1, 0)
            wanted = np.arange(first, position + 1)
            np.testing.assert_array_equal(places[seen // PAGE], np.asarray(pages)[wanted // PAGE])
            np.testing.assert_array_equal(seen % PAGE, wanted % PAGE)
    is_of_prompt = np.asarray(rows.segments) > 0
    assert (high[~is_of_prompt] <= low[~is_of_prompt]).all()


@pytest.mark.parametrize("window", [None, 4])
def test_the_intervals_of_the_kernel_are_the_keys_that_decoding_tokens_see(window):
    rows, positions, _ = layout()
    context = AttentionContext(jnp.asarray(positions)[None], window=window)
    low, high = map(np.asarray, paged_kernels._single_intervals(context, rows))
    # The first two sequences decode behind 6 tokens and behind none; the third is a prompt.
    np.testing.assert_array_equal(low, [0 if window is None else 3, 0, 0])
    np.testing.assert_array_equal(high, [7, 1, 0])


def test_the_sequences_of_the_one_launch_are_those_of_the_rows():
    rng = np.random.default_rng(0)
    rows, positions, own = layout()
    old = {name: rng.normal(size=(NUM_PAGES, PAGE, K, H)) for name in "kv"}
    q = rng.normal(size=(T, N, H))
    listed, sequences = jax.jit(paged_kernels.sequences_of)(rows, jnp.asarray(positions))
    settings = dict(num_single=NUM_SINGLE, scale=H**-0.5, implementation="reference")
    arrays = [jnp.asarray(each, jnp.float32) for each in (q, old["k"], old["v"])]
    run = jax.jit(functools.partial(ragged_attention, **settings))
    o = np.asarray(run(*arrays, listed, sequences))
    for (before, new, pages), tokens in zip(SEQUENCES, own, strict=True):
        k, v = (old[name][pages].reshape(-1, K, H)[: before + new] for name in "kv")
        np.testing.assert_allclose(o[tokens], softmax_attention(q[tokens], k, v), atol=2e-6)
    assert not o[positions < 0].any()


@pytest.mark.parametrize(
    ("capability", "page_size", "has_prompts", "blocks", "chosen"),
    [
        ("9.0", 64, True, None, "ragged"),
        ("9.0", 64, False, None, "mosaic"),
        ("8.0", 64, True, None, "triton"),
        ("8.9", 16, False, None, "triton"),
        ("8.9", 24, False, None, "reference"),
        ("7.5", 64, False, None, "reference"),
        ("9.0", 64, True, BlockLayout(), "ragged"),
        ("9.0", 64, False, BlockLayout(), "mosaic"),
        ("9.0", 128, True, None, "ragged"),
        ("9.0", 128, True, BlockLayout(), "reference"),
        ("8.9", 16, True, BlockLayout(), "triton"),
    ],
)
def test_the_device_decides_who_reads_the_pages(
    capability, page_size, has_prompts, blocks, chosen, monkeypatch, caplog
):
    if capability == "9.0" and jax.__version_info__ < (0, 11):
        pytest.skip("the kernel for Hopper GPUs refuses jax 0.10")
    monkeypatch.setattr(device, "compute_capability", lambda: capability)
    for module in (ops_device, attention_api, paged_api):
        monkeypatch.setattr(module, "missing", lambda: None)
    q = jnp.zeros((1, 64, 8, 128), jnp.bfloat16)
    pages = jnp.zeros((2, page_size, 4, 128), jnp.bfloat16)
    context = AttentionContext(jnp.zeros((1, 64), jnp.int32), layout=blocks)
    with caplog.at_level("INFO", logger="jaxscale"):
        found = paged._choose(q, context, PagedCache(pages, pages), has_prompts=has_prompts)
    assert found == chosen
    assert f"paged attention: backend {chosen} for bfloat16" in caplog.text
    what = "all blocks and hides some" if chosen == "reference" else "the blocks that heads see"
    assert (f"it reads {what}" in caplog.text) == (blocks is not None)


def test_the_cache_is_written_in_place():
    """A copy of it would stand among the temporaries."""
    rows, *_ = layout()
    shape = (4096, PAGE, K, H)
    cache = PagedCache(*(jax.ShapeDtypeStruct(shape, "float32"),) * 2)
    arrays = [jax.ShapeDtypeStruct((1, T, heads, H), "float32") for heads in (N, K, K)]
    context = AttentionContext(jax.ShapeDtypeStruct((1, T), "int32"))

    def step(cache, q, k, v, context):
        return paged.attend(q, k, v, context, cache, rows=rows)

    lowered = jax.jit(step, donate_argnums=0).lower(cache, *arrays, context)
    memory = lowered.compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * np.prod(shape) / 2
    assert memory.alias_size_in_bytes >= 2 * 4 * np.prod(shape)


@pytest.mark.parametrize(("dtype", "error"), [("int8", 0.02), ("float8_e4m3fn", 0.12)])
def test_a_cache_of_8_bits_is_that_of_rounded_keys_and_values(dtype, error):
    """Old and new tokens; what is read back is off by half a step of each token's own scale."""
    rng = np.random.default_rng(0)
    rows, positions, _ = layout()
    q, k, v = (
        jnp.asarray(rng.normal(size=(1, T, heads, H)) * 10.0 ** rng.integers(-3, 3), jnp.float32)
        for heads in (N, K, K)
    )
    context = AttentionContext(jnp.asarray(positions)[None], scale=1.0 / float(jnp.abs(k).max()))
    attend = jax.jit(functools.partial(paged.attend, rows=rows))
    outputs = []
    for kind in ("float32", dtype):
        cache = empty_pages(NUM_PAGES, PAGE, K, H, kind)
        o, cache = attend(q, k, v, context, cache)
        outputs.append(np.asarray(o)[0][positions >= 0])
    assert cache.k.values.dtype == dtype and cache.k.scales.shape == (NUM_PAGES, 1, K, PAGE)
    scale = np.abs(outputs[0]).max()
    np.testing.assert_allclose(outputs[1] / scale, outputs[0] / scale, atol=error)
