"""Whose kernels are taken on which device, and what is said where they cannot be."""

import importlib.metadata

import jax
import jax.numpy as jnp
import pytest

from jaxscale.kernels import device as described
from jaxscale.kernels import triton_call
from jaxscale.kernels.attention import api as attention_kernel
from jaxscale.kernels.attention.tiles import BlockLayout
from jaxscale.ops import device
from jaxscale.ops.attention import AttentionContext, api, attention, blockwise
from jaxscale.ops.linear import quantised_products
from jaxscale.ops.moe import grouped_ffn
from jaxscale.ops.norm import residual_norm
from jaxscale.ops.quantised import quantise
from jaxscale.types import InputError


@pytest.fixture
def on(monkeypatch):
    """Has this process look like one with a GPU of that capability, and Triton installed."""

    def pretend(capability):
        monkeypatch.setattr(described, "compute_capability", lambda: capability)
        monkeypatch.setattr(device, "missing", lambda: None)
        monkeypatch.setattr(attention_kernel, "missing", lambda: None)

    yield pretend
    device.name_kernels(None)


@pytest.mark.parametrize(
    ("capability", "family"),
    [
        (None, "xla"),
        ("7.5", "xla"),
        ("8.0", "triton"),
        ("8.9", "triton"),
        ("9.0", "mosaic"),
        ("10.0", "triton"),
        ("12.0", "triton"),
    ],
)
def test_the_device_decides_whose_kernels_are_taken(on, capability, family):
    on(capability)
    assert device.kernel_family() == family


@pytest.mark.parametrize(
    ("capability", "family", "needed", "here"),
    [
        ("8.0", "mosaic", "a Hopper GPU, of compute capability 9.0", "a GPU of .* 8.0"),
        (None, "mosaic", "a Hopper GPU", "cpu"),
        ("7.5", "triton", "a GPU of compute capability 8.0 or newer", "a GPU of .* 7.5"),
        (None, "triton", "a GPU", "cpu"),
    ],
)
def test_kernels_that_were_named_and_cannot_run_are_refused(on, capability, family, needed, here):
    on(capability)
    device.name_kernels(family)
    message = f"RuntimeConfig.kernels: given '{family}', expected {needed}.*, but this is {here}$"
    with pytest.raises(InputError, match=message):
        device.kernel_family()


@pytest.mark.parametrize(
    ("capability", "head_dim", "backend", "of_blocks"),
    [
        ("7.5", 64, "reference", "reference"),
        ("8.0", 128, "cudnn", "cudnn"),
        ("8.0", 256, "triton", "reference"),
        ("8.9", 100, "triton", "reference"),
        ("10.0", 256, "cudnn", "cudnn"),
        (None, 64, "reference", "reference"),
    ],
)
def test_causal_attention_goes_to_cudnn_where_it_takes_such_heads(
    on, capability, head_dim, backend, of_blocks
):
    """Of heads above 128 it has none before Hopper, and before Ampere none at all."""
    on(capability)
    x = jnp.ones((1, 8, 2, head_dim), jnp.bfloat16)
    context = AttentionContext(jnp.arange(8)[None])
    assert api._choose(x, context) == backend
    assert blockwise.choose(x, context) == of_blocks


@pytest.mark.parametrize(
    "change", [{"softcap": 3.0}, {"segments": jnp.ones((1, 12), int)}, {"layout": BlockLayout()}]
)
def test_on_hopper_our_kernel_takes_what_cudnn_has_not(change, monkeypatch):
    monkeypatch.setattr(described, "compute_capability", lambda: "9.0")
    x = jnp.ones((1, 12, 2, 64), jnp.bfloat16)
    is_new = jax.__version_info__ >= (0, 11)  # an older one the kernel refuses
    assert (api._choose(x, AttentionContext(jnp.arange(12)[None], **change)) == "mosaic") == is_new
    assert api._choose(x, AttentionContext(jnp.arange(12)[None])) != "mosaic"
    assert (
        api._choose(x.astype("float32"), AttentionContext(jnp.arange(12)[None], **change))
        != "mosaic"
    )


