"""One checkout's part in ground.py: prepares a case, then runs a round for each line that it reads.

Which jaxscale it imports is decided by PYTHONPATH; `before` is the one at which configurations were
flat and runs had no value of their own.
"""

import argparse
import functools
import inspect
import json
import sys
import time
from pathlib import Path

import jax

NUM_STEPS, WARMUP_STEPS = 15, 3
FILES = {"llama": "llama_1b.gin", "mixture": "mixtral_4b.gin"}
TINY_STEP = [
    "model.num_layers=1",
    "model.model_dim=32",
    "model.vocab_size=128",
    "data.sequence_length=32",
]


class Steps:
    """Train steps on one batch, as prepared by one of the checkouts."""

    def __init__(self, step, state, batch):
        self.step, self.state, self.batch = step, state, batch
        self.run(WARMUP_STEPS)

    def run(self, num_steps):
        """The metrics of the last step.

        The steps are dispatched without waiting, as in training.
        """
        for _ in range(num_steps):
            self.state, metrics = self.step(self.state, self.batch)
        jax.block_until_ready(self.state)
        return metrics

    def round(self):
        """Milliseconds of a step, and the loss after so many more."""
        began = time.perf_counter()
        metrics = self.run(NUM_STEPS)
        ms = (time.perf_counter() - began) / NUM_STEPS * 1e3
        return {"ms": ms, "loss": float(metrics["loss"])}


def gin_file(case):
    """The run file of the checkout that is imported."""
    import jaxscale

    checkout = Path(jaxscale.__file__).parents[1]
    return str(checkout / "experiments" / "configs" / "runs" / FILES[case])


def steps_after(case, overrides):
    """The steps of this checkout."""
    from gin_run import start_run, synthetic_batch

    from jaxscale.train.step import make_step

    run = start_run(gin_file(case), overrides)
    setup = run.setup()
    state, batch = setup.init(seed=0), synthetic_batch(run, setup.mesh)
    return Steps(make_step(setup).lower(state, batch).compile(), state, batch)


def steps_before(case, overrides):
    """The steps of the earlier checkout, whose run was not yet a value but arguments of a verb."""
    import numpy as np

    from jaxscale import config
    from jaxscale.parallel.batch import place
    from jaxscale.parallel.runtime import apply_runtime
    from jaxscale.train.plan import make_plan
    from jaxscale.train.pretrain import pretrain
    from jaxscale.train.state import init_state
    from jaxscale.train.step import make_step

    parameters = inspect.signature(pretrain).parameters
    run = {name: parameter.default for name, parameter in parameters.items()}
    run |= config.load(pretrain, [gin_file(case)], overrides).arguments
    apply_runtime(run["runtime"], ".")
    parts = ("model", "mesh", "data", "optimizer", "train", "policy", "stack")
    plan = make_plan(**{name: run[name] for name in parts})
    state = init_state(
        run["model"],
        plan.optimizer,
        plan.state,
        specs=plan.region.specs,
        seed=0,
        trainable=run["train"].trainable,
    )
    rows, length = run["data"].batch_size, run["data"].sequence_length
    vocab_size = run["model"].vocab_size
    text = np.random.default_rng(0).integers(0, vocab_size, (rows, length + 1), np.int32)
    batch = {
        "tokens": text[:, :-1],
        "labels": text[:, 1:],
        "weights": np.ones((rows, length), np.float32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
    }
    batch = place(plan.mesh, batch)
    step = make_step(plan.loss_fn, plan.optimizer, plan.region, plan.state)
    return Steps(step.lower(state, batch).compile(), state, batch)


def decoding_after(work):
    """A function that runs one round of this checkout's decoding and of plain JAX."""
    from decode import Decoding

    return Decoding(work).round


def decoding_before(work):
    """A function that runs one round of the earlier checkout's decoding."""
    from decode_work import END, measure

    from jaxscale.models.config import ModelConfig
    from jaxscale.models.parameters import init_params
    from jaxscale.ops.precision import Policy
    from jaxscale.serve.generate import generate_tokens
    from jaxscale.serve.sampling import SamplingConfig

    shape = work.shape
    model = ModelConfig(
        vocab_size=shape.V,
        num_layers=shape.L,
        model_dim=shape.D,
        num_heads=shape.N,
        num_kv_heads=shape.K,
        head_dim=shape.H,
        ffn_dim=shape.F,
        max_length=4096,
    )
    draw = functools.partial(init_params, model, dtype="bfloat16")
    params = jax.jit(draw)(jax.random.key(0))
    generate = functools.partial(
        generate_tokens,
        config=model,
        sampling=SamplingConfig(temperature=0),
        max_new_tokens=work.num_new,
        eos_id=END,
        policy=Policy(parameters="bfloat16"),
    )
    return lambda: {"before": measure(generate, params, work)}


def prepare(side, case, is_tiny):
    """A function that runs one round, of which everything is compiled."""
    if case == "decode":
        from decode_work import FULL, TINY

        decoding = decoding_before if side == "before" else decoding_after
        run_round = decoding(TINY if is_tiny else FULL)
        run_round()
        return run_round
    steps = steps_before if side == "before" else steps_after
    return steps(case, TINY_STEP if is_tiny else []).round


def peak_gib():
    """The most memory that was in use on the device; 0 where the backend keeps no count."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", 0) / 2**30


def main():
    """Prepare, say so, and run a round for each line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=("before", "after"))
    parser.add_argument("case", choices=(*FILES, "decode"))
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    run_round = prepare(options.side, options.case, options.tiny)
    print(json.dumps({"peak_gib": round(peak_gib(), 1)}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(run_round()), flush=True)


if __name__ == "__main__":
    main()
