"""How the tests run the kernels.

They are compiled on a Hopper GPU (with JAX_PLATFORMS=cuda), and interpreted elsewhere.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# jax 0.10 does not export it.
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.sharding import Mesh, PartitionSpec

from jaxscale.kernels.triton_call import missing
from jaxscale.ops.device import is_hopper

INTERPRET = False if is_hopper() else InterpretGPUParams()
KNOWS_THE_END = jax.__version_info__ >= (0, 11)
OLD_REASON = "jax 0.10 cannot interpret copies past the end, which the hardware fills with zeros"


def interpret_of(implementation):
    """The parameter `interpret` of a backend here."""
    if INTERPRET and implementation == "triton":
        from tests.kernels.triton_interpreter import interpret

        return interpret
    return INTERPRET


def in_one_program(function, implementation):
    """The slow twin compiled at once: operation by operation it takes many times as long.

    An interpreted kernel is run call by call.
    """
    return jax.jit(function) if implementation == "reference" else function


def skip_unless_runnable(implementation):
    """Skips a test of a kernel backend that cannot run here."""
    if implementation == "mosaic" and not KNOWS_THE_END:
        pytest.skip(OLD_REASON)
    if implementation == "triton" and (reason := missing()):
        pytest.skip(f"Triton kernels need {reason}")


def in_a_manual_region(function, drawn, implementation):
    """What a function gives on each of two devices that draw the same, one after the other.

    Checks which kernel its program for a GPU has. None where that cannot run here: interpretation
    knows neither scan nor remat.
    """
    if implementation == "triton" and INTERPRET:
        pytest.skip("Triton is interpreted here, and does not compile in the same process")
    mesh, each = Mesh(np.array(jax.devices()[:2]), ("data",)), PartitionSpec("data")
    local = jax.shard_map(function, mesh=mesh, in_specs=each, out_specs=each, check_vma=False)
    arguments = [jnp.concatenate([x] * mesh.size) for x in drawn]
    is_mosaic = implementation == "mosaic"
    assert ("mosaic_gpu" in lower_for_gpu(local, *arguments)) == is_mosaic
    return None if is_mosaic and INTERPRET else jax.jit(local)(*arguments)


def assert_norm_close(got, want, tolerance, name=""):
    """Checks |got - want| <= tolerance |want|, in float64."""
    want = np.asarray(want, np.float64)
    error = np.linalg.norm(np.asarray(got, np.float64) - want)
    assert error <= tolerance * np.linalg.norm(want), name


def assert_same_bits(once, again, names=None):
    """Checks that all arrays are equal."""
    names = names or range(len(once))
    for name, a, b in zip(names, once, again, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), str(name))


def long_but(names, chosen):
    """Parameters of a test: `names`, of which only the chosen ones run by default."""
    return [pytest.param(name, marks=() if name in chosen else pytest.mark.long) for name in names]


def but_triton(backends):
    """Parameters of a test of which the long suite alone interprets Triton, for seconds."""
    return long_but(backends, [name for name in backends if name != "triton"])


def pairs(backends, names, chosen):
    """(backend, name) of which Triton runs the chosen name alone by default."""
    return [
        pytest.param(
            backend,
            name,
            marks=pytest.mark.long if backend == "triton" and name != chosen else (),
        )
        for backend in backends
        for name in names
    ]


def lower_for_gpu(f, *arguments):
    """The text of f's program for an NVIDIA GPU, which needs none."""
    traced = jax.jit(f).trace(*arguments)
    return traced.lower(lowering_platforms=("cuda",)).as_text()