@pytest.mark.parametrize(
    ("dim", "change", "is_ours"),
    [
        (128, {}, True),
        (64, {}, False),
        (128, {"is_causal": False}, False),
        (128, {"window": 4}, False),
    ],
)
def test_on_hopper_our_kernel_takes_what_it_was_measured_faster_at(
    dim, change, is_ours, monkeypatch
):
    monkeypatch.setattr(described, "compute_capability", lambda: "9.0")
    x = jnp.ones((1, 12, 2, dim), jnp.bfloat16)
    is_new = jax.__version_info__ >= (0, 11)  # an older one the kernel refuses
    assert (api._choose(x, AttentionContext(jnp.arange(12)[None], **change)) == "mosaic") == (
        is_ours and is_new
    )


@pytest.mark.parametrize("backend", ["cudnn", "mosaic", "triton"])
def test_attention_that_was_named_and_cannot_run_is_refused(backend):
    x = jnp.ones((1, 8, 2, 64), jnp.bfloat16)
    context = AttentionContext(jnp.arange(8)[None])
    if jax.__version_info__ < (0, 11) and backend == "mosaic":
        pytest.skip("an older JAX is named before the device")
    with pytest.raises(InputError, match=f"attention: given '{backend}', .* but this is cpu"):
        attention(x, x, x, context, implementation=backend)


def test_a_named_family_is_taken_where_another_is_faster_and_logged(on, caplog):
    on("9.0")
    device.name_kernels("xla")
    weights = {name: jnp.ones((1, 8, 8), jnp.bfloat16) for name in ("gate", "up", "down")}
    with caplog.at_level("INFO", logger="jaxscale"):
        grouped_ffn(jnp.ones((4, 8), jnp.bfloat16), jnp.asarray([4]), weights, "swiglu")
        x = jnp.ones((1, 128), jnp.bfloat16)
        quantised_products(x, [quantise(jnp.ones((128, 64), jnp.bfloat16), 0, 1, bits=8)], x.dtype)
    assert "experts: backend xla for rows(4, 8)" in caplog.text
    assert "quantised weights: backend whole matrices for x(1, 128)" in caplog.text


def test_what_a_named_family_does_not_take_is_logged_with_the_reason(on, caplog):
    on("9.0")
    x = jnp.ones((4, 128), jnp.float32)
    context = AttentionContext(jnp.arange(8)[None], layout=BlockLayout(), segments=jnp.ones((1, 8)))
    with caplog.at_level("INFO", logger="jaxscale"):
        residual_norm(x, jnp.ones(128), epsilon=1e-5)
        assert not caplog.records, "nothing was named"
        device.name_kernels("triton")
        residual_norm(x, jnp.ones(128), epsilon=1e-5)
        api._choose(jnp.ones((1, 8, 2, 64), jnp.bfloat16), context)
    needed = "x bfloat16 or float16, but it is float32"
    first, second = (record.getMessage() for record in caplog.records)
    assert first == f"rms_norm: not by triton, which needs {needed}"
    assert second.startswith("attention: not by triton, which needs a backend that combines")


JAX_TRITON, TRITON = "jax-triton >= 0.3.1, < 0.4", "triton >= 3.6, < 3.7"


@pytest.mark.parametrize(
    ("package", "version", "wanted"),
    [
        ("jax-triton", "0.2.0", JAX_TRITON),
        ("jax-triton", "0.4.1", JAX_TRITON),
        ("jax-triton", None, JAX_TRITON),
        ("triton", "3.5.1", TRITON),
        ("triton", "3.7.0+git", TRITON),
        ("triton", None, TRITON),
        ("triton", "3.6.0+cu13", None),
    ],
)
def test_a_package_that_is_missing_or_of_another_version_is_named(
    monkeypatch, package, version, wanted
):
    versions = {"jax-triton": "0.3.1", "triton": "3.6.0"} | {package: version}

    def installed(name):
        if versions[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", installed)
    here = version or "not installed"
    message = f"{wanted} (pip install 'jaxscale[gpu-kernels]'), but it is {here}"
    assert triton_call.missing.__wrapped__() == (wanted and message)
