"""Every attention backend against a loop over queries in float64, forward and gradient.

And across documents.
"""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.kernels import device
from jaxscale.kernels.attention.tiles import BlockLayout
from jaxscale.ops.attention import (
    DETERMINISTIC,
    AttentionContext,
    attention,
    chunked,
    invariant,
    kernels,
    splash,
)
from jaxscale.ops.attention import api as module
from jaxscale.ops.device import device_refusal
from jaxscale.types import InputError

# Our kernels are interpreted in tests/kernels. "invariant" compiles long and has a case here.
PLAIN = ["reference", "chunked"]
HERE = PLAIN + [name for name in ("cudnn", "mosaic", "triton") if device_refusal(name) is None]

# batch, T, N, K, H, window, softcap, documents: lengths in each row, 0 stands for padding to the
# end
CASES = {
    "multi_head": (2, 12, 4, 4, 8, None, None, None),
    "grouped": (2, 12, 4, 2, 8, None, None, None),
    "multi_query": (2, 12, 4, 1, 8, None, None, None),
    "window_of_one": (1, 12, 2, 2, 8, 1, None, None),
    "softcap": (1, 12, 2, 1, 8, None, 2.0, None),
    "documents": (2, 12, 4, 2, 8, None, None, (5, 4, 0)),
    "odd_shapes": (3, 9, 3, 1, 24, 4, None, (1, 7, 1)),
    "everything": (2, 12, 6, 3, 8, 2, 5.0, (1, 8, 0)),
    "full": (2, 12, 4, 2, 8, None, None, None),
    "full_documents": (2, 12, 2, 1, 8, None, 2.0, (5, 4, 0)),
    "blocks": (1, 138, 4, 2, 8, None, None, None),
}
MASKS = {
    "full": {"is_causal": False},
    "full_documents": {"is_causal": False},
    "blocks": {"layout": BlockLayout(local=1, stride=3)},
}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "QUERY_CHUNK", 3)
    monkeypatch.setattr(invariant, "QUERY_TILE", 5)
    monkeypatch.setattr(invariant, "KEY_BLOCK", 4)


