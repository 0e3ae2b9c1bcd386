"""Times the Triton kernels on the GPU at hand, each with several block sizes."""

import dataclasses
import functools
import importlib.resources
import itertools
import json
import string
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxscale.kernels.attention.api import HEAD_DIMS
from jaxscale.kernels.attention.tiles import BlockLayout
from jaxscale.kernels.evoformer_attention.api import WIDTHS
from jaxscale.kernels.triton_call import Blocks, on_trial, package_blocks

REPEATS, ROUNDS = 10, 3


@dataclasses.dataclass(frozen=True)
class Problem:
    """What one operation is timed at.

    Args:
        operation: as `triton_call.operations` has it.
        run: the function that is timed.
        arguments: its arrays, or trees of them.
        candidates: the block sizes that are tried.
    """

    operation: str
    run: Callable
    arguments: tuple[Any, ...]
    candidates: tuple[Blocks, ...]


def problems() -> Iterator[Problem]:
    """One for each operation, at shapes of a model of a few billion parameters."""
    yield from _matmuls()
    yield _norm()
    for head_dim in HEAD_DIMS["triton"]:
        yield from _attention(head_dim)
    for width in WIDTHS:
        yield from _evoformer_attention(width)
    yield _paged_attention()


def _problem(operation: str, run: Callable, *arguments: Any) -> Problem:
    """With all combinations of the sizes that are to be tried for the operation."""
    without_head_dim = operation.rstrip(string.digits + ".")
    sizes = _candidates()[without_head_dim]
    combinations = itertools.product(*sizes.values())
    candidates = tuple(Blocks(**dict(zip(sizes, each))) for each in combinations)
    return Problem(operation, run, arguments, candidates)


@functools.cache
def _candidates() -> dict[str, dict[str, list[int]]]:
    """Operation -> field of `Blocks` -> sizes."""
    folder = importlib.resources.files("jaxscale.kernels")
    return json.loads((folder / "triton_candidates.json").read_text())


