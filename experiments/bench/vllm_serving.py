"""The peer of serving.py: vLLM 0.26.0 offline, of the Llama or the Mixtral shape.

Random weights, bfloat16, greedy, no prefix cache, no tokenizer, 8,192 tokens a step; prints the
same table. vLLM compiles as it starts, into the folders VLLM_CACHE_ROOT and TRITON_CACHE_DIR.

python experiments/bench/vllm_serving.py llama --runner 2
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from serving_work import WORKLOADS, draw

LLAMA = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    vocab_size=32064,
    hidden_size=2048,
    num_hidden_layers=16,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=8192,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    hidden_act="silu",
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    torch_dtype="bfloat16",
)
MIXTRAL = LLAMA | dict(
    architectures=["MixtralForCausalLM"],
    model_type="mixtral",
    num_hidden_layers=12,
    num_key_value_heads=4,
    intermediate_size=3200,
    num_local_experts=16,
    num_experts_per_tok=2,
)
MODELS = {"llama": LLAMA, "mixtral": MIXTRAL}
SETTINGS = dict(
    load_format="dummy",
    skip_tokenizer_init=True,
    dtype="bfloat16",
    max_model_len=8192,
    max_num_batched_tokens=8192,
    max_num_seqs=512,
    enable_prefix_caching=False,
    gpu_memory_utilization=0.85,
    disable_log_stats=True,
)


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--runner", type=int, choices=(1, 2), default=1, help="vLLM's V1 or V2")
    parser.add_argument("--workloads", type=int, nargs="+", default=range(len(WORKLOADS)))
    return parser.parse_args()


def run(vllm, engine, prompts, lengths):
    """Seconds until all have their tokens."""
    began = time.perf_counter()
    greedy = dict(temperature=0, ignore_eos=True, detokenize=False)
    settings = [vllm.SamplingParams(max_tokens=int(each), **greedy) for each in lengths]
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    answers = engine.generate(inputs, settings, use_tqdm=False)
    seconds = time.perf_counter() - began
    assert [len(answer.outputs[0].token_ids) for answer in answers] == lengths.tolist()
    return seconds


def main():
    """Start vLLM, run each workload twice, and print the second run's figures."""
    options = parse_arguments()
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(options.runner - 1)
    os.environ |= dict.fromkeys(("HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS"), "1")
    os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"  # greedy: nothing is sampled
    import vllm  # it reads the environment as it is imported

    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(MODELS[options.model]))
        began = time.perf_counter()
        engine = vllm.LLM(directory, **SETTINGS)
        print(f"\nvLLM {vllm.__version__}, {options.model}, runner V{options.runner}, {SETTINGS}")
        print(f"started in {time.perf_counter() - began:.0f} s\n")
        print("| workload | requests/s | new tokens/s |\n|---|---|---|")
        for number in options.workloads:
            prompts, lengths = draw(*WORKLOADS[number], LLAMA["vocab_size"])
            run(vllm, engine, prompts, lengths)
            seconds = run(vllm, engine, prompts, lengths)
            figures = f"{len(prompts) / seconds:.2f} | {sum(lengths) / seconds:.0f}"
            print(f"| {WORKLOADS[number]} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
