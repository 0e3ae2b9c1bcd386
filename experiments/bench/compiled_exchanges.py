"""Which exchanges of a compiled step have a kernel beside them that multiplies or attends.

JAX_PLATFORMS=cpu python experiments/bench/compiled_exchanges.py \\
    experiments/configs/runs/llama_1b.gin --gpus 4 --set mesh.tensor=4 --set data.batch_size=16

No GPU is needed. An exchange counts as hidden if the compiler has put such a kernel between its
start and its end, whether or not that takes as long. What stands in loops is left out.
"""

import collections
import re

from gin_run import make_parser

from jaxscale.launch.ahead_of_time import described_devices, memory_of
from jaxscale.launch.collectives import collective_bytes
from jaxscale.launch.runtime import RuntimeConfig, apply_runtime
from jaxscale.run.compile import lower_step
from jaxscale.run.run import load_run

WORK = re.compile(r"cublas|gemm|mosaic_gpu|triton|fmha|cudnn| conditional\(| while\(")
CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.-]+)")
GIB = 2**30


def exchanges(hlo):
    """[kind, bytes delivered, whether hidden] of each exchange of the entry computation."""
    computations = re.findall(r"^%?([\w.-]+) [^\n]*\{\n(.*?)^\}", hlo, re.MULTILINE | re.DOTALL)
    at_work = {name for name, body in computations if WORK.search(body)}
    running, found = {}, []
    for line in hlo[hlo.index("\nENTRY") :].splitlines():
        delivered = [
            (kind, size) for kind, sizes in collective_bytes(line).items() for size in sizes
        ]
        if delivered:
            each = [*delivered[0], False]
            found.append(each)
            # What is not started alone is waited for at once, and never found again by its name.
            running[re.search(r"%?([\w.-]+) = ", line)[1]] = each
        elif "-done(" in line:
            running.pop(re.search(r"-done\(%?([\w.-]+)", line)[1], None)
        elif WORK.search(line) or at_work.intersection(CALLED.findall(line)):
            for name, each in running.items():
                each[2] |= "start" in name
    return found


def main():
    """Print a row a kind of exchange, and the memory."""
    parser = make_parser(__doc__)
    parser.add_argument("--gpus", type=int, required=True)
    options = parser.parse_args()
    run = load_run([options.file], options.set)
    apply_runtime(RuntimeConfig(platform="cpu", xla_flags=run.runtime.xla_flags), ".")
    devices = described_devices("h200", num_hosts=1, gpus_per_host=options.gpus)
    compiled = lower_step(run, devices).compile()
    total, hidden = collections.Counter(), collections.Counter()
    for kind, size, is_hidden in exchanges(compiled.as_text()):
        total[kind] += size
        hidden[kind] += size * is_hidden
    print("| exchange | GiB delivered | of them hidden |\n|---|---|---|")
    for kind, size in total.items():
        print(f"| {kind} | {size / GIB:.3f} | {hidden[kind] / GIB:.3f} |")
    print(f"temporaries {memory_of(compiled).temporaries / GIB:.2f} GiB")


if __name__ == "__main__":
    main()
