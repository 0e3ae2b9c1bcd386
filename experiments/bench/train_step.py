"""Times the real train step of a gin file on synthetic tokens and prints one JSON line; nothing is read or saved.

    python experiments/bench/train_step.py experiments/configs/runs/llama_1b.gin --set stack.is_scanned=False
"""

import argparse
import inspect
import json
import time

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxscale import config
from jaxscale.models.config import training_flops_per_token
from jaxscale.models.parameters import count_parameters
from jaxscale.parallel.mesh import BATCH_SPEC
from jaxscale.train.metrics import peak_flops
from jaxscale.train.plan import make_plan
from jaxscale.train.pretrain import pretrain
from jaxscale.train.runtime import apply_runtime
from jaxscale.train.state import init_state
from jaxscale.train.step import make_step

PARTS = ("model", "mesh", "data", "optimizer", "train", "policy", "stack")


def main(file, overrides, num_steps, profile):
    """Compiles, warms up for three steps, times `num_steps` steps."""
    defaults = {name: p.default for name, p in inspect.signature(pretrain).parameters.items()}
    run = defaults | config.load(pretrain, [file], overrides).arguments
    apply_runtime(run["runtime"], ".")
    plan = make_plan(**{name: run[name] for name in PARTS})
    state = init_state(run["model"], plan.optimizer, plan.state, seed=0, trainable=".*")
    step = make_step(plan.loss_fn, plan.optimizer, plan.region, plan.state)
    rows, length = run["data"].batch_size, run["data"].sequence_length
    tokens = np.random.default_rng(0).integers(0, run["model"].vocab_size, (rows, length + 1), np.int32)
    batch = {
        "tokens": tokens[:, :-1], "labels": tokens[:, 1:], "weights": np.ones((rows, length), np.float32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
    }  # fmt: skip
    batch = jax.device_put(batch, NamedSharding(plan.mesh, BATCH_SPEC))
    began = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    compile_s, memory, times = time.perf_counter() - began, compiled.memory_analysis(), []
    for number in range(num_steps + 3):
        if profile and number == num_steps:
            jax.profiler.start_trace(profile)
        began = time.perf_counter()
        state, metrics = compiled(state, batch)
        loss = float(metrics["loss"])
        times.append(time.perf_counter() - began)
    if profile:
        jax.profiler.stop_trace()
    seconds = float(np.median(times[3:]))
    flops = training_flops_per_token(run["model"], count_parameters(run["model"])[1], length) * rows * length
    stats, peak = jax.local_devices()[0].memory_stats() or {}, peak_flops()
    print(json.dumps({
        "overrides": overrides, "ms": round(seconds * 1e3, 1), "tokens_per_second": round(rows * length / seconds),
        "tflops": round(flops / seconds / 1e12, 1), "mfu": peak and round(flops / seconds / peak, 4),
        "temp_gib": round(memory.temp_size_in_bytes / 2**30, 1), "compile_s": round(compile_s, 1), "loss": loss,
        "peak_gib": round(stats.get("peak_bytes_in_use", 0) / 2**30, 1),
    }))  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--profile")
    options = parser.parse_args()
    main(options.file, options.set, options.steps, options.profile)
