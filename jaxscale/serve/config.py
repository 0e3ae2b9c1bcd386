"""Sizes and policies of an engine, and the pages for which a device has room."""

import dataclasses
import logging
import math
import operator
from typing import Literal

import jax

from jaxscale.models.decoder import Decoder
from jaxscale.ops.device import kernel_family
from jaxscale.serve.packing import Buckets, powers_up_to
from jaxscale.serve.plan import SchedulerConfig
from jaxscale.types import InputError, Params, check_not_negative, check_positive, check_types

logger = logging.getLogger(__name__)

SCALE_BYTES = 2
HOST_CACHE_BYTES = 2**28  # of a cache whose size is not given, where a device has no limit


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes and policies of an engine.

    Args:
        token_budget, max_sequences, policy, admission, use_prefix_cache: as
            `plan.SchedulerConfig`.
        steps_a_launch: likewise; None takes 8 on a GPU, whose steps may be shorter than what the
            host does for one. A client gets as many tokens at a time.
        block_size: tokens a page of the cache.
        cache_dtype: of keys and values; None for the compute type. In 8 bits there is a scale a
            token and head and twice as many tokens fit; the kernel for Hopper GPUs reads them if
            the head dim is a multiple of 128.
        num_blocks: pages; None takes `memory_fraction` of what the device has left.
        memory_fraction: of the device's memory that weights and cache may fill.
        host_bytes: of the host's memory, for blocks of prefixes for which the device has no room
            any more.
        max_prompts: prompts of which a step runs a piece.
        max_extra: as `plan.SchedulerConfig`.
        num_drafts: tokens of a sequence that are guessed and checked in one step, at most; 0 for
            none. See `serve.drafting`.
    """

    token_budget: int = 2048
    max_sequences: int = 256
    policy: Literal["splitfuse", "prefill_first"] = "splitfuse"
    admission: Literal["lifetime", "growth"] = "lifetime"
    use_prefix_cache: bool = True
    block_size: int = 64
    cache_dtype: Literal["int8", "float8_e4m3fn"] | None = None
    num_blocks: int | None = None
    memory_fraction: float = 0.85
    host_bytes: int = 0
    max_prompts: int = 64
    max_extra: int = 256
    num_drafts: int = 0
    steps_a_launch: int | None = None

    def __post_init__(self):
        check_types(self)
        check_positive("EngineConfig.block_size", self.block_size)
        check_not_negative("EngineConfig.num_drafts", self.num_drafts)
        check_not_negative("EngineConfig.host_bytes", self.host_bytes)
        if self.num_blocks is not None:
            check_positive("EngineConfig.num_blocks", self.num_blocks)
        if not 0 < self.memory_fraction <= 1:
            expected = "0 < memory_fraction <= 1"
            raise InputError("EngineConfig.memory_fraction", self.memory_fraction, expected)
        # A configuration is made before the run's settings are applied: no device may start yet.
        steps = 1 if self.steps_a_launch is None else self.steps_a_launch
        self._scheduler(max_length=1, steps_a_launch=steps)

    def scheduler(self, max_length: int) -> SchedulerConfig:
        """The part that the scheduler takes, for a model of `max_length` tokens."""
        return self._scheduler(max_length, self._steps_a_launch)

    def _scheduler(self, max_length: int, steps_a_launch: int) -> SchedulerConfig:
        return SchedulerConfig(
            token_budget=self.token_budget,
            max_sequences=self.max_sequences,
            max_prompts=self.max_prompts,
            # The end of the longest prompt and a budget of shorter ones, which may be split too.
            max_context=self._num_pages(max_length + 2 * self.token_budget) * self.block_size,
            policy=self.policy,
            admission=self.admission,
            max_extra=self.max_extra,
            use_prefix_cache=self.use_prefix_cache,
            steps_a_launch=steps_a_launch,
        )

    def buckets(self, max_length: int) -> Buckets:
        """The sizes that are compiled, for a model of `max_length` tokens."""
        num_pages = self._num_pages(max_length)
        context = self.scheduler(max_length).max_context // self.block_size
        most = self.max_sequences
        # Our kernels pass over rows and pages of padding, which XLA's gathers read.
        is_free = kernel_family() != "xla"
        return Buckets(
            # XLA multiplies a single row by other and slower means than two.
            singles=powers_up_to(most, smallest=min(2, most), factor=4),
            mixed_singles=powers_up_to(
                most, smallest=most if is_free else min(16, most), factor=16
            ),
            # Padding is multiplied. Beside decoding sequences a step has a few new prompts, of any
            # length.
            tokens=powers_up_to(
                self.token_budget,
                smallest=-(-self.token_budget // 16),
                factor=math.sqrt(2) if is_free else 4,
            ),
            pages=powers_up_to(
                num_pages, smallest=num_pages if is_free else -(-num_pages // 4), factor=4
            ),
            # Mosaic's kernel reads pages of prompts where they lie; others gather them.
            prompt_pages=powers_up_to(
                context,
                smallest=context if kernel_family() == "mosaic" else -(-context // 4),
                factor=4,
            ),
            extra=(0, *powers_up_to(self.max_extra, smallest=min(16, self.max_extra), factor=4)),
            warm_extra=self.max_extra if self.num_drafts else 0,
            max_prompts=self.max_prompts,
            num_slots=most,
            block_size=self.block_size,
        )

    @property
    def _steps_a_launch(self) -> int:
        if self.steps_a_launch is not None:
            return self.steps_a_launch
        return 8 if jax.default_backend() == "gpu" else 1

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)


def num_blocks_for(
    decoder: Decoder,
    params: Params,
    config: EngineConfig,
    *,
    tensor: int = 1,
    draft: Decoder | None = None,
) -> int:
    """Pages for which the device has room, and no more than its sequences can fill.

    Args:
        decoder: the model.
        params: of the model, which are on the device.
        config: of the engine.
        tensor: members of a tensor group.
        draft: a model with pages beside.
    """
    size = sum(page_bytes(each, config, tensor) for each in (decoder, draft) if each)
    most = config.max_sequences * -(-decoder.config.max_length // config.block_size)
    stats = jax.tree.leaves(params)[0].devices().pop().memory_stats()
    if stats is None:
        room = HOST_CACHE_BYTES
    else:
        room = config.memory_fraction * stats["bytes_limit"] - stats["bytes_in_use"]
    num_blocks = min(math.floor(room / size) - 1, most)
    if num_blocks < 1:
        expected = f"room for a page of {size} bytes, here {math.floor(room)} bytes are left"
        raise InputError("EngineConfig.memory_fraction", config.memory_fraction, expected)
    logger.info(
        "cache: %d blocks of %d tokens, %.2f GiB",
        num_blocks,
        config.block_size,
        num_blocks * size / 2**30,
    )
    return num_blocks


def page_bytes(decoder: Decoder, config: EngineConfig, tensor: int = 1) -> int:
    """Of a page of all layers together, of one of `tensor` members."""
    is_quantised = config.cache_dtype is not None
    itemsize = jax.numpy.dtype(config.cache_dtype or decoder.policy.compute).itemsize
    head_bytes = [
        itemsize * layer.attention.head_dim + SCALE_BYTES * is_quantised
        for layer in decoder.config.layers
    ]
    # Of one member, which has a kv head at least.
    heads = [max(layer.attention.num_kv_heads // tensor, 1) for layer in decoder.config.layers]
    return 2 * config.block_size * sum(map(operator.mul, heads, head_bytes))
