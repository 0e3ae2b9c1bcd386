"""The dtype policy."""

import jax
import jax.numpy as jnp
import pytest

from jaxscale.ops.precision import Policy, accumulator, cast
from jaxscale.types import InputError


@pytest.mark.parametrize("field", ["parameters", "compute", "reduction", "output"])
@pytest.mark.parametrize("value", ["float8", "int32", 32, None])
def test_other_types_are_refused_by_name(field, value):
    with pytest.raises(InputError, match=rf"Policy\.{field}: given {value!r}, expected"):
        Policy(**{field: value})


@pytest.mark.parametrize("field", ["parameters", "reduction"])
def test_float16_is_refused_where_squares_of_gradients_would_vanish(field):
    with pytest.raises(InputError, match=rf"Policy\.{field}: given 'float16'"):
        Policy(**{field: "float16"})
    assert Policy(compute="float16", output="float16").compute == "float16"


def test_float64_is_refused_where_jax_would_compute_in_float32():
    with pytest.raises(
        InputError, match=r"Policy.compute: given 'float64', expected JAX_ENABLE_X64=1"
    ):
        Policy(compute="float64")
    with jax.enable_x64(True):
        assert Policy(compute="float64").compute == "float64"


def test_cast_leaves_integers_alone():
    tree = cast({"w": jnp.ones(2), "n": jnp.ones(2, jnp.int32)}, "bfloat16")
    assert tree["w"].dtype == jnp.bfloat16
    assert tree["n"].dtype == jnp.int32


@pytest.mark.parametrize(
    "given, wanted", [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float32")]
)
def test_sums_are_taken_in_at_least_float32(given, wanted):
    assert accumulator(jnp.ones(2, given)).dtype == wanted