def _matmuls() -> Iterator[Problem]:
    # Triton is optional, so kernels are imported where they are used.
    from jaxscale.kernels.grouped_matmul import triton as grouped_matmul
    from jaxscale.kernels.linear_cross_entropy import triton as linear_cross_entropy

    num_tokens, model_dim, ffn_dim, vocab_size, num_experts = 8192, 2048, 4096, 32768, 8
    rows = _draw(num_tokens, model_dim)
    cotangent = _draw(num_tokens, ffn_dim)
    weights = _draw(num_experts, model_dim, ffn_dim)
    head = _draw(vocab_size, model_dim)
    sizes = jnp.full(num_experts, num_tokens // num_experts, jnp.int32)

    def multiply(rows, weights, sizes):
        return grouped_matmul.forward((rows,), (weights,), sizes, is_transposed=False)

    gradient = grouped_matmul.weight_gradient
    yield _problem("grouped_matmul.forward", multiply, rows, weights, sizes)
    yield _problem("grouped_matmul.weight_gradient", gradient, rows, cotangent, sizes)
    yield _problem("linear_cross_entropy", linear_cross_entropy.exponentials, rows, head)


def _norm() -> Problem:
    from jaxscale.kernels.rms_norm import triton as rms_norm

    def gradient(x, scale):
        return rms_norm.backward(x, scale, x, x, epsilon=1e-5)

    return _problem("rms_norm", gradient, _draw(8192, 4096), jnp.ones(4096))


def _attention(head_dim: int) -> Iterator[Problem]:
    """Causal attention and its gradients, and both over a layout of blocks."""
    from jaxscale.kernels.attention.triton_forward import forward
    from jaxscale.kernels.attention.triton_key_gradients import key_gradients
    from jaxscale.kernels.attention.triton_query_gradient import query_gradient

    batch, length, num_heads, kv_heads = 2, 4096, 16, 4
    q = _draw(batch, length, num_heads, head_dim)
    k = _draw(batch, length, kv_heads, head_dim)
    low = jnp.zeros((1, length), jnp.int32)
    high = jnp.arange(1, length + 1, dtype=jnp.int32)[None]
    # Times do not depend on values, so that v is k, do is q, and delta is lse.
    lse = jnp.zeros((batch, num_heads, length))
    saved = q, k, k, q, lse, lse, low, high
    gradients = {
        "key_gradients": key_gradients,
        "query_gradient": functools.partial(query_gradient, dtype=q.dtype),
    }
    for layout, name, prefix in ((None, "forward", ""), (BlockLayout(), "layout", "layout_")):
        settings = dict(scale=head_dim**-0.5, softcap=None, layout=layout, interpret=False)
        run = functools.partial(forward, **settings)
        yield _problem(f"attention.{name}.{head_dim}", run, q, k, k, low, high)
        for gradient_name, gradient in gradients.items():
            run = functools.partial(gradient, **settings)
            yield _problem(f"attention.{prefix}{gradient_name}.{head_dim}", run, *saved)


def _evoformer_attention(width: int) -> Iterator[Problem]:
    """An alignment of 512 sequences of 256 residues, and its gradients."""
    from jaxscale.kernels.evoformer_attention.triton_forward import forward
    from jaxscale.kernels.evoformer_attention.triton_key_gradients import key_gradients
    from jaxscale.kernels.evoformer_attention.triton_pair_gradient import pair_gradient
    from jaxscale.kernels.evoformer_attention.triton_query_gradient import query_gradient

    rows, length, num_heads = 512, 256, 8
    q = _draw(1, rows, length, num_heads, width)
    mask_bias = jnp.zeros((1, rows, 1, 1, length))
    pair_bias = jnp.zeros((1, 1, num_heads, length, length))
    operands = q, q, q, mask_bias, pair_bias
    # Times do not depend on values, so that do is q, and one array stands for all sums.
    of_query = jnp.ones((1, rows, num_heads, length))
    gradients = {
        "query_gradient": query_gradient,
        "key_gradients": key_gradients,
        "pair_gradient": pair_gradient,
    }
    yield _problem(f"evoformer_attention.forward.{width}", forward, *operands)
    for name, gradient in gradients.items():
        saved = operands, q, of_query, of_query, of_query
        yield _problem(f"evoformer_attention.{name}.{width}", gradient, *saved)


def _paged_attention() -> Problem:
    """Decoding of 64 sequences of 2,048 tokens."""
    from jaxscale.kernels.paged_attention import triton as paged_attention

    num_sequences, pages_each, page_size = 64, 16, 128
    num_heads, kv_heads, head_dim = 32, 8, 128
    num_pages = num_sequences * pages_each
    q = _draw(num_sequences, num_heads, head_dim)
    # Arrays of their own: what is read as keys would be in the cache as values.
    keys, values = (_draw(num_pages, page_size, kv_heads, head_dim) for _ in range(2))
    table = jnp.arange(num_pages, dtype=jnp.int32).reshape(num_sequences, pages_each)
    low = jnp.zeros(num_sequences, jnp.int32)
    high = jnp.full(num_sequences, pages_each * page_size, jnp.int32)
    decode = functools.partial(paged_attention.paged_attention, scale=0.1, softcap=None)
    return _problem("paged_attention", decode, q, keys, values, table, low, high)


def _draw(*shape: int) -> Array:
    return jax.random.normal(jax.random.key(len(shape)), shape, jnp.bfloat16)


def times(problem: Problem) -> dict[Blocks, float]:
    """Milliseconds of the package's blocks, which come first, and of each candidate.

    Those that the GPU cannot run, for want of shared memory or registers, are left out.

    Args:
        problem: what is timed.
    Raises:
        RuntimeError: it can run none of them.
    """
    found, reason = {}, None
    for blocks, compiled in compiled_with(problem).items():
        try:
            found[blocks] = milliseconds(compiled.result(), problem.arguments)
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            reason = error
    if not found:
        raise RuntimeError(f"{problem.operation}: no block sizes run here") from reason
    return found


def compiled_with(problem: Problem) -> dict[Blocks, futures.Future]:
    """The compiled problem by its blocks: the package's, and each candidate.

    It waits for all of them, because compiling would keep the host from calling at its full rate.
    """
    tried = dict.fromkeys((package_blocks(problem.operation), *problem.candidates))
    with futures.ThreadPoolExecutor() as pool:
        return {each: pool.submit(_traced(problem, each)) for each in tried}


def _traced(problem: Problem, blocks: Blocks) -> Callable[[], jax.stages.Compiled]:
    """What compiles the problem with these blocks, which are looked up while it is traced."""
    with on_trial(problem.operation, blocks):
        # A new function, because the block sizes are no argument of it.
        traced = jax.jit(lambda *arguments: problem.run(*arguments)).trace(*problem.arguments)
    return lambda: traced.lower().compile()


def milliseconds(compiled: Callable, arguments: tuple[Any, ...]) -> float:
    """Of the fastest of ROUNDS rounds of REPEATS calls."""
    jax.block_until_ready(compiled(*arguments))
    rounds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(REPEATS):
            result = compiled(*arguments)
        jax.block_until_ready(result)
        seconds = time.perf_counter() - began
        rounds.append(seconds / REPEATS * 1e3)
    return min(rounds)
