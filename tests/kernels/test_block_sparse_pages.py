"""Attention over pages under a layout of blocks, against float64 and a formula of its own.

Pages that no query of a kv head sees hold NaN, which a backend that read them would return.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.kernels.attention.tiles import BlockLayout
from jaxscale.kernels.paged_attention import pallas
from jaxscale.kernels.paged_attention.api import (
    BACKENDS,
    RAGGED_BACKENDS,
    WRITING_BACKENDS,
    paged_attention,
    ragged_attention,
    refusal,
    write_and_attend,
)
from jaxscale.kernels.paged_attention.ragged import Sequences
from jaxscale.kernels.paged_attention.seen_pages import SeenPages
from jaxscale.launch.ahead_of_time import as_on, described_devices, has_plugin
from tests.kernels.interpretation import (
    assert_norm_close,
    in_one_program,
    interpret_of,
    long_but,
    pairs,
    skip_unless_runnable,
)

BLOCK = 64
TOLERANCE = 4e-3  # of the norm, in bfloat16
# N, K, H, local, stride, window, soft-cap, type of the pages
CASES = {
    "Phi-3-small's stride": (8, 2, 64, 2, 8, None, None, "bfloat16"),
    "a group wider than the stride": (8, 1, 64, 1, 3, None, None, "bfloat16"),
    "a stride that no group divides": (4, 2, 64, 2, 5, None, None, "float16"),
    "groups of three": (6, 2, 64, 2, 4, None, None, "bfloat16"),
    "window and soft-cap": (8, 2, 64, 1, 6, 280, 1.5, "bfloat16"),
    "a window within the local blocks": (4, 1, 64, 3, 6, 90, None, "bfloat16"),
    "every block": (4, 2, 64, 1, 1, None, None, "bfloat16"),
    "pages of float8": (4, 1, 128, 2, 8, None, None, "float8_e4m3fn"),
}
SHORT = "window and soft-cap"  # of which the groups are narrower than the stride, too
# Lengths: whole pages, a page that is cut, less than a block, a first key of a block, nothing.
LENGTHS = 448, 397, 40, 385, 0


def draw(case, lengths, page_size=BLOCK, seed=0):
    """(pages of keys and of values, scales, table [D, P]) of sequences."""
    _, kv_heads, dim, *_, dtype = CASES[case]
    rng = np.random.default_rng(seed)
    width = max(-(-length // page_size) for length in lengths)
    table = rng.permutation(len(lengths) * width).reshape(len(lengths), width)
    pages = [rng.normal(size=(table.size, page_size, kv_heads, dim)) for _ in range(2)]
    scales = None
    if dtype.startswith("float8"):
        pages = [np.clip(each * 100, -400, 400) for each in pages]
        shape = (table.size, 1, kv_heads, page_size)
        scales = [jnp.asarray(rng.uniform(0.005, 0.02, shape), "bfloat16") for _ in range(2)]
    return *(jnp.asarray(each, dtype) for each in pages), scales, table


def queries(case, *lead):
    heads, _, dim, *_, dtype = CASES[case]
    wide = "bfloat16" if dtype.startswith("float8") else dtype
    return jnp.asarray(np.random.default_rng(1).normal(size=(*lead, heads, dim)), wide)


def settings_of(case):
    _, _, dim, local, stride, _, softcap, _ = CASES[case]
    return dict(scale=dim**-0.5, softcap=softcap, layout=BlockLayout(local, stride))


def sees(case, head, position):
    """[keys up to the position] whether a head's query there sees each of them."""
    *_, local, stride, window, _, _ = CASES[case]
    key = np.arange(position + 1)
    block = key // BLOCK
    found = (position // BLOCK - block < local) | ((block + head + 1) % stride == 0)
    return found if window is None else found & (key > position - window)


def expected(case, q, k_pages, v_pages, scales, table, positions):
    """(attention [T, N, H] in float64, the tokens [page, K] of pages of which a query sees any)."""
    q, k, v = (np.asarray(each, np.float64) for each in (q, k_pages, v_pages))
    if scales is not None:
        of_keys, of_values = (np.asarray(each, np.float64)[:, 0] for each in scales)
        k, v = (
            each * np.swapaxes(of, 1, 2)[..., None] for each, of in ((k, of_keys), (v, of_values))
        )
    settings, page_size, groups = settings_of(case), k.shape[1], q.shape[1] // k.shape[2]
    out, is_read = np.zeros_like(q), np.zeros((len(k), k.shape[2]), bool)
    for token, position in enumerate(positions):
        for head in range(q.shape[1]) if position >= 0 else ():
            seen = np.flatnonzero(sees(case, head, position))
            page, place = table[token][seen // page_size], seen % page_size
            is_read[page, head // groups] = True
            logits = k[page, place, head // groups] @ q[token, head] * settings["scale"]
            if cap := settings["softcap"]:
                logits = cap * np.tanh(logits / cap)
            weights = np.exp(logits - logits.max())
            out[token, head] = weights @ v[page, place, head // groups] / weights.sum()
    return out, is_read


def poisoned(pages, is_read):
    """Pages in which NaN stands wherever no query looks."""
    return [jnp.where(is_read[:, None, :, None], each, jnp.nan) for each in pages]


def assert_sees_the_blocks_of_each_head(implementation, case):
    skip_unless_runnable(implementation)
    q = queries(case, len(LENGTHS))
    k_pages, v_pages, scales, table = draw(case, LENGTHS)
    if refusal(implementation, q, k_pages):
        pytest.skip("the kernel does not take pages of 8 bits")
    high = np.asarray(LENGTHS)
    window = CASES[case][5]
    low = np.maximum(high - (window or high), 0)
    wanted, is_read = expected(case, q, k_pages, v_pages, scales, table, high - 1)
    if implementation != "reference":
        k_pages, v_pages = poisoned((k_pages, v_pages), is_read)
    integers = [jnp.asarray(each, jnp.int32) for each in (table, low, high)]
    settings = settings_of(case) | dict(implementation=implementation)
    interpret = interpret_of(implementation)
    run = functools.partial(paged_attention, **settings, interpret=interpret)
    o = in_one_program(run, implementation)(q, k_pages, v_pages, *integers, scales)
    assert_norm_close(o, wanted, TOLERANCE)
    assert not np.asarray(o[-1], np.float32).any()


@pytest.mark.parametrize(("implementation", "case"), pairs(BACKENDS, CASES, SHORT))
def test_a_decoding_token_sees_the_blocks_of_each_head(implementation, case):
    assert_sees_the_blocks_of_each_head(implementation, case)


def test_one_stream_a_sequence(monkeypatch):
    """As when there are many sequences."""
    monkeypatch.setattr(pallas, "NUM_SMS", 1)
    assert_sees_the_blocks_of_each_head("mosaic", "window and soft-cap")


@pytest.mark.long
@pytest.mark.parametrize("page_size", [16, 128])
def test_pages_that_are_no_blocks(page_size):
    """Triton reads parts of pages, or several; the kernel for Hopper GPUs says what it needs."""
    skip_unless_runnable("triton")
    case = "Phi-3-small's stride"
    q, (k_pages, v_pages, _, table) = queries(case, 5), draw(case, LENGTHS, page_size)
    high = np.asarray(LENGTHS)
    wanted, _ = expected(case, q, k_pages, v_pages, None, table, high - 1)
    integers = [jnp.asarray(each, jnp.int32) for each in (table, 0 * high, high)]
    for implementation in ("reference", "triton"):
        settings = dict(implementation=implementation, interpret=interpret_of(implementation))
        o = paged_attention(q, k_pages, v_pages, *integers, **settings_of(case), **settings)
        assert_norm_close(o, wanted, TOLERANCE)
    assert refusal("mosaic", q, k_pages, BlockLayout())


@pytest.mark.parametrize("implementation", WRITING_BACKENDS)
def test_the_newest_key_is_written_and_seen(implementation):
    skip_unless_runnable(implementation)
    case = "Phi-3-small's stride"
    rng, width, high = np.random.default_rng(2), 7, np.asarray(LENGTHS)
    q = jnp.asarray(rng.normal(size=(5, 8, 64)), "bfloat16")
    new = [jnp.asarray(rng.normal(size=(5, 4, 64)), "bfloat16") for _ in range(2)]
    table = rng.permutation(5 * width).reshape(5, width)
    pages = [jnp.asarray(rng.normal(size=(table.size, BLOCK, 4, 64)), "bfloat16") for _ in range(2)]
    integers = [jnp.asarray(each, jnp.int32) for each in (table, 0 * high, high)]
    interpret = interpret_of(implementation)
    settings = settings_of(case) | dict(implementation=implementation, interpret=interpret)
    run = functools.partial(write_and_attend, **settings)
    o, found = in_one_program(run, implementation)(q, new, pages, *integers)
    for before, x, after in zip(pages, new, found, strict=True):
        changed = np.array(before)
        for number, length in enumerate(LENGTHS[:-1]):
            changed[table[number, (length - 1) // BLOCK], (length - 1) % BLOCK] = x[number]
        np.testing.assert_array_equal(np.asarray(after), changed)
    wanted, _ = expected(case, q, *found, None, table, high - 1)
    assert_norm_close(o, wanted, TOLERANCE)


# (first token, tokens, position of the first): two that decode, one of padding, a prompt's chunk
# over the end of a block, one within a block, one shorter than a block.
SEQUENCES = [(0, 1, 400), (1, 1, 64), (2, 0, 0), (2, 73, 300), (75, 9, 350), (84, 20, 0)]
SEQUENCES += [(104, 8, -8)]  # tokens that see no key


@pytest.mark.parametrize("case", long_but(CASES, [SHORT]))
@pytest.mark.parametrize("implementation", RAGGED_BACKENDS)
def test_chunks_of_prompts_beside_decoding_sequences(implementation, case):
    skip_unless_runnable(implementation)
    ends = [max(position + num, 1) for _, num, position in SEQUENCES]
    q, (k_pages, v_pages, scales, table) = queries(case, 112), draw(case, ends)
    owners = np.repeat(np.arange(len(SEQUENCES)), [num for _, num, _ in SEQUENCES])
    positions = np.concatenate([position + np.arange(num) for _, num, position in SEQUENCES])
    arrays = (case, q, k_pages, v_pages, scales)
    wanted, is_read = expected(*arrays, table[owners], positions)
    if implementation != "reference":
        k_pages, v_pages = poisoned((k_pages, v_pages), is_read)
    fields = *zip(*SEQUENCES, strict=True), np.arange(len(table)) * table.shape[1]
    sequences = Sequences(*(jnp.asarray(each, jnp.int32) for each in fields))
    settings = settings_of(case) | dict(
        num_single=3,
        window=CASES[case][5],
        implementation=implementation,
        interpret=interpret_of(implementation),
    )
    run = in_one_program(functools.partial(ragged_attention, **settings), implementation)
    table = jnp.asarray(table.reshape(-1), jnp.int32)
    o = run(q, k_pages, v_pages, table, sequences, scales)
    assert_norm_close(o, wanted, TOLERANCE)
    assert not np.asarray(o[104:], np.float32).any()


@pytest.mark.long
@pytest.mark.skipif(not has_plugin(), reason="jax-cuda13-plugin is not installed")
def test_the_kernels_compile_for_an_h200():
    """Phi-3-small's heads, where there is no GPU."""
    skip_unless_runnable("mosaic")
    device = described_devices("h200", num_hosts=1, gpus_per_host=1)[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def array(*shape, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def integers(*shape):
        return array(*shape, dtype="int32")

    layout = dict(layout=BlockLayout(), scale=0.1, implementation="mosaic")
    pages, table = (array(99, BLOCK, 8, 128),) * 2, (integers(8, 20), integers(8), integers(8))
    new = (array(8, 8, 128),) * 2
    sequences = Sequences(*[integers(9)] * 4)
    mixed = functools.partial(ragged_attention, num_single=8, window=512, **layout)
    for run, arguments in (
        (functools.partial(paged_attention, **layout), (array(8, 32, 128), *pages, *table)),
        (functools.partial(write_and_attend, **layout), (array(8, 32, 128), new, pages, *table)),
        (mixed, (array(64, 32, 128), *pages, integers(180), sequences)),
    ):
        with as_on([device]):
            assert "mosaic_gpu" in jax.jit(run).lower(*arguments).compile().as_text()


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("skipped", [0, 2])
def test_the_pages_that_are_counted_are_those_of_the_layout(window, skipped):
    """From every block of 40, with as many blocks in a window; dealt out to streams or not."""
    block, place = np.arange(40), jnp.arange(40, dtype=jnp.int32)[:, None]
    first = np.maximum(block - (window or 40), 0)
    ends = jnp.asarray(first, jnp.int32), jnp.asarray(block + 1, jnp.int32)
    for local, stride, groups in ((16, 8, 4), (1, 3, 8), (2, 5, 2), (3, 4, 3), (1, 1, 1)):
        layout = BlockLayout(local, stride)
        for kv_head in range(3):
            patterns = (kv_head * groups + np.arange(groups)) % stride
            union = layout.sees(40)[patterns].any(0) & (block >= first[:, None])
            position = jnp.asarray(BLOCK * block + 5, jnp.int32)
            every = SeenPages.of(layout, groups, jnp.int32(kv_head), ends, position)
            seen = every.after(skipped)
            count, pages = np.asarray(seen.count), np.asarray(seen.page(place))
            for number in block:
                wanted = np.flatnonzero(union[number])[skipped:]
                np.testing.assert_array_equal(pages[: max(count[number], 0), number], wanted)