def make(case, dtype=np.float32):
    """q, k, v, a cotangent of the output, and the context."""
    rows, length, heads, kv_heads, dim, window, softcap, documents = CASES[case]
    rng = np.random.default_rng(0)
    q, k, v, cotangent = (
        jnp.asarray(rng.normal(size=(rows, length, n, dim)), dtype)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    positions, segments = np.arange(length), None
    if documents:
        lengths = [n or length - sum(documents) for n in documents]
        positions = np.concatenate([np.arange(n) for n in lengths])
        segments = np.repeat([0 if n == 0 else i + 1 for i, n in enumerate(documents)], lengths)
        segments = jnp.asarray(np.tile(segments, (rows, 1)), jnp.int32)
    positions = jnp.asarray(np.tile(positions, (rows, 1)), jnp.int32)
    context = AttentionContext(
        positions, segments, window=window, softcap=softcap, **MASKS.get(case, {})
    )
    return (q, k, v), cotangent, context


@functools.cache
def expected(case):
    """Output and gradients of q, k, v.

    Each query over the list of keys that it may see, in float64, by hand.
    """
    (q, k, v), cotangent, context = make(case)
    q, k, v, cotangent = (np.asarray(a, np.float64) for a in (q, k, v, cotangent))
    rows, length, heads, dim = q.shape
    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    cap = context.softcap
    for b, t, n in np.ndindex(rows, length, heads):
        documents = np.ones(length) if context.segments is None else np.asarray(context.segments[b])
        first = 0 if context.window is None else t - context.window + 1
        last = t if context.is_causal else length - 1
        seen = [s for s in range(last + 1) if s >= first and documents[s] == documents[t]]
        if layout := context.layout:
            seen = [
                s
                for s in seen
                if t // 64 - s // 64 < layout.local or (s // 64 + n + 1) % layout.stride == 0
            ]
        head = n * k.shape[2] // heads
        keys, values = k[b, seen, head], v[b, seen, head]
        logits = keys @ q[b, t, n] / np.sqrt(dim)
        capped = cap * np.tanh(logits / cap) if cap else logits
        weights = np.exp(capped) / np.exp(capped).sum()
        out[b, t, n] = weights @ values
        dweights = values @ cotangent[b, t, n]
        dlogits = weights * (dweights - weights @ dweights) / np.sqrt(dim)
        dlogits *= 1 - (capped / cap) ** 2 if cap else 1
        dq[b, t, n] = dlogits @ keys
        dk[b, seen, head] += np.outer(dlogits, q[b, t, n])
        dv[b, seen, head] += np.outer(weights, cotangent[b, t, n])
    return out, (dq, dk, dv)


@pytest.fixture(autouse=True)
def whole_products():
    """Of float32, which a GPU otherwise rounds to TF32's 10 bits before it multiplies."""
    with jax.default_matmul_precision("highest"):
        yield


COMBINATIONS = [(backend, case, "float32") for backend in PLAIN for case in CASES]
COMBINATIONS += [(backend, "everything", "bfloat16") for backend in PLAIN]
if "cudnn" in HERE:  # which has no float32, no soft-cap and no documents in an odd T
    COMBINATIONS += [
        ("cudnn", case, "bfloat16")
        for case in ("multi_head", "grouped", "multi_query", "window_of_one", "documents")
    ]


for family in ("mosaic", "triton"):
    if family in HERE:
        COMBINATIONS += [(family, case, "bfloat16") for case in CASES]


@pytest.mark.parametrize(
    "backend, case, dtype", [*COMBINATIONS, ("invariant", "everything", "float32")]
)
def test_forward_and_gradient_equal_the_loop(backend, case, dtype):
    arrays, cotangent, context = make(case, dtype)
    attend = functools.partial(attention, context=context, implementation=backend)
    out, pullback = jax.vjp(jax.jit(lambda *a: attend(*a)[0]), *arrays)
    assert out.dtype == dtype
    tolerance = 2e-6 if dtype == "float32" else 3e-2
    wanted, wanted_gradients = expected(case)
    np.testing.assert_allclose(out.astype("float32"), wanted, atol=tolerance)
    for got, want, name in zip(pullback(cotangent), wanted_gradients, "qkv", strict=True):
        error = np.abs(got.astype("float32") - want).max()
        assert error < 2 * tolerance * max(1, np.abs(want).max()), f"gradient of {name}: {error}"


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="a CPU adds up in one order")
@pytest.mark.parametrize("backend", DETERMINISTIC)
def test_a_deterministic_backend_gives_the_same_bits_twice(backend, monkeypatch):
    monkeypatch.setattr(chunked, "QUERY_CHUNK", 512)
    do, q, k, v = (
        jax.random.normal(jax.random.key(i), (2, 2048, n, 64), jnp.bfloat16)
        for i, n in enumerate((4, 4, 2, 2))
    )
    context = AttentionContext(jnp.tile(jnp.arange(2048), (2, 1)))

    @jax.jit
    def run(*arrays):
        out, pullback = jax.vjp(
            lambda *a: attention(*a, context, implementation=backend)[0], *arrays
        )
        return out, *pullback(do)

    for a, b in zip(run(q, k, v), run(q, k, v), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("backend", HERE)
def test_a_document_sends_no_gradient_to_another(backend):
    """The packing leak: exactly zero, and not zero when the documents are one."""
    arrays, _, context = make("documents", jnp.float32 if backend in PLAIN else jnp.bfloat16)
    second = np.asarray(context.segments) == 2

    def loss_of_second(arrays, context):
        return (
            (attention(*arrays, context, implementation=backend)[0].astype("float32") ** 2)
            .sum((2, 3))[second]
            .sum()
        )

    for gradient in jax.jit(jax.grad(loss_of_second))(arrays, context):
        gradient = np.asarray(gradient, np.float32)
        assert (gradient[~second] == 0).all()
        assert np.abs(gradient[second]).max() > 0
    one_document = AttentionContext(jnp.broadcast_to(jnp.arange(12), (2, 12)))
    _, dk, _ = jax.jit(jax.grad(loss_of_second))(arrays, one_document)
    assert np.abs(np.asarray(dk, np.float32)[np.asarray(context.segments) == 1]).max() > 0


@pytest.mark.parametrize("backend", HERE)
def test_no_future_token_is_seen(backend):
    arrays, _, context = make("multi_head", jnp.float32 if backend in PLAIN else jnp.bfloat16)

    def loss_of_first_half(arrays):
        return attention(*arrays, context, implementation=backend)[0][:, :6].astype("float32").sum()

    for gradient in jax.jit(jax.grad(loss_of_first_half))(arrays):
        assert (np.asarray(gradient, np.float32)[:, 6:] == 0).all()


def test_scale_replaces_the_default():
    (q, k, v), _, context = make("grouped")
    double = AttentionContext(context.positions, scale=2 / np.sqrt(8))
    np.testing.assert_allclose(
        attention(q, k, v, double, implementation="reference")[0],
        attention(2 * q, k, v, context, implementation="reference")[0],
        atol=1e-6,
    )


def test_chunked_keeps_no_logits_of_all_queries():
    """Its gradient's largest intermediate has a chunk of queries, not T of them."""
    (q, k, v), _, context = make("multi_head")

    def shapes(backend):
        jaxpr = jax.make_jaxpr(
            jax.grad(lambda q: attention(q, k, v, context, implementation=backend)[0].sum())
        )(q)
        return str(jaxpr)

    assert "12,12]" in shapes("reference")
    assert "12,12]" not in shapes("chunked")


def test_chunked_recomputes_its_logits_in_the_backward():
    """What it keeps grows with T, not with T times T."""
    q = jnp.ones((1, 96, 2, 8))
    context = AttentionContext(jnp.arange(96)[None])

    def kept(backend):
        attend = functools.partial(attention, context=context, implementation=backend)
        pullback = jax.eval_shape(lambda q: jax.vjp(lambda *a: attend(*a)[0], q, q, q)[1], q)
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    assert kept("chunked") < 10 * q.size < 96 * 96 * 2 <= kept("reference")


@pytest.mark.parametrize("case", ["documents", "grouped", "window_of_one", "full"])
def test_what_is_asked_of_cudnn(case, monkeypatch):
    """The same arguments, given to XLA's implementation, must give the same attention."""
    call = jax.nn.dot_product_attention
    monkeypatch.setattr(device, "compute_capability", lambda: "9.0")
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *a, **k: call(*a, **k | {"implementation": "xla"})
    )
    arrays, _, context = make(case)
    np.testing.assert_allclose(
        attention(*arrays, context, implementation="cudnn")[0], expected(case)[0], atol=1e-5
    )


