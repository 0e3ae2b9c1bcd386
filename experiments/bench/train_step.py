"""Time the train step of a gin file on synthetic tokens; print one JSON line, save nothing.

python experiments/bench/train_step.py experiments/configs/runs/llama_1b.gin \\
    --set execution.is_scanned=True
"""

import json
import time

import jax
import numpy as np
from gin_run import devices, make_parser, start_run, synthetic_batch

from jaxscale.models.config.model import training_flops_per_token
from jaxscale.models.parameters import count_parameters
from jaxscale.train.metrics import peak_flops
from jaxscale.train.step import make_step

GIB = 2**30
WARMUP_STEPS = 3


def compiled_step(setup, state, batch):
    """The compiled step, and what compiling took and what memory the program needs."""
    began = time.perf_counter()
    step = make_step(setup).lower(state, batch).compile()
    memory = step.memory_analysis()
    return step, {
        "compile_s": time.perf_counter() - began,
        "temp_gib": memory.temp_size_in_bytes / GIB,
        "arguments_gib": memory.argument_size_in_bytes / GIB,
        "host_gib": memory.host_argument_size_in_bytes / GIB,
    }


def time_steps(step, state, batch, num_steps):
    """(milliseconds of a step, state); the steps are dispatched without waiting, as in training."""
    began = time.perf_counter()
    for _ in range(num_steps):
        state, _ = step(state, batch)
    jax.block_until_ready(state)
    return (time.perf_counter() - began) / num_steps * 1e3, state


def profile_steps(step, state, batch, directory, num_steps=2):
    """Write a profile of some steps."""
    with jax.profiler.trace(directory):
        for _ in range(num_steps):
            state, _ = step(state, batch)
        jax.block_until_ready(state)


def rates(run, ms):
    """Tokens and FLOPs per second, and MFU over all devices."""
    length = run.data.sequence_length
    _, active = count_parameters(run.table())
    num_tokens = run.data.batch_size * length
    flops = training_flops_per_token(run.model, active, length) * num_tokens
    peak = (peak_flops() or np.inf) * jax.device_count()
    return {
        "tokens_per_second": num_tokens / ms * 1e3,
        "tflops": flops / ms / 1e9,
        "mfu": flops / ms * 1e3 / peak,
    }


def peak_gib():
    """The most memory that was ever in use on a local device; 0 if the backend does not count."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max(each.get("peak_bytes_in_use", 0) for each in stats) / GIB


def main():
    """Compile, warm up, time, and profile if asked to."""
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--documents", type=int, help="of a row, packed; one whole row if left out")
    parser.add_argument("--profile", help="directory for a profile of two more steps")
    options = parser.parse_args()
    run = start_run(options.file, options.set)
    setup = run.setup()
    state = setup.init(seed=0)
    batch = synthetic_batch(run, setup.mesh, options.documents)
    step, figures = compiled_step(setup, state, batch)
    for _ in range(WARMUP_STEPS):
        state, metrics = step(state, batch)
    figures["loss_of_step_3"] = float(metrics["loss"])
    figures["ms"], state = time_steps(step, state, batch, options.steps)
    if options.profile:
        profile_steps(step, state, batch, options.profile)
    figures |= rates(run, figures["ms"])
    figures["peak_gib"] = peak_gib()
    rounded = {name: round(value, 4) for name, value in figures.items()}
    head = {"file": options.file, "overrides": options.set} | devices()
    print(json.dumps(head | rounded), flush=True)


if __name__ == "__main__":
    main()
