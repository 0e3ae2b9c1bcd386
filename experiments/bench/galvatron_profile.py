"""What hetu-galvatron's profilers would measure, by our planner's costs, for galvatron_search.py.

python experiments/bench/galvatron_profile.py experiments/configs/papers/rannc_bert.gin \\
    --devices v100_32gb:4x8 --folder /tmp/galvatron

Milliseconds and MiB of a row through one layer, GB/s and milliseconds of groups. Of memory it may
use as much as our planner does.
"""

import json
import math
import pathlib

from gin_run import make_parser

from jaxscale import tree
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.planner.cluster import Cluster, group_of
from jaxscale.planner.layer_time import LayerClock
from jaxscale.run.compile import LARGEST_SHARE
from jaxscale.run.planned import SHARE_OF_LIMIT, job_of
from jaxscale.run.run import load_run

MIB, GB = 2**20, 1e9
SHARES, SIZES = (1, 2, 4, 8), (2, 4, 8, 16, 32)
MASTER, STATE = 4, 16  # bytes of a parameter, and of all that a step has of it


def of_model(job, clock):
    """Times and memory of a layer and of what is around the layers, for one row."""
    (work,), length, model = job.period_work, job.length, job.model
    forward = clock.layer(work, length, "none", MeshConfig())[0].sum()
    row = f"bsz8_seq{length}"
    times = {f"layertype_0_{row}": forward * 1e3}
    times[f"layertype_other_{row}"] = clock.head(length, 1) / 3 * 1e3
    of_row = length * job.width / MIB
    kept = {t: work.all.on_device(MeshConfig(tensor=t), 1.0) * of_row for t in SHARES}
    kept["checkpoint"] = model.model_dim * of_row
    leaves = tree.flatten(job.table["layers"]).values()
    elements = sum(math.prod(leaf.shape) for leaf in leaves) / model.num_layers
    layer = {"parameter_size": elements * MASTER / MIB, "tp_activation_per_bsz_dict": kept}
    table = STATE * model.vocab_size * model.model_dim / MIB
    logits = {t: model.vocab_size * of_row / t for t in SHARES}

    def around(num_tables):
        states = {t: num_tables * table / t for t in SHARES}
        return {length: {"model_states": states, "activation": logits}}

    memory = {"layertype_0_sp": {length: layer}, "other_memory_pp_off_sp": around(2)}
    memory |= {f"other_memory_pp_on_{end}_sp": around(1) for end in ("first", "last")}
    return times, memory


def of_links(cluster):
    """Rates of sums and of sending on, and times of a tensor group's exchanges."""
    sums, exchanges = {}, {}
    for size in SIZES:
        near = group_of(cluster, MeshConfig(tensor=size), ("tensor",))
        apart = MeshConfig(data=size, tensor=cluster.num_devices // size)
        sums[f"allreduce_size_{size}_consec_1"] = near.bandwidth / GB
        sums[f"allreduce_size_{size}_consec_0"] = group_of(cluster, apart, ("data",)).bandwidth / GB
        for mib in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
            name = f"size_{size}_{mib}MB_time"
            exchanges[f"allreduce_{name}"] = near.all_reduce_s(mib * MIB) * 1e3
            exchanges[f"all2all_{name}"] = near.all_to_all_s(mib * MIB) * 1e3
    mesh = MeshConfig(pipeline=cluster.num_hosts, data=cluster.devices_per_host)
    hop = group_of(cluster, mesh, ("pipeline",)).bandwidth / GB
    return sums, {f"pp_size_{size}": hop for size in SIZES}, exchanges


def main():
    """Write the files."""
    parser = make_parser(__doc__)
    parser.add_argument("--devices", required=True)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    options = parser.parse_args()
    job = job_of(load_run([options.file], options.set))
    cluster = Cluster.parse(options.devices)
    times, memory = of_model(job, LayerClock(job, cluster))
    sums, hops, exchanges = of_links(cluster)
    model, limit = job.model, cluster.device.memory_bytes * LARGEST_SHARE * SHARE_OF_LIMIT
    shape = {"hidden_size": model.model_dim, "layer_num": model.num_layers, "seq_len": job.length}
    given = {"layers": [shape], "batch_size": job.batch_size, "limit_gib": int(limit / 2**30)}
    given |= {"hosts": cluster.num_hosts, "devices_per_host": cluster.devices_per_host}
    hosts = f"{cluster.num_hosts}nodes_{cluster.devices_per_host}gpus_per_node"
    files = {"computation_profiling_bf16_bert": times, "memory_profiling_bf16_bert": memory}
    files |= {f"allreduce_bandwidth_{hosts}": sums, f"p2p_bandwidth_{hosts}": hops}
    files |= {f"sp_time_{hosts}": exchanges, "overlap_coefficient": {"overlap_coe": 1.1}}
    options.folder.mkdir(exist_ok=True)
    for name, content in (files | {"given": given}).items():
        (options.folder / f"{name}.json").write_text(json.dumps(content))


if __name__ == "__main__":
    main()
