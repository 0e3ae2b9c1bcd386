"""Time the step of a mixture of experts and of the dense model with as many active parameters.

The protocol of GRIN's Table 3, on whatever mesh the gin file has: same layers, dense F = A times an
expert's F; mesh, precision, rows of a micro-batch, tokens of a step and rematerialisation are the
same. Synthetic tokens; nothing is read or saved. The two take turns, and one JSON line with the
medians over the rounds is printed.

Source: Liu et al. 2024 (arXiv 2409.12136), Table 3.

python experiments/bench/mixture_beside_dense.py experiments/configs/papers/grin/table3_4b.gin
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gin_run import make_parser, start_run, synthetic_batch

from jaxscale.models.config import FeedForwardConfig
from jaxscale.models.config.model import training_flops_per_token
from jaxscale.models.parameters import count_parameters, parameter_table
from jaxscale.run.run import Run
from jaxscale.train.metrics import peak_flops
from jaxscale.train.setup import Setup
from jaxscale.train.step import make_step


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A model's run with its compiled programs.

    Args:
        step: the train step.
        update: the same step without loss and gradient: it is given gradients as its batch.
        gradients: their shapes, types and shardings.
    """

    run: Run
    setup: Setup
    batch: Any
    step: Callable
    update: Callable
    gradients: Any
    compile_s: float


def with_dense_twins(run):
    """The run with one feed-forward, as wide as a token's experts together, for each mixture."""

    def dense(layer):
        experts = layer.feed_forward
        twin = FeedForwardConfig(experts.num_active * experts.dim, experts.activation)
        return dataclasses.replace(layer, feed_forward=twin)

    pattern = tuple(dense(layer) if layer.is_moe else layer for layer in run.model.pattern)
    model = dataclasses.replace(run.model, pattern=pattern)
    return dataclasses.replace(run, model=model)


def prepare(run):
    """Compile a run's step and its update."""
    setup = run.setup()
    batch = synthetic_batch(run, setup.mesh)
    began = time.perf_counter()
    step = make_step(setup).lower(setup.state, batch).compile()
    compile_s = time.perf_counter() - began
    dtype = run.policy.reduction
    gradients = jax.tree.map(lambda leaf: leaf.update(dtype=dtype), setup.state.params)
    only_update = dataclasses.replace(setup, region=region_of_update(setup.region))
    return Prepared(
        run=run,
        setup=setup,
        batch=batch,
        step=step,
        update=make_step(only_update).lower(setup.state, gradients).compile(),
        gradients=gradients,
        compile_s=compile_s,
    )


def region_of_update(region):
    """A region whose loss is 1 and whose gradients are what it is given as its batch."""
    one = jnp.ones((), jnp.float32)

    def gradient(loss_fn):
        return lambda params, gradients, key: ((one, one, {}), gradients)

    return SimpleNamespace(
        gradient=gradient,
        trainable=region.trainable,
        specs=region.specs,
    )


def constant_gradients(prepared):
    """Small gradients, placed as the step places its own."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, prepared.gradients)

    def fill():
        return jax.tree.map(lambda leaf: jnp.full(leaf.shape, 1e-4, leaf.dtype), prepared.gradients)

    return jax.jit(fill, out_shardings=shardings)()


def milliseconds(step, state, given, num_steps):
    """(of one step, state): the mean after two others; nothing waits between steps."""
    for _ in range(2):
        state, metrics = step(state, given)
    assert bool(metrics["is_finite"])
    began = time.perf_counter()
    for _ in range(num_steps):
        state, _ = step(state, given)
    jax.block_until_ready(state)
    return (time.perf_counter() - began) / num_steps * 1e3, state


def measure(prepared, num_steps):
    """Milliseconds of a step and of its update alone; the state is drawn anew and then freed."""
    state = prepared.setup.init(seed=0)
    step_ms, state = milliseconds(prepared.step, state, prepared.batch, num_steps)
    gradients = constant_gradients(prepared)
    update_ms, _ = milliseconds(prepared.update, state, gradients, num_steps)
    return step_ms, update_ms


def figures(prepared, times):
    """What the times of all rounds come to."""
    model, data = prepared.run.model, prepared.run.data
    of_steps, of_updates = zip(*times, strict=True)
    step_ms, update_ms = statistics.median(of_steps), statistics.median(of_updates)
    total, active = count_parameters(parameter_table(model))
    num_tokens = data.batch_size * data.sequence_length
    flops = training_flops_per_token(model, active, data.sequence_length) * num_tokens
    memory = prepared.step.memory_analysis()
    needed_bytes = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return {
        "parameters": total,
        "active": active,
        "ms": step_ms,
        "ms_of_each_round": of_steps,
        "tokens_per_second": num_tokens / step_ms * 1e3,
        "tflops": flops / step_ms / 1e9,
        "mfu": flops / step_ms * 1e3 / (peak_flops() or np.inf),
        "update_ms": update_ms,
        "optimizer_share": update_ms / step_ms,
        "compile_s": prepared.compile_s,
        "needed_gib": needed_bytes / 2**30,
    }


def main():
    """Compile both models, time them in turn and print what came of it."""
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=5, help="in a round")
    parser.add_argument(
        "--rounds", type=int, default=3, help="of the dense model and the mixture, in turn"
    )
    options = parser.parse_args()
    run = start_run(options.file, options.set)
    dense, mixture = prepare(with_dense_twins(run)), prepare(run)
    of_dense, of_mixture = [], []
    for _ in range(options.rounds):
        of_dense.append(measure(dense, options.steps))
        of_mixture.append(measure(mixture, options.steps))
    relative = [d / m for (d, _), (m, _) in zip(of_dense, of_mixture, strict=True)]
    result = {
        "file": options.file,
        "overrides": options.set,
        "dense": figures(dense, of_dense),
        "mixture": figures(mixture, of_mixture),
        "relative": statistics.median(relative),
        "relative_of_each_round": relative,
        "tokens_per_step": run.data.batch_size * run.data.sequence_length,
        "microbatch_rows": run.data.batch_size // run.train.num_microbatches,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
