"""A tiny Phi-3-small, with LongRoPE beside its blocks, is served as its own forward computes it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.convert.families.phi3small import PHI3_SMALL
from jaxscale.convert.folder import read_config
from jaxscale.kernels.paged_attention import api as paged_api
from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import ExecutionConfig
from jaxscale.ops.attention import paged, paged_kernels
from jaxscale.ops.precision import Policy
from jaxscale.serve import programs
from jaxscale.serve.config import EngineConfig
from jaxscale.serve.engine import Engine
from jaxscale.serve.requests import RequestConfig
from jaxscale.serve.sampling import SamplingConfig
from tests.convert.test_phi3_small import RELEASED
from tests.kernels.interpretation import interpret_of, skip_unless_runnable
from tests.serve.test_decoding import params_of

HALF = 32  # of a head, elements that are rotated by an angle of their own
SCALING = {
    "type": "longrope",
    "short_factor": [1.0] * HALF,
    "long_factor": [1.0 + 0.1 * i for i in range(HALF)],
    "short_mscale": 1.1,
    "long_mscale": 1.2,
    "original_max_position_embeddings": 200,
}
# Heads of a group differ in what they see: the stride is no multiple of the group of 4.
TINY = RELEASED | {
    "hidden_size": 8 * 2 * HALF,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "ff_intermediate_size": 64,
    "vocab_size": 61,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "blocksparse_num_local_blocks": 1,
    "blocksparse_vert_stride": 6,
    "rope_scaling": SCALING,
}
SIZES = EngineConfig(
    token_budget=96,
    max_sequences=4,
    max_prompts=3,
    num_blocks=24,
    use_prefix_cache=False,
)
NEW = 3
# One that LongRoPE takes its second factors for from the start, one shorter than a block, one that
# outgrows the first factors while it decodes.
LENGTHS = 260, 5, 199


@functools.cache
def model():
    return read_config(PHI3_SMALL, TINY, "config.json", ())


def decoder(compute):
    return Decoder(model(), policy=Policy(compute=compute), execution=ExecutionConfig(remat="none"))


@functools.cache
def forward(compute, config):
    """tokens [1, T] -> log-probabilities [T, V], of a model that may see other blocks."""
    of = dataclasses.replace(decoder(compute), config=config)

    def run(params, tokens, length):
        positions = jnp.arange(tokens.shape[1])[None]
        batch = {"tokens": tokens, "positions": positions}
        batch["segments"] = (positions < length).astype(jnp.int32)
        logits = of.logits(params, batch)[0]
        return jax.nn.log_softmax(logits[0].astype(jnp.float32))

    return jax.jit(run)


def scores(compute, config, prompt, tokens):
    """Log-probabilities of a prompt's tokens but the first, and of those that follow.

    Each is that of a forward over what was known when it was drawn.
    """

    def of(text):
        row = np.zeros((1, 320), np.int32)
        row[0, : len(text)] = text
        return np.asarray(forward(compute, config)(params_of(model()), row, len(text)))

    known = of(prompt)[np.arange(len(prompt) - 1), prompt[1:]]
    contexts = [prompt + tokens[:i] for i in range(len(tokens))]
    drawn = [of(text)[len(text) - 1, token] for text, token in zip(contexts, tokens, strict=True)]
    return np.array([*known, *drawn])


def served(compute):
    """[(prompt, tokens, log-probabilities of all but the first)]."""
    engine = Engine(decoder(compute), params_of(model()), config=SIZES)
    prompts = [np.random.default_rng(0).integers(0, 61, num).tolist() for num in LENGTHS]
    sampling = SamplingConfig(temperature=0)
    config = RequestConfig(sampling, NEW, num_logprobs=0, num_prompt_logprobs=0)
    found = []
    for prompt, (one,) in zip(prompts, engine.generate(prompts, config), strict=True):
        values = [each.drawn for each in (*one.prompt_logprobs, *one.logprobs)]
        found.append((prompt, one.tokens, np.array(values)))
    return found


def dense():
    """The model whose heads see all keys."""
    attention = dataclasses.replace(model().layers[0].attention, layout=None)
    layers = (dataclasses.replace(each, attention=attention) for each in model().pattern)
    return dataclasses.replace(model(), pattern=tuple(layers))


def test_log_probabilities_are_those_of_the_forward():
    """By the reference, in float32."""
    for prompt, tokens, found in served("float32"):
        wanted = scores("float32", model(), prompt, tokens)
        np.testing.assert_allclose(found, wanted, atol=1e-4)
        all_seen = scores("float32", dense(), prompt, tokens)
        assert (len(prompt) < 64) == np.allclose(found, all_seen, atol=1e-4)


@pytest.fixture
def own_programs():
    """Compiled programs that no other test gets, nor this one from others."""
    for made in (programs.forward_program, programs.loop_program):
        made.cache_clear()
    yield
    for made in (programs.forward_program, programs.loop_program):
        made.cache_clear()


@pytest.mark.long
@pytest.mark.usefixtures("own_programs")
@pytest.mark.parametrize("family", ["mosaic", "triton"])
def test_kernels_read_the_blocks_that_heads_see(family, monkeypatch, caplog):
    """In bfloat16, prompts split and beside decoding sequences, and decoding alone."""
    skip_unless_runnable(family)
    monkeypatch.setattr(paged, "kernel_family", lambda: family)
    interpreted = [(paged_api, name) for name in ("ragged_attention", "paged_attention")]
    for module, name in [*interpreted, (paged_kernels, "attention")]:
        run = functools.partial(getattr(module, name), interpret=interpret_of(family))
        monkeypatch.setattr(module, name, run)
    with caplog.at_level("INFO", logger="jaxscale"):
        answers = served("bfloat16")
    assert f"backend {family} for" in caplog.text and "the blocks that heads see" in caplog.text
    assert ("backend ragged for" in caplog.text) == (family == "mosaic")
    # The kernel in Triton takes single tokens alone.
    assert ("backend reference" in caplog.text) == (family == "triton")
    for prompt, tokens, found in answers:
        error = np.abs(found - scores("bfloat16", model(), prompt, tokens))
        assert error.max() < 0.01
        all_seen = np.abs(found - scores("bfloat16", dense(), prompt, tokens))
        assert len(prompt) < 64 or np.median(all_seen) > 5 * np.median(error)
