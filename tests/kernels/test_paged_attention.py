"""Attention over pages: every backend against float64; the GPU kernel is interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.kernels.attention.api import attention
from jaxscale.kernels.paged_attention import pallas
from jaxscale.kernels.paged_attention.api import (
    BACKENDS,
    RAGGED_BACKENDS,
    WRITING_BACKENDS,
    paged_attention,
    ragged_attention,
    ragged_refusal,
    refusal,
    write_and_attend,
    writing_refusal,
)
from jaxscale.kernels.paged_attention.ragged import Sequences
from tests.kernels.interpretation import (
    INTERPRET,
    assert_norm_close,
    in_one_program,
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
    "heads of 96": (2, 5, 4, 64, 4, 2, 96, "bfloat16", None, 90),
    "heads of 96, a head a group": (3, 4, 1, 64, 8, 8, 96, "bfloat16", None, None),
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


def expected(arrays, scale, softcap, mask=None):
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
        seen = np.arange(int(low[d]), int(high[d]))
        if mask is not None:
            seen = seen[mask[d * len(mask) // len(q), seen]]
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


@pytest.mark.parametrize("case", long_but(CASES, ("grouped heads", "heads of 96")))
@pytest.mark.parametrize("implementation", BACKENDS)
def test_attention_over_pages(case, implementation):
    if implementation == "mosaic" and not IS_NEW:
        pytest.skip("the kernel needs jax 0.11")
    arrays, settings = draw(case)
    skip_unless_runnable(implementation)
    if refusal(implementation, *arrays[:2]):
        pytest.skip("the kernel takes neither pages of 8 bits nor heads of 96")
    interpret = interpret_of(implementation)
    chosen = dict(implementation=implementation, interpret=interpret)
    run = functools.partial(paged_attention, **settings, **chosen)
    o = in_one_program(run, implementation)(*arrays)
    assert o.dtype == arrays[0].dtype
    assert_norm_close(o, expected(arrays, **settings), TOLERANCE)


@pytest.mark.parametrize("case", long_but(CASES, ("grouped heads", "window and soft-cap")))
@pytest.mark.parametrize("num_rows", [1, None])
@pytest.mark.parametrize("implementation", BACKENDS)
def test_any_set_of_keys_is_seen(implementation, num_rows, case):
    """By one mask for all sequences, or one each; a page between and the first row see none."""
    arrays, settings = draw(case)
    skip_unless_runnable(implementation)
    if refusal(implementation, *arrays[:2]):
        pytest.skip("the kernel takes neither pages of 8 bits nor heads of 96")
    q, k_pages, _, table, *_ = arrays
    page = k_pages.shape[1]
    mask = np.random.default_rng(1).random((num_rows or len(q), table.shape[1] * page)) < 0.3
    mask[:, -2 * page : -page] = False
    if num_rows is None and len(q) > 1:
        mask[0] = False
    interpret = interpret_of(implementation)
    chosen = dict(implementation=implementation, interpret=interpret)
    run = functools.partial(paged_attention, **settings, **chosen)
    o = in_one_program(run, implementation)(*arrays, mask=jnp.asarray(mask))
    assert_norm_close(o, expected(arrays, **settings, mask=mask), TOLERANCE)


def test_a_mask_that_does_not_fit_is_refused():
    arrays, settings = draw("grouped heads")
    for shape in ((2, 256), (3, 255)):
        with pytest.raises(ValueError, match=r"expected \[R, 256\] with D = 3 a multiple of R"):
            paged_attention(
                *arrays, mask=jnp.zeros(shape, bool), **settings, implementation="reference"
            )


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


@pytest.mark.parametrize("kv_heads", [4, pytest.param(8, marks=pytest.mark.long)])
@pytest.mark.parametrize("implementation", WRITING_BACKENDS)
def test_the_newest_key_is_written_and_seen(implementation, kv_heads):
    """Of sequences at the end of a page, at the beginning of one, and of padding."""
    if implementation == "mosaic" and not IS_NEW:
        pytest.skip("the kernel needs jax 0.11")
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(3, 8, 64)), "bfloat16")
    k_pages, v_pages = (rng.normal(size=(7, 64, kv_heads, 64)) for _ in range(2))
    pages = tuple(jnp.asarray(each, "bfloat16") for each in (k_pages, v_pages))
    new = tuple(jnp.asarray(rng.normal(size=(3, kv_heads, 64)), "bfloat16") for _ in range(2))
    table, high = np.asarray([[4, 2], [5, 1], [0, 0]]), np.asarray([128, 65, 0])
    arrays = [jnp.asarray(each, jnp.int32) for each in (table, 0 * high, high)]
    interpret = INTERPRET if implementation == "mosaic" else False
    settings = dict(implementation=implementation, interpret=interpret)
    run = functools.partial(write_and_attend, scale=0.125, **settings)
    o, found = in_one_program(run, implementation)(q, new, pages, *arrays)
    for before, x, after in zip(pages, new, found, strict=True):
        wanted = np.array(before)
        wanted[2, 63], wanted[1, 0] = x[0], x[1]
        np.testing.assert_array_equal(np.asarray(after), wanted)
    wanted = expected((q, *found, table, 0 * high, high), 0.125, None)
    assert_norm_close(o, wanted, TOLERANCE)


# N, K, H, window, softcap, type of the pages
RAGGED = {
    "two heads a group": (4, 2, 64, None, None, "bfloat16"),
    "a window": (8, 1, 64, 70, None, "bfloat16"),
    "a head a group, soft-cap": (2, 2, 128, None, 1.5, "float16"),
    "heads of 96": (4, 2, 96, None, None, "bfloat16"),
    "heads of 96, a head a group": (4, 4, 96, None, None, "bfloat16"),
    "pages of float8": (4, 2, 128, None, None, "float8_e4m3fn"),
}
# (first token, tokens, position of the first, pages): two that decode, one of padding, and prompts
# that begin and end anywhere, in several tiles and beside each other in one.
SEQUENCES = [(0, 1, 150, 3), (1, 1, 64, 2), (2, 0, 0, 0), (2, 75, 5, 2), (77, 9, 120, 3)]
SEQUENCES += [(86, 10, -10, 0)]  # tokens that see no key
RAGGED_TOKENS = 96


def draw_ragged(case):
    """(arguments of `ragged_attention`, its settings, a table and interval of each token)."""
    heads, kv_heads, dim, window, softcap, dtype = RAGGED[case]
    rng = np.random.default_rng(0)
    q = rng.normal(size=(RAGGED_TOKENS, heads, dim))
    num_pages = sum(pages for *_, pages in SEQUENCES)
    pages = rng.permutation(num_pages)
    k_pages, v_pages = (rng.normal(size=(num_pages, 64, kv_heads, dim)) for _ in range(2))
    fields, high, table, first = [], np.zeros(RAGGED_TOKENS, int), np.zeros((96, 3), int), 0
    for at, count, position, own in SEQUENCES:
        fields.append((at, count, position, first))
        high[at : at + count] = np.maximum(position + 1 + np.arange(count), 0)
        table[at : at + count, :own] = pages[first : first + own]
        first += own
    low = np.zeros_like(high) if window is None else np.maximum(high - window, 0)
    wide = "bfloat16" if dtype == "float8_e4m3fn" else dtype
    scales = None
    if wide != dtype:
        k_pages, v_pages = (np.clip(each * 100, -400, 400) for each in (k_pages, v_pages))
        shape = (num_pages, 1, kv_heads, 64)
        scales = [jnp.asarray(rng.uniform(0.005, 0.02, shape), "bfloat16") for _ in range(2)]
    sequences = Sequences(*(jnp.asarray(each, jnp.int32) for each in zip(*fields, strict=True)))
    arrays = [jnp.asarray(q, wide), jnp.asarray(k_pages, dtype), jnp.asarray(v_pages, dtype)]
    settings = dict(scale=dim**-0.5, softcap=softcap)
    every = *arrays, table, low, high, *([scales] if scales else [])
    arguments = *arrays, jnp.asarray(pages, jnp.int32), sequences, scales
    return arguments, settings | dict(window=window, num_single=3), expected(every, **settings)


@pytest.mark.parametrize("case", long_but(RAGGED, ("two heads a group", "a window")))
@pytest.mark.parametrize("implementation", RAGGED_BACKENDS)
def test_tokens_of_prompts_and_decoding_sequences_in_one_launch(implementation, case):
    if implementation == "mosaic" and not IS_NEW:
        pytest.skip("the kernel needs jax 0.11")
    arrays, settings, wanted = draw_ragged(case)
    interpret = interpret_of(implementation)
    chosen = dict(implementation=implementation, interpret=interpret)
    run = functools.partial(ragged_attention, **settings, **chosen)
    o = in_one_program(run, implementation)(*arrays)
    assert o.dtype == arrays[0].dtype
    assert_norm_close(o, wanted, TOLERANCE)
    assert not np.asarray(o[86:], np.float32).any()


@pytest.mark.skipif(not IS_NEW, reason="the kernel needs jax 0.11")
def test_what_the_kernels_that_write_or_take_all_cannot_do_is_said():
    (q, k_pages, *_), _ = draw("grouped heads")
    assert "N % 8 == 0" in writing_refusal("mosaic", q, k_pages)
    of_96 = jnp.zeros((8, 8, 96), q.dtype), jnp.zeros((2, 64, 8, 96), q.dtype)
    assert "multiples of 128 bytes" in writing_refusal("mosaic", *of_96)
    assert "T % 8" in ragged_refusal("mosaic", q, k_pages)
    many = jnp.zeros((8, 18, 64), q.dtype)
    assert "N / K <= 8" in ragged_refusal("mosaic", many, k_pages)


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
@pytest.mark.parametrize("dim", [64, 96])
def test_invariant_bits_are_those_of_the_kernel_for_prompts(dim):
    """A decoding token has the bits of a prompt's last one, wherever its tile of queries ends."""
    rng, length = np.random.default_rng(0), 200
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
