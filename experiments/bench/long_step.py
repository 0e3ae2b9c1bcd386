"""Time a step on one long sequence, beside the most that attention's kernel would allow.

The cap is the MFU of a step that is nothing but this model's matmuls, forward and backward once, at
the rate of a large one, and its attention at the kernel's rate, both measured in this process. A
GPU that is at its power limit for long runs slower than in its first calls, so that "sustained"
rates and their cap, of calls for two seconds on end, stand beside those of three calls.

python experiments/bench/long_step.py experiments/configs/papers/fpdt_1b.gin \\
    --set data.sequence_length=131072
"""

import contextlib
import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from gin_run import devices, make_parser, start_run, synthetic_batch
from profile_table import device_events, idle_times
from train_step import compiled_step, peak_gib, rates

from jaxscale.kernels.attention.api import attention
from jaxscale.models.config.model import training_flops_per_token
from jaxscale.models.parameters import count_parameters

PEAK = 989e12  # FLOP/s of bfloat16, an H100 SXM's and an H200's
SAMPLE = 32_768  # tokens at which the kernel is timed
SUSTAINED_S = 2.0
PREFIXES = ("", "sustained_")  # of what `seconds` finds


def seconds(f, *arrays):
    """Of a call among three, and among as many as take SUSTAINED_S; one before them compiles."""
    run = jax.jit(f)
    jax.block_until_ready(run(*arrays))

    def mean(repeats):
        began = time.perf_counter()
        for _ in range(repeats):
            result = run(*arrays)
        jax.block_until_ready(result)
        return (time.perf_counter() - began) / repeats

    of_three = mean(3)
    return np.array([of_three, mean(math.ceil(SUSTAINED_S / of_three))])


def kernel_seconds(config):
    """Forward, and forward with backward, of causal attention over SAMPLE tokens; see `seconds`."""
    shapes = [(1, SAMPLE, n, config.head_dim) for n in (config.num_heads, config.num_kv_heads)]
    q, k = (jax.random.normal(jax.random.key(i), s, jnp.bfloat16) for i, s in enumerate(shapes))
    token = jnp.arange(SAMPLE, dtype=jnp.int32)[None]
    bounds = jnp.zeros_like(token), token + 1

    def forward(q, k, v):
        scale = config.head_dim**-0.5
        return attention(q, k, v, *bounds, scale=scale, implementation="mosaic")[0]

    def both(q, k, v):
        o, pull = jax.vjp(forward, q, k, v)
        return pull(o)

    return seconds(forward, q, k, k), seconds(both, q, k, k)


def matmul_rate():
    """FLOP/s of a large matmul, among three and sustained."""
    x = jax.random.normal(jax.random.key(0), (16_384, 8_192), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (8_192, 8_192), jnp.bfloat16)
    return 2 * x.size * w.shape[1] / seconds(jnp.matmul, x, w)


def cap(run):
    """The kernel's TFLOP/s, and the MFU above which no step with it can be; likewise sustained.

    "cap_twice" is the cap of a step that runs attention's forward twice. All devices have the same
    rates and divide the work, so that a cap is the same for any number of them.
    """
    length, layers = run.data.sequence_length, run.model.layers
    config = layers[0].attention
    _, active = count_parameters(run.table())
    forward, both = kernel_seconds(config)
    one_forward = 2.0 * SAMPLE**2 * config.num_heads * config.head_dim
    num_samples = len(layers) * (length / SAMPLE) ** 2
    rate = matmul_rate()
    least = num_samples * both + 6 * active * length / rate
    flops = training_flops_per_token(run.model, active, length) * length
    figures = {
        "kernel_forward_tflops": one_forward / forward / 1e12,
        "kernel_tflops": 3.5 * one_forward / both / 1e12,
        "matmul_tflops": rate / 1e12,
        "cap": flops / least / PEAK,
        "cap_twice": flops / (least + num_samples * forward) / PEAK,
    }
    return {p + name: found[i] for i, p in enumerate(PREFIXES) for name, found in figures.items()}


def mfu_of_paper(run, ms):
    """The MFU as the paper seems to count it: causal attention over all pairs of tokens."""
    length = run.data.sequence_length
    _, active = count_parameters(run.table())
    counted = training_flops_per_token(run.model, active, length)
    return (2 * counted - 6 * active) * length / ms * 1e3 / PEAK / jax.device_count()


def timed(step, state, batch, num_steps):
    """Milliseconds of a step, and the loss of the last."""
    began = time.perf_counter()
    for _ in range(num_steps):
        state, metrics = step(state, batch)
    jax.block_until_ready(state)
    return (time.perf_counter() - began) / num_steps * 1e3, float(metrics["loss"])


def profiled(devices):
    """Milliseconds from a step's first kernel, and the share without a kernel, be it in copies.

    Before its first kernel a first step pins host memory, about a second a GiB.
    """
    computing = [[event for event in each if "Memcpy" not in event[2]] for each in devices]
    spans = [
        max(end for _, end, _ in events) - kernels[0][0]
        for events, kernels in zip(devices, computing, strict=True)
    ]
    idle, _ = idle_times(computing)
    return {"profiled_ms": max(spans) / 1e6, "idle": sum(idle.values()) / sum(spans)}


def main():
    """Compile, run once, time, and profile if asked to."""
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=1, help="0 compiles and does not run")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--profile", help="directory for a profile of the one step that is timed")
    parser.add_argument("--no-cap", action="store_true")
    options = parser.parse_args()
    run = start_run(options.file, options.set)
    setup = run.setup()
    head = {"file": options.file, "overrides": options.set} | devices()
    figures = {} if options.no_cap else cap(run)
    state = setup.init(seed=0)
    batch = synthetic_batch(run, setup.mesh)
    step, compiled = compiled_step(setup, state, batch)
    print(json.dumps(head | figures | compiled), flush=True)
    if not options.steps:
        return
    for _ in range(options.warmup):
        state, _ = jax.block_until_ready(step(state, batch))
    num_steps = 1 if options.profile else options.steps
    with jax.profiler.trace(options.profile) if options.profile else contextlib.nullcontext():
        figures["ms"], compiled["loss"] = timed(step, state, batch, num_steps)
        figures |= compiled | rates(run, figures["ms"])
        figures["mfu_of_paper"] = mfu_of_paper(run, figures["ms"])
        figures["host_gib"] = step.memory_analysis().host_temp_size_in_bytes / 2**30
        figures["peak_gib"] = peak_gib()
        rounded = {name: round(value, 4) for name, value in figures.items()}
        # Before the profile is written, which takes long.
        print(json.dumps(head | rounded), flush=True)
    if options.profile:
        found = profiled(device_events(options.profile))
        print(json.dumps(found | rates(run, found["profiled_ms"])), flush=True)


if __name__ == "__main__":
    main()
