"""Memory of one long sequence by strategy, as the compiler lays it out; no GPU is needed.

JAX_PLATFORMS=cpu python experiments/bench/long_ladder.py experiments/configs/papers/fpdt_1b.gin \\
    --set data.sequence_length=131072 --chunk 32768
"""

import dataclasses
import time

from gin_run import make_parser

from jaxscale.launch.ahead_of_time import memory_of
from jaxscale.launch.runtime import RuntimeConfig, apply_runtime
from jaxscale.models.execution import ByChunk, ExecutionConfig, Whole
from jaxscale.parallel.sequence.fpdt.strategy import FullyPipelined
from jaxscale.parallel.sequence.head_chunks import HeadChunks
from jaxscale.run.chunks import is_chunked, memory_of_chunks
from jaxscale.run.compile import Topology, lower_step
from jaxscale.run.run import load_run

GIB = 2**30
ON_DEVICE = dict(inputs="device", attention="device", chunks="device")


def ladder(chunk):
    """Name -> fields of the execution."""
    kept = dict(remat="names", saved_names=("attention",))
    return {
        "whole layers, full remat": dict(remat="full", strategy=Whole()),
        "whole layers, attention kept": dict(strategy=Whole(), **kept),
        "the same, inputs on the host": dict(
            strategy=Whole(), offloaded_names=("residual",), **kept
        ),
        "feed-forward in 8 chunks": dict(strategy=ByChunk(8), **kept),
        "heads in 4 chunks (UPipe)": dict(remat="full", strategy=HeadChunks(4)),
        "chunks, all on the device": dict(strategy=FullyPipelined(chunk, **ON_DEVICE)),
        "chunks, inputs and outputs on the host": dict(
            strategy=FullyPipelined(chunk, chunks="device")
        ),
        "chunks, all on the host": dict(strategy=FullyPipelined(chunk)),
        "chunks, attention run twice": dict(strategy=FullyPipelined(chunk, attention="nowhere")),
        "chunks, every 4th input": dict(
            strategy=FullyPipelined(chunk), checkpoint_every=4, checkpoint_place="host"
        ),
    }


def execution_of(run, fields):
    """A run's execution with the fields of a row; what it keeps of its own is the loss's chunks."""
    settings = dict(remat="none", num_loss_chunks=run.execution.num_loss_chunks)
    return ExecutionConfig(**settings | fields)


def main():
    """One row per strategy."""
    parser = make_parser(__doc__)
    parser.add_argument("--chunk", type=int, default=65_536)
    parser.add_argument("--topology", default="h200:1x1")
    parser.add_argument("--only", nargs="*", help="words of the rows; all by default")
    options = parser.parse_args()
    run = load_run([options.file], options.set)
    apply_runtime(RuntimeConfig(platform="cpu", xla_flags=run.runtime.xla_flags), ".")
    devices = Topology.parse(options.topology).devices()
    print("| strategy | GiB on the device | on the host | predicted | compiled in |")
    print("|---|---|---|---|---|")
    for name, fields in ladder(options.chunk).items():
        if options.only and not any(word in name for word in options.only):
            continue
        other = dataclasses.replace(run, execution=execution_of(run, fields))
        began = time.perf_counter()
        memory = memory_of(lower_step(other, devices).compile())
        took = time.perf_counter() - began
        predicted = ""
        if is_chunked(other):
            model = memory_of_chunks(other)
            predicted = f"{model.on_device / GIB:.2f}, {model.on_host / GIB:.2f}"
        figures = f"{memory.peak / GIB:.2f} | {memory.host / GIB:.2f} | {predicted}"
        print(f"| {name} | {figures} | {took:.0f} s |", flush=True)


if __name__ == "__main__":
    main()
