"""The search of hetu-galvatron 2.4.0 over what galvatron_profile.py wrote; its plan and seconds.

PYTHONPATH=<its source> python experiments/bench/galvatron_search.py --folder /tmp/galvatron

Needs hetu-galvatron, of which the module `galvatron_dp_core` is compiled, and PyTorch; no jaxscale.
"""

import argparse
import json
import pathlib
import sys
import time
import types

import galvatron


def search_engine():
    """Its class, without its runtime, which needs GPUs."""
    core = types.ModuleType("galvatron.core")
    core.__path__ = [str(pathlib.Path(galvatron.__file__).parent / "core")]
    sys.modules["galvatron.core"] = core
    from galvatron.core.search_engine import GalvatronSearchEngine, arguments

    parser = arguments.galvatron_search_args(argparse.ArgumentParser())
    return GalvatronSearchEngine, parser


def main():
    """Search and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--sequence", default="tp", help="sp_space: tp, or tp+sp with Ulysses")
    parser.add_argument("--chunks", default="-1", help="micro-batches; -1 for all")
    options = parser.parse_args()
    folder = options.folder
    given = json.loads(pathlib.Path(folder, "given.json").read_text())
    engine_class, its_parser = search_engine()
    values = {
        "num_nodes": given["hosts"],
        "num_gpus_per_node": given["devices_per_host"],
        "memory_constraint": given["limit_gib"],
        "settle_bsz": given["batch_size"],
        "settle_chunk": options.chunks,
        "max_pp_deg": given["hosts"] * given["devices_per_host"],
        "pipeline_type": "pipedream_flush",
        "default_dp_type": "zero2",
        "sp_space": options.sequence,
        "output_config_path": folder,
        "log_dir": f"{folder}/logs",
    }
    kinds = ("memory_profiling", "time_profiling", "overlap_coe", "sp_time")
    values |= {f"{kind}_path": folder for kind in kinds}
    values |= {f"{kind}_bandwidth_config_path": folder for kind in ("allreduce", "p2p")}
    words = [f"--{name}={value}" for name, value in values.items()]
    arguments = its_parser.parse_args(words)
    arguments.sequence_parallel = True  # Megatron's, with the tensor group
    arguments.hidden_size = given["layers"][0]["hidden_size"]
    engine = engine_class(arguments)
    engine.set_search_engine_info(folder, given["layers"], "bert")
    engine.set_model_type("bert")
    began, processor = time.perf_counter(), time.process_time()
    engine.initialize_search_engine()
    throughput = engine.parallelism_optimization()
    clock, processor = time.perf_counter() - began, time.process_time() - processor
    step_s = given["batch_size"] / throughput
    print(json.dumps({"step_s": step_s, "processor_s": processor, "clock_s": clock}))


if __name__ == "__main__":
    main()
