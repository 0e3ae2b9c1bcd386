"""A tiny byte model and an engine of it, which several tests share."""

import functools

import jax
import numpy as np

from jaxscale.data.tokenizer import ByteTokenizer
from jaxscale.models.config.facts import from_flat
from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.parameters import abstract_params, parameter_table
from jaxscale.ops.precision import Policy
from jaxscale.serve.config import EngineConfig
from jaxscale.serve.engine import Engine

BYTE_MODEL = from_flat(
    vocab_size=258,
    num_layers=1,
    model_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=32,
    max_length=128,
)
SIZES = dict(token_budget=16, max_sequences=8, block_size=8, max_prompts=4, num_blocks=64)


@functools.cache
def byte_decoder():
    """In float32."""
    execution = ExecutionConfig(is_scanned=False, remat="none")
    return Decoder(BYTE_MODEL, policy=Policy(compute="float32"), execution=execution)


@functools.cache
def byte_params():
    """Normal draws by numpy."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jax.device_put((rng.normal(size=leaf.shape) * 0.3).astype(leaf.dtype)),
        abstract_params(parameter_table(BYTE_MODEL), "float32"),
    )


def byte_engine(tokenizer=None, **changes):
    """A new engine with texts."""
    config = EngineConfig(**SIZES | changes)
    tokenizer = tokenizer or ByteTokenizer()
    return Engine(byte_decoder(), byte_params(), config=config, tokenizer=tokenizer)