@pytest.mark.parametrize(
    "change",
    [
        {"window": 40},
        pytest.param({"softcap": 3.0}, marks=pytest.mark.long),
        pytest.param({"is_causal": False}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_splash_interpreted_equals_the_reference(change):
    """Two documents, grouped heads; results and gradients."""
    token = jnp.arange(128)[None]
    second = (token >= 50).astype("int32")
    context = AttentionContext(token - 50 * second, segments=second + 1, **change)
    shapes = [(1, 128, num_heads, 64) for num_heads in (4, 2, 2, 4)]
    q, k, v, do = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(shapes))

    def both(attend):
        def run(q, k, v, do):
            o, pullback = jax.vjp(lambda *a: attend(*a, context), q, k, v)
            return o, *pullback(do)

        return jax.jit(run)(q, k, v, do)

    found = both(functools.partial(splash.attend, interpret=True))
    for got, want in zip(found, both(module.MODULES["reference"].attend), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_what_is_asked_of_our_kernel(case, monkeypatch):
    """The same arguments, given to the kernel's slow twin, must give the same attention."""
    call = kernels.kernel.attention
    monkeypatch.setattr(
        kernels.kernel, "attention", lambda *a, **k: call(*a, **k | {"implementation": "reference"})
    )
    arrays, _, context = make(case)
    scaled = dataclasses.replace(context, scale=2 / np.sqrt(arrays[0].shape[-1]))

    @jax.jit
    def both(q, k, v):
        attend = kernels.Kernel("mosaic").attend
        return attend(q, k, v, context), attend(q / 2, k, v, scaled)

    for found in both(*arrays):
        np.testing.assert_allclose(found, expected(case)[0], atol=1e-5)


@pytest.mark.parametrize("change", [{"window": 3}, {"layout": BlockLayout()}], ids=str)
def test_a_mask_of_all_keys_has_neither_window_nor_blocks(change):
    x, context = (
        jnp.ones((1, 12, 2, 8)),
        AttentionContext(jnp.arange(12)[None], is_causal=False, **change),
    )
    with pytest.raises(InputError, match="expected True where there is a window or a layout"):
        attention(x, x, x, context)


@pytest.mark.parametrize(
    "shapes, change, expected_text",
    [
        (((12, 2), (12, 2)), {"window": 0}, "window: given 0, expected 1 or more"),
        (((12, 2), (12, 2)), {"softcap": 0.0}, "softcap: given 0.0, expected above 0"),
        (((12, 3), (12, 2)), {}, "N % K == 0"),
        (((12, 2), (16, 2)), {}, "key_positions: given None, expected .B, S. where S is not T"),
        (
            ((12, 2), (16, 2)),
            {"key_positions": jnp.arange(16)[None], "segments": jnp.ones((1, 12), int)},
            "key_segments: given None",
        ),
    ],
)
def test_what_fits_no_mask_is_refused(shapes, change, expected_text):
    q, k = (jnp.ones((1, *shape, 8)) for shape in shapes)
    with pytest.raises(InputError, match=expected_text):
        attention(q, k, k, AttentionContext(jnp.arange(12)[None], **change))


@pytest.mark.parametrize("change", [{"local": 0}, {"stride": 0}], ids=str)
def test_a_layout_of_no_blocks_is_refused(change):
    with pytest.raises(ValueError, match=r"BlockLayout: given .* 0.*expected 1 or more"):
        BlockLayout(**change)


@pytest.mark.parametrize(
    "backend, change, expected_text",
    [
        ("flash", {}, "'reference', 'chunked', 'cudnn', 'mosaic', 'triton', 'splash'"),
        ("chunked", {"length": 11}, "T % 3 == 0, but T = 11"),
        ("cudnn", {"softcap": 3.0}, "soft-cap"),
        ("cudnn", {"key_positions": jnp.arange(12)[None]}, "keys at other positions"),
        ("cudnn", {"dim": 12}, "head_dim % 8 == 0"),
        ("cudnn", {"layout": BlockLayout()}, "layouts of blocks"),
        (
            "mosaic",
            {"layout": BlockLayout(), "window": 3},
            "combines a layout of blocks with documents or a window",
        ),
        ("mosaic", {"key_positions": jnp.arange(12)[None]}, "keys at other positions"),
        ("mosaic", {"dim": 264}, "head_dim <= 256, but head_dim = 264"),
        ("splash", {}, "T % 128 == 0, but T = 12"),
        ("splash", {"layout": BlockLayout()}, "layouts of blocks"),
        (
            "cudnn",
            {"length": 9, "segments": jnp.ones((1, 9), int)},
            "T % 2 == 0 where rows hold documents, but T = 9",
        ),
    ],
)
def test_a_named_backend_refuses_and_never_falls_back(backend, change, expected_text):
    length, dim = change.pop("length", 12), change.pop("dim", 8)
    x = jnp.ones((1, length, 2, dim), jnp.bfloat16)
    with pytest.raises(InputError, match=expected_text) as error:
        attention(
            x, x, x, AttentionContext(jnp.arange(length)[None], **change), implementation=backend
        )
    assert error.value.parameter == "attention"
    assert repr(backend) in str(error.value)


@pytest.mark.parametrize("case", CASES)
def test_key_intervals_are_the_mask(case):
    _, _, context = make(case)
    low, high = context.key_intervals()
    number = np.arange(context.positions.shape[1])
    sees = (number >= low[..., None]) & (number < high[..., None])
    mask = dataclasses.replace(context, layout=None).mask()
    np.testing.assert_array_equal(np.broadcast_to(sees[:, None], mask.shape), mask)


@pytest.mark.parametrize("length, chosen", [(12, "chunked"), (11, "reference"), (3, "reference")])
def test_the_chosen_backend_is_logged(length, chosen, caplog):
    x = jnp.ones((1, length, 2, 8))
    with caplog.at_level(logging.INFO, logger="jaxscale"):
        attention(x, x, x, AttentionContext(jnp.arange(length)[None]))
        assert f"backend {chosen}" in caplog.text
        caplog.clear()
        attention(x, x, x, AttentionContext(jnp.arange(length)[None]), implementation="reference")
        assert not caplog.records
