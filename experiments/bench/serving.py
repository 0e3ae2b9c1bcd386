"""Requests a second of the engine: the three workloads of vLLM's figures, and decoding alone.

The 1.1B Llama shape, bfloat16 weights and cache, random weights, greedy, no end token, no shared
prefixes; lengths Normal(mean, 0.3 mean). The first of two runs compiles and is not counted."""

import argparse
import dataclasses
import gc
import time

import jax
import jax.numpy as jnp
from decode import BFLOAT16, draw_params, make_model
from decode_work import FULL, TINY
from serving_work import WORKLOADS, draw

from jaxscale.models.config import AttentionConfig, ExpertsConfig, LayerConfig, ModelConfig
from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import BatchInvariant, ExecutionConfig, Whole
from jaxscale.models.parameters import parameter_table
from jaxscale.parallel.mesh import MeshConfig, make_mesh
from jaxscale.parallel.region import Region, make_serving_operations
from jaxscale.parallel.rules import make_specs
from jaxscale.serve.config import EngineConfig
from jaxscale.serve.engine import Engine
from jaxscale.serve.requests import RequestConfig
from jaxscale.serve.sampling import SamplingConfig

GREEDY = SamplingConfig(temperature=0)


def run(engine, prompts, lengths):
    """(seconds, new tokens a second behind the first ones, which wait for their prompts)."""
    began, times, counts = time.perf_counter(), [], []
    for prompt, length in zip(prompts, lengths, strict=True):
        engine.add(prompt, RequestConfig(GREEDY, max_new_tokens=int(length)))
    while engine.has_work:
        if count := sum(len(delta.tokens) for delta in engine.step()):
            times.append(time.perf_counter())
            counts.append(count)
    assert sum(counts) == sum(lengths)
    return times[-1] - began, sum(counts[1:]) / (times[-1] - times[0])


def copy_rate(num_bytes, rounds=16):
    """Terabytes a second that a copy on the device reads and writes."""
    whole, copy = jnp.zeros(num_bytes, "uint8"), jax.jit(jnp.copy)
    jax.block_until_ready(copy(whole))
    began = time.perf_counter()
    for _ in range(rounds):
        last = copy(whole)
    jax.block_until_ready(last)
    return 2 * num_bytes * rounds / (time.perf_counter() - began) / 1e12


def mixture():
    """The 4.0B shape with 0.66B active parameters."""
    attention = AttentionConfig(num_heads=16, num_kv_heads=4, head_dim=128)
    layer = LayerConfig(attention, ExpertsConfig(num_experts=16, num_active=2, dim=3200))
    return ModelConfig(
        vocab_size=32064,
        num_layers=12,
        model_dim=2048,
        max_length=8192,
        pattern=(layer,),
    )


def spread(model, tensor, execution):
    """The model over so many devices; None for one."""
    if tensor == 1:
        return None
    mesh = MeshConfig(tensor=tensor)
    specs = make_specs(parameter_table(model), mesh)
    attention = execution.operations().backends.attention
    operations = make_serving_operations(mesh, specs, attention=attention)
    return Region(make_mesh(mesh, jax.devices()[:tensor]), specs, operations)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--mixture", action="store_true")
    parser.add_argument("--invariant", action="store_true", help="bits that no batch changes")
    parser.add_argument("--warm_up", action="store_true", help="compile in parallel at first")
    parser.add_argument("--in_step", action="store_true", help="as replicas.py wants it")
    sizes = dict(token_budget=4096, max_sequences=512, max_prompts=64, tensor=1)
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--steps_a_launch", type=int)
    parser.add_argument("--cache_dtype", choices=["int8", "float8_e4m3fn"])
    parser.add_argument("--workloads", type=int, nargs="+", default=range(len(WORKLOADS)))
    options = vars(parser.parse_args())
    is_tiny, is_warm, is_in_step = map(options.pop, ("tiny", "warm_up", "in_step"))
    workloads = [WORKLOADS[number] for number in options.pop("workloads")]
    model = dataclasses.replace(make_model((TINY if is_tiny else FULL).shape), max_length=8192)
    if options.pop("mixture"):
        model = mixture()
    strategy = BatchInvariant() if options.pop("invariant") else Whole()
    execution = ExecutionConfig(strategy=strategy)
    region = spread(model, options.pop("tensor"), execution)
    print(f"a copy moves {copy_rate(2**16 if is_tiny else 2**31):.2f} TB/s")
    operations = region.operations if region else execution.operations()
    decoder = Decoder(model, operations, BFLOAT16, execution)
    config = EngineConfig(**options, use_prefix_cache=False)
    engine = Engine(decoder, draw_params(model), config=config, region=region)
    print(f"{jax.devices()[0].device_kind}, {config}\n")
    if is_warm:
        engine.warm_up()
    print("| workload | requests/s | new tokens/s | behind the first |\n|---|---|---|---|")
    for workload in workloads:
        sizes = (workload[0] // 32, 8, 8) if is_tiny else workload
        tokens, lengths = draw(*sizes, model.vocab_size)
        run(engine, tokens, lengths)
        gc.collect()
        gc.freeze()  # as the server does: what lives as long as the engine is not looked at again
        if is_in_step:
            print("ready", flush=True)
            input()
        seconds, rate = run(engine, tokens, lengths)
        figures = f"{len(tokens) / seconds:.2f} | {sum(lengths) / seconds:.0f} | {rate:.0f}"
        print(f"| {workload} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
