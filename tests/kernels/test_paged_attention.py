"""Attention over pages: every backend against float64; the GPU kernel is interpreted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.kernels.attention.api import attention
from jaxscale.kernels.paged_attention import pallas
from jaxscale.kernels.paged_attention.api import BACKENDS, paged_attention, refusal
from tests.kernels.interpretation import (
    INTERPRET,
    assert_norm_close,
    interpret_of,
    long_but,
    lower_for_gpu,
    skip_unless_runnable,
)

IS_NEW = jax.__version_info__ >= (0, 11)
TOLERANCE = 4e-3  # of the norm, in bfloat16
# D, pages, P, page size, N, K, H, dtype, softcap, window
CASES = {
    "grouped heads": (3, 9, 4, 64, 4, 2, 64, "bfloat16", None, None),
    "window and soft-cap": (2, 5, 2, 64, 2, 1, 128, "float16", 1.5, 50),
    "one sequence, streams": (1, 7, 6, 64, 8, 1, 64, "bfloat16", None, None),
    "long stream": (2, 11, 8, 64, 2, 1, 128, "bfloat16", None, None),
    "heads that share a tile": (2, 5, 2, 64, 8, 4, 64, "bfloat16", None, None),
    "pages of int8": (2, 5, 2, 64, 2, 1, 128, "bfloat16", None, None),
    "pages of float8": (2, 5, 2, 64, 2, 1, 128, "bfloat16", None, None),
    "pages of 128": (2, 5, 2, 128, 2, 2, 64, "bfloat16", None, None),
}

NARROW = {"pages of int8": "int8", "pages of float8": "float8_e4m3fn"}


def draw(case):
    """(q, k_pages, v_pages, block_table, low, high), settings."""
    num, num_pages, width, page, heads, kv_heads, dim, dtype, softcap, window = CASES[case]
    rng = np.random.default_rng(0)
    q = rng.normal(size=(num, heads, dim))
    pages = [rng.normal(size=(num_pages, page, kv_heads, dim)) for _ in range(2)]
    table = np.stack([rng.permutation(num_pages)[:width] for _ in range(num)])
    # The first sequence is as long as it may be; if there are three, the last sees nothing.
    high = np.asarray([width * page, page // 2 + 7, 0][:num])
    low = np.zeros_like(high) if window is None else np.maximum(high - window, 0)
    arrays = [jnp.asarray(q, dtype), *(jnp.asarray(each, dtype) for each in pages)]
    scales = ()
    if case in NARROW:
        largest = 120 if NARROW[case] == "int8" else 400
        shape = (num_pages, 1, kv_heads, page)
        narrow = [np.clip(each * largest / 4, -largest, largest) for each in pages]
        arrays[1:] = [jnp.asarray(each, NARROW[case]) for each in narrow]
        sizes = [rng.uniform(0.5, 2, shape) * 4 / largest for _ in range(2)]
        scales = (tuple(jnp.asarray(each, "bfloat16") for each in sizes),)
    integers = [jnp.asarray(each, jnp.int32) for each in (table, low, high)]
    return (*arrays, *integers, *scales), dict(scale=dim**-0.5, softcap=softcap)


def expected(arrays, scale, softcap):
    """A sequence and a head at a time, in float64."""
    arrays, scales = arrays[:6], arrays[6:]
    q, k_pages, v_pages, table, low, high = (np.asarray(each, np.float64) for each in arrays)
    if scales:
        of_keys, of_values = (np.asarray(each, np.float64)[:, 0] for each in scales[0])
        k_pages = k_pages * np.moveaxis(of_keys, 1, 2)[..., None]
        v_pages = v_pages * np.moveaxis(of_values, 1, 2)[..., None]
    out = np.zeros_like(q)
    groups = q.shape[1] // k_pages.shape[2]
    for d, pages in enumerate(table.astype(int)):
        seen = slice(int(low[d]), int(high[d]))
        for head in range(q.shape[1]):
            keys, values = (
                each[pages, :, head // groups].reshape(-1, q.shape[2])[seen]
                for each in (k_pages, v_pages)
            )
            if not len(keys):
                continue
            logits = keys @ q[d, head] * scale
            if softcap:
                logits = softcap * np.tanh(logits / softcap)
            weights = np.exp(logits - logits.max())
            out[d, head] = weights @ values / weights.sum()
    return out


@pytest.mark.parametrize("case", long_but(CASES, ("grouped heads",)))
@pytest.mark.parametrize("implementation", BACKENDS)
def test_attention_over_pages(case, implementation):
    if implementation == "mosaic" and not IS_NEW:
        pytest.skip("the kernel needs jax 0.11")
    arrays, settings = draw(case)
    skip_unless_runnable(implementation)
    if refusal(implementation, *arrays[:2]):
        pytest.skip("the kernel does not take pages of 8 bits")
    interpret = interpret_of(implementation)
    o = paged_attention(*arrays, **settings, implementation=implementation, interpret=interpret)
    assert o.dtype == arrays[0].dtype
    assert_norm_close(o, expected(arrays, **settings), TOLERANCE)


@pytest.mark.skipif(not IS_NEW, reason="the kernel needs jax 0.11")
@pytest.mark.parametrize(
    "case", long_but(["long stream", "heads that share a tile"], ["long stream"])
)
def test_one_stream_a_sequence(case, monkeypatch):
    """As when there are many sequences, with more pages than shared memory holds, or fewer."""
    monkeypatch.setattr(pallas, "NUM_SMS", 1)
    arrays, settings = draw(case)
    o = paged_attention(*arrays, **settings, implementation="mosaic", interpret=INTERPRET)
    assert_norm_close(o, expected(arrays, **settings), TOLERANCE)


def test_what_the_kernel_cannot_do_is_said():
    (q, k_pages, v_pages, *rest), settings = draw("grouped heads")
    wide = [each.astype("float32") for each in (q, k_pages, v_pages)]
    with pytest.raises(ValueError, match="bfloat16 or both float16, here float32"):
        paged_attention(*wide, *rest, **settings, implementation="mosaic")
    assert "page size" in refusal("mosaic", q, k_pages[:, :16])
    assert "head_dim" in refusal("mosaic", q[..., :24], k_pages)
    with pytest.raises(ValueError, match="N % K == 0"):
        paged_attention(q[:, :3], k_pages, v_pages, *rest, **settings, implementation="reference")


@pytest.mark.skipif(not IS_NEW, reason="the kernel needs jax 0.11")
def test_it_lowers_for_a_gpu():
    arrays, settings = draw("grouped heads")

    def run(*arrays):
        return paged_attention(*arrays, **settings, implementation="mosaic")

    assert "mosaic_gpu" in lower_for_gpu(run, *arrays)


@pytest.mark.skipif(not IS_NEW, reason="the kernel needs jax 0.11")
def test_invariant_bits_are_those_of_the_kernel_for_prompts():
    """A decoding token has the bits of a prompt's last one, wherever its tile of queries ends."""
    rng, length, dim = np.random.default_rng(0), 200, 64
    q, k, v = (jnp.asarray(rng.normal(size=(1, 256, n, dim)), "bfloat16") for n in (2, 1, 1))
    asked = dict(scale=dim**-0.5, is_invariant=True, implementation="mosaic", interpret=INTERPRET)
    place = jnp.arange(256, dtype=jnp.int32)[None]
    high = jnp.where(place < length, place + 1, 0)
    of_prompt, _ = attention(q, k, v, jnp.zeros_like(high), high, **asked)
    pages = [each[0].reshape(4, 64, 1, dim) for each in (k, v)]
    last = jnp.asarray([199, 64, 3])
    table = jnp.tile(jnp.arange(4, dtype=jnp.int32), (3, 1))
    of_tokens = paged_attention(
        q[0, last], *pages, table, jnp.zeros(3, jnp.int32), last + 1, **asked
    )
    np.testing.assert_array_equal(of_tokens, of_prompt[0, last])
    with pytest.raises(ValueError, match="expected 'mosaic'"):
        attention(q, k, v, high, high, **asked | dict(implementation="reference"))
