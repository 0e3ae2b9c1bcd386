"""The longest sequence that fits H200s, by strategy, as `jaxscale inspect` counts it: a picture.

python experiments/long_lengths.py experiments/results/2026-11-29_h200_fpdt_lengths.png
"""

import dataclasses
import sys

import matplotlib.pyplot as plt

from jaxscale.parallel.sequence.fpdt.strategy import FullyPipelined
from jaxscale.planner.chunks import chunked_memory
from jaxscale.planner.memory import step_memory
from jaxscale.planner.state import StateCounter
from jaxscale.run.job import job_of, layout_of
from jaxscale.run.run import load_run

FILE = "experiments/configs/papers/fpdt_8b.gin"
DEVICE, HOST, CHUNK = 0.95 * 139 * 2**30, 120 * 2**30, 32_768  # bytes of each GPU; tokens of each
TWICE = dict(attention="nowhere")
GROUPED = dict(checkpoint_every=4, checkpoint_place="host")
STRATEGIES = {
    "whole layers, full remat": None,
    "chunks, all on the device": dict(inputs="device", attention="device", chunks="device"),
    "chunks, inputs on the host": dict(attention="device", chunks="device"),
    "chunks, all on the host": {},
    "attention run twice": TWICE,
    "the same, inputs divided": TWICE,
    "every 4th layer's input, divided": {},
}


def fits(name, fields, run, length):
    """Whether a step fits; divided inputs fill whatever device and host have left."""
    execution = dataclasses.replace(run.execution, **(GROUPED if "every" in name else {}))
    job = dataclasses.replace(job_of(run), length=length, execution=execution)
    layout, state = layout_of(run), StateCounter(job)(run.mesh)
    if fields is None:
        return step_memory(job, dataclasses.replace(layout, remat="full"), state).total <= DEVICE
    strategy = FullyPipelined(CHUNK * layout.num_devices, **fields)
    memory = chunked_memory(job, layout, state, strategy)
    if "divided" in name:
        return memory.on_device <= DEVICE and memory.on_device + memory.on_host <= DEVICE + HOST
    return memory.on_device <= DEVICE and memory.on_host <= HOST


figure, axis = plt.subplots(figsize=(8, 3.5))
for number, gpus in enumerate((1, 2, 4, 8)):
    run = load_run([FILE], [f"mesh.sequence={gpus}", "mesh.is_optimizer_on_host=False"])
    for row, (name, fields) in enumerate(STRATEGIES.items()):
        longest, step = 0, CHUNK * gpus
        while fits(name, fields, run, longest + step):
            longest += step
        print(f"{gpus} x H200 {name:<28} {longest:>10,}")
        label = f"{gpus} x H200" if row == 0 else None
        axis.barh(row + 0.2 * number, longest / 1e6, 0.18, color=f"C{number}", label=label)
axis.set_yticks([i + 0.3 for i in range(len(STRATEGIES))], list(STRATEGIES))
axis.set_xlabel("million tokens, Llama 3 8B's shape, 120 GiB of host memory a GPU")
axis.legend()
figure.savefig(sys.argv[1], bbox_inches="tight", dpi=110)
