"""The requests of serving.py and its peer vllm_serving.py; nothing of jaxscale or vLLM in it."""

import numpy as np

# Prompt, new tokens, requests: vLLM's three workloads, and one sequence alone.
WORKLOADS = ((1200, 128, 1024), (2600, 60, 512), (512, 512, 512), (172, 512, 1))


def draw(prompt, new, count, vocab_size):
    """(prompts of random tokens, numbers of new ones); lengths are Normal(mean, 0.3 mean)."""
    rng = np.random.default_rng(0)
    prompts, lengths = (
        np.clip(rng.normal(mean, 0.3 * mean, count), 4, 2.5 * mean).astype(int)
        for mean in (prompt, new)
    )
    return [rng.integers(0, vocab_size, each).tolist() for each in prompts], lengths
