"""A device table's shares measured on the devices that are here."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxscale.parallel.mesh import DATA
from jaxscale.planner.cluster import Device
from jaxscale.planner.timing import drawn, median_s
from jaxscale.types import Array

MATMUL_WIDTH, PASS_BYTES, LINK_BYTES = 8192, 2**30, 2**27
NUM_GATHERS = 16  # in one program: a busy host takes longer to start one than it runs
# What a step reaches of the rates of one large matmul, of one large pass over memory and of
# gathers: the shares of the H200's table over the 0.77, 0.63 and 0.40 that were timed. Passes of a
# step are shorter, and find in its cache a part of what they read.
MATMUL_IN_STEP, PASS_IN_STEP, LINK_IN_STEP = 0.91, 1.27, 1.25


def measured(
    device: Device,
    devices: Sequence[jax.Device],
    *,
    shrink: int = 1,
) -> Device:
    """The device with what matmuls, passes over memory and links reach here.

    Args:
        device: whose peaks the shares are of. Those of attention and experts scale with matmuls'.
        devices: that are here, of one host; with one there are no links to measure.
        shrink: divides the sizes of what is timed, for devices that are slow.
    Cost: under a second on a GPU.
    """
    width = MATMUL_WIDTH // shrink
    flops = 2 * width**3 / _matmul_s(width)
    matmul_share = MATMUL_IN_STEP * flops / device.matmul_flops
    scale = matmul_share / device.matmul_share
    # A pass reads and writes.
    bandwidth = 2 * PASS_BYTES / shrink / _pass_s(PASS_BYTES // shrink)
    found = dataclasses.replace(
        device,
        matmul_share=matmul_share,
        attention_share=device.attention_share * scale,
        expert_share=device.expert_share * scale,
        memory_share=PASS_IN_STEP * bandwidth / device.memory_bandwidth,
    )
    if len(devices) == 1:
        return found
    away = (len(devices) - 1) / len(devices)
    rate = away * LINK_BYTES / shrink / _all_gather_s(LINK_BYTES // shrink, devices)
    return dataclasses.replace(found, link_share=LINK_IN_STEP * rate / device.link_bandwidth)


def _matmul_s(width: int) -> float:
    shape = jax.ShapeDtypeStruct((width, width), jnp.bfloat16)
    return median_s(jax.jit(jnp.matmul), *drawn((shape, shape)))


def _pass_s(num_bytes: int) -> float:
    return median_s(jax.jit(jnp.negative), jnp.ones(num_bytes // 2, jnp.bfloat16))


def _all_gather_s(num_bytes: int, devices: Sequence[jax.Device]) -> float:
    mesh = Mesh(np.asarray(devices), (DATA,))
    num = math.ceil(num_bytes / 2 / len(devices))

    def gather(whole: Array, _: None) -> tuple[Array, None]:
        own = lax.dynamic_slice_in_dim(whole, lax.axis_index(DATA) * num, num)
        return lax.all_gather(own, DATA, tiled=True), None

    def gathers(whole: Array) -> Array:
        return lax.scan(gather, whole, length=NUM_GATHERS)[0]

    everywhere = PartitionSpec()
    spread = jax.shard_map(
        gathers,
        mesh=mesh,
        in_specs=everywhere,
        out_specs=everywhere,
        check_vma=False,
    )
    values = jnp.ones(num * len(devices), jnp.bfloat16)
    values = jax.device_put(values, jax.NamedSharding(mesh, everywhere))
    return median_s(jax.jit(spread), values) / NUM_GATHERS
