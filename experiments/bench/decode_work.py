"""What the benchmarks of decoding ask for, and how they time it; nothing of jaxscale in it."""

import dataclasses
import time

import decode_peer as peer
import jax
import jax.numpy as jnp

END = 0  # the end token


@dataclasses.dataclass(frozen=True)
class Work:
    """A model's shape and what it decodes.

    Args:
        shape: of the model.
        prompt: tokens of the prompt that is continued alone.
        num_prompts, long_prompt: the batch, and the tokens of each of its prompts.
        num_new: new tokens of each prompt.
    """

    shape: peer.Shape
    prompt: int
    num_prompts: int
    long_prompt: int
    num_new: int


FULL = Work(
    shape=peer.Shape(V=32064, L=16, D=2048, N=16, K=8, H=128, F=8192),
    prompt=172,
    num_prompts=64,
    long_prompt=1200,
    num_new=128,
)
TINY = Work(
    shape=peer.Shape(V=4100, L=2, D=16, N=4, K=2, H=4, F=32),
    prompt=12,
    num_prompts=3,
    long_prompt=20,
    num_new=8,
)


def seconds(generate, params, prompts):
    """(of one call, number of new tokens of each prompt); the tokens are on the host then."""
    began = time.perf_counter()
    outputs = generate(params, prompts)
    return time.perf_counter() - began, [len(output) for output in outputs]


def measure(generate, params, work):
    """{"tokens_per_second": decoding of one prompt, "requests_per_second": of the batch}.

    The rate of the one prompt is that of decoding alone. What the prompt takes is measured by the
    same program, with a head of zeros: the first token is END then, which ends the loop before its
    first step.

    Args:
        generate: (params, prompts) -> new tokens of each prompt, at most `work.num_new`; END ends.
        params: parameter tree of an untied model.
        work: what to decode.
    """
    zeros = jax.tree.map(jnp.zeros_like, params["head"])
    one, many = [[1] * work.prompt], [[1] * work.long_prompt] * work.num_prompts
    prompt_s, num_new = seconds(generate, params | {"head": zeros}, one)
    assert num_new == [1]
    whole_s, num_new = seconds(generate, params, one)
    batch_s, num_new_of_batch = seconds(generate, params, many)
    assert {*num_new, *num_new_of_batch} == {work.num_new}
    return {
        "tokens_per_second": (work.num_new - 1) / (whole_s - prompt_s),
        "requests_per_second": work.num_prompts / batch_s,
    }


class PlainLoop:
    """The peer's steps on one prompt, issued without waiting."""

    def __init__(self, work):
        self.work = work
        self.weights = peer.draw_weights(work.shape)
        self.caches = peer.empty_caches(work.shape, 1, work.prompt + work.num_new)

    def measure(self):
        """The rate of decoding behind a prompt, for which what lies in the caches does."""
        began = time.perf_counter()
        token, position = jnp.zeros(1, jnp.int32), jnp.int32(self.work.prompt)
        for _ in range(self.work.num_new):
            self.caches, token, position = peer.step(
                self.weights, self.caches, token, position, shape=self.work.shape
            )
        jax.block_until_ready(token)
        return {"tokens_per_second": self.work.num_new / (time.perf_counter() - began)}
