"""Times the train step of a mixture of experts and of the dense model with as many active parameters, in turn.

The protocol of GRIN's Table 3, on whatever mesh the gin file has: same layers, dense F = A times an
expert's F; mesh, precision, rows of a micro-batch, tokens of a step and rematerialisation are the
same. Synthetic tokens; prints one JSON line with the medians over the rounds; nothing is read or
saved.

Source: Liu et al. 2024 (arXiv 2409.12136), Table 3.

python experiments/bench/mixture_beside_dense.py experiments/configs/papers/grin/table3_4b.gin
"""

import argparse
import dataclasses
import functools
import inspect
import json
import statistics
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from jaxscale import config
from jaxscale.launch.runtime import apply_runtime
from jaxscale.models.config import training_flops_per_token
from jaxscale.models.parameters import count_parameters
from jaxscale.parallel.batch import place
from jaxscale.train.metrics import peak_flops
from jaxscale.train.plan import make_plan
from jaxscale.train.pretrain import pretrain
from jaxscale.train.state import init_state
from jaxscale.train.step import make_step

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("file")
parser.add_argument("--set", action="append", default=[])
parser.add_argument("--steps", type=int, default=5, help="in a round")
parser.add_argument(
    "--rounds", type=int, default=3, help="of the dense model and the mixture, in turn"
)
options = parser.parse_args()

defaults = {name: each.default for name, each in inspect.signature(pretrain).parameters.items()}
run = defaults | config.load(pretrain, [options.file], options.set).arguments
apply_runtime(run["runtime"], ".")
rows, length = run["data"].batch_size, run["data"].sequence_length


def dense_twin(model):
    """The same layers, each with one feed-forward as wide as a token's experts together."""
    ffn_dim = model.num_active_experts * model.expert_dim
    return dataclasses.replace(
        model, moe_pattern=(False,), num_experts=0, expert_dim=0, ffn_dim=ffn_dim
    )


def synthetic_batch(mesh, vocab_size):
    """Random tokens, rows without padding."""
    text = np.random.default_rng(0).integers(0, vocab_size, (rows, length + 1), np.int32)
    weights, positions = (
        np.ones((rows, length), np.float32),
        np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
    )
    return place(
        mesh, dict(tokens=text[:, :-1], labels=text[:, 1:], weights=weights, positions=positions)
    )


def prepare(model):
    """A model's compiled step; and the same step without loss and gradient, which are its batch."""
    parts = {name: run[name] for name in ("mesh", "data", "optimizer", "train", "policy", "stack")}
    plan = make_plan(model=model, **parts)
    batch = synthetic_batch(plan.mesh, model.vocab_size)
    began = time.perf_counter()
    step = (
        make_step(plan.loss_fn, plan.optimizer, plan.region, plan.state)
        .lower(plan.state, batch)
        .compile()
    )
    seconds, one = time.perf_counter() - began, jnp.ones((), jnp.float32)
    region = SimpleNamespace(
        gradient=lambda loss_fn: lambda params, gradients, key: ((one, one, {}), gradients),
        trainable=plan.region.trainable,
        specs=plan.region.specs,
    )
    gradients = jax.tree.map(
        lambda leaf: leaf.update(dtype=run["policy"].reduction), plan.state.params
    )
    update = (
        make_step(plan.loss_fn, plan.optimizer, region, plan.state)
        .lower(plan.state, gradients)
        .compile()
    )
    return SimpleNamespace(
        model=model,
        plan=plan,
        batch=batch,
        step=step,
        update=update,
        gradients=gradients,
        compile_s=seconds,
    )


def milliseconds(step, state, given):
    """(of one step, the mean after two others; the state). Dispatched without waiting, as the training loop does."""
    for _ in range(2):
        state, metrics = step(state, given)
    assert bool(metrics["is_finite"])
    began = time.perf_counter()
    for _ in range(options.steps):
        state, _ = step(state, given)
    jax.block_until_ready(state)
    return (time.perf_counter() - began) / options.steps * 1e3, state


def measure(prepared):
    """Milliseconds of a step and of its update alone; the state is drawn anew and freed."""
    plan = prepared.plan
    settings = dict(specs=plan.region.specs, seed=0, trainable=run["train"].trainable)
    state = init_state(prepared.model, plan.optimizer, plan.state, **settings)
    step_ms, state = milliseconds(prepared.step, state, prepared.batch)
    fill = functools.partial(
        jax.tree.map, lambda leaf: jnp.full(leaf.shape, 1e-4, leaf.dtype), prepared.gradients
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, prepared.gradients)
    return step_ms, milliseconds(prepared.update, state, jax.jit(fill, out_shardings=shardings)())[
        0
    ]


def figures(prepared, times):
    """What the times of all rounds come to."""
    step_ms, update_ms = (statistics.median(each) for each in zip(*times, strict=True))
    total, active = count_parameters(prepared.model)
    flops = training_flops_per_token(prepared.model, active, length) * rows * length
    memory = prepared.step.memory_analysis()
    return {
        "parameters": total,
        "active": active,
        "ms": step_ms,
        "ms_of_each_round": [each[0] for each in times],
        "tokens_per_second": rows * length / step_ms * 1e3,
        "tflops": flops / step_ms / 1e9,
        "mfu": flops / step_ms * 1e3 / (peak_flops() or np.inf),
        "update_ms": update_ms,
        "optimizer_share": update_ms / step_ms,
        "compile_s": prepared.compile_s,
        "needed_gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30,
    }


pair = {"dense": prepare(dense_twin(run["model"])), "mixture": prepare(run["model"])}
times = {name: [] for name in pair}
for _ in range(options.rounds):
    for name, prepared in pair.items():
        times[name].append(measure(prepared))
result = {name: figures(prepared, times[name]) for name, prepared in pair.items()}
relative = [d[0] / m[0] for d, m in zip(times["dense"], times["mixture"], strict=True)]
result |= {"relative": statistics.median(relative), "relative_of_each_round": relative}
result |= {
    "tokens_per_step": rows * length,
    "microbatch_rows": rows // run["train"].num_microbatches,
}
print(json.dumps({"file": options.file, "overrides": options.set} | result))
