"""Log-probabilities of labels, and sums of them by row and by document, against full logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.models.config import AttentionConfig, FeedForwardConfig, LayerConfig, ModelConfig
from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.losses import (
    NextTokenLoss,
    document_numbers,
    row_numbers,
    sum_by_group,
    token_log_probabilities,
)
from jaxscale.ops.collectives import Collectives
from jaxscale.types import InputError
from tests.models.examples import FLOAT32, MODELS, make_batch, make_params

LAYER = LayerConfig(AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8), FeedForwardConfig(16))
MODEL = ModelConfig(
    vocab_size=40,
    num_layers=1,
    model_dim=16,
    max_length=16,
    pattern=(LAYER,),
    use_head_bias=True,
    logit_softcap=3.0,
)
BATCH = make_batch()
# Two labels outside the vocabulary.
BATCH["labels"] = BATCH["labels"].at[0, 3].set(-100).at[1, 7].set(40)


def decoder_of(num_loss_chunks, config=MODEL):
    execution = ExecutionConfig(False, "none", num_loss_chunks=num_loss_chunks)
    return Decoder(config, policy=FLOAT32, execution=execution)


def log_probabilities(params, num_loss_chunks):
    """By the function under test: [B, T]."""
    decoder = decoder_of(num_loss_chunks)
    x, _, _ = decoder.run_layers(params, decoder.embed(params, BATCH), decoder.tokens(BATCH))
    return token_log_probabilities(decoder, params, x, BATCH["labels"])


def of_full_logits(params):
    """By the softmax of all logits, 0 for a label outside the vocabulary."""
    logits, _ = decoder_of(1).logits(params, BATCH)
    p = jax.nn.log_softmax(logits)
    labels = BATCH["labels"]
    is_known = (labels >= 0) & (labels < 40)
    found = jnp.take_along_axis(p, jnp.where(is_known, labels, 0)[..., None], -1)[..., 0]
    return jnp.where(is_known, found, 0)


def value_and_gradient(f):
    """The values, and the gradient of a sum of them that weights each token otherwise."""

    def total(params):
        found = f(params)
        weights = jnp.cos(jnp.arange(found.size)).reshape(found.shape)
        return (weights * found).sum(), found

    gradient, found = jax.jit(jax.grad(total, has_aux=True))(make_params(MODEL))
    return found, gradient


@functools.cache
def wanted():
    return value_and_gradient(of_full_logits)


@pytest.mark.parametrize("num_loss_chunks", [pytest.param(1, marks=pytest.mark.long), 4])
def test_they_are_those_of_the_full_logits_with_their_gradient(num_loss_chunks):
    found, gradient = value_and_gradient(lambda p: log_probabilities(p, num_loss_chunks))
    np.testing.assert_allclose(found, wanted()[0], atol=1e-5)
    assert (found[0, 3], found[1, 7]) == (0, 0)
    for got, want in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted()[1]), strict=True):
        assert jnp.abs(got - want).max() <= 1e-5 * jnp.abs(want).max()


def test_their_weighted_sum_is_the_loss():
    """Of a dense model without a z-loss; a label outside the vocabulary has no weight."""
    loss = NextTokenLoss(MODEL, FLOAT32, ExecutionConfig(remat="none", num_loss_chunks=4))
    nll, weight, _ = jax.jit(lambda params: loss(params, BATCH, None))(make_params(MODEL))
    found = np.asarray(wanted()[0])
    np.testing.assert_allclose(nll, -(found * BATCH["weights"]).sum(), rtol=1e-5)
    assert weight == counted_weights().sum()


def counted_weights():
    is_known = (BATCH["labels"] >= 0) & (BATCH["labels"] < MODEL.vocab_size)
    return BATCH["weights"] * is_known


def test_a_label_outside_the_vocabulary_does_not_count_even_in_the_z_loss():
    execution = ExecutionConfig(remat="none", num_loss_chunks=4)
    loss = NextTokenLoss(MODEL, FLOAT32, execution, z_loss=0.1)
    run = jax.jit(lambda batch: loss(make_params(MODEL), batch, None)[:2])
    assert counted_weights().sum() < BATCH["weights"].sum()
    for got, wanted in zip(run(BATCH), run(BATCH | {"weights": counted_weights()}), strict=True):
        assert got == wanted


def test_a_number_of_chunks_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match=r"num_loss_chunks: given 3, .* 16 % 3 is not 0"):
        jax.eval_shape(lambda params: log_probabilities(params, 3), make_params(MODEL))


def test_the_logits_of_one_chunk_exist_at_a_time():
    """In the gradient too; a vocabulary that dwarfs all else."""

    def temporaries(num_loss_chunks):
        decoder = decoder_of(num_loss_chunks)
        head = jax.ShapeDtypeStruct((8192, 16), "float32")
        x = jax.ShapeDtypeStruct((2, 64, 16), "float32")
        params = {
            "final_norm": {"scale": jax.ShapeDtypeStruct((16,), "float32")},
            "head": {"weights": head, "bias": jax.ShapeDtypeStruct((8192,), "float32")},
        }
        labels = jax.ShapeDtypeStruct((2, 64), "int32")

        def total(x, params, labels):
            return token_log_probabilities(decoder, params, x, labels).sum()

        compiled = jax.jit(jax.grad(total)).lower(x, params, labels).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 4 * 2 * 64 * 8192
    assert temporaries(8) < logits < temporaries(1)


# Sums by group


def sums_of(values, groups, num_groups):
    return sum_by_group(values, groups, num_groups, Collectives())


def test_sums_by_row_and_by_document():
    """Padding belongs to a row but to no document."""
    values = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16)), jnp.float32)
    by_row = sums_of(values, row_numbers(BATCH), 2)
    np.testing.assert_allclose(by_row, values.sum(1), rtol=1e-5)
    by_document = sums_of(values, document_numbers(BATCH, 3), 6).reshape(2, 3)
    documents = [values[:, :5].sum(1), values[:, 5:12].sum(1), jnp.zeros(2)]
    np.testing.assert_allclose(by_document, jnp.stack(documents, 1), rtol=1e-5)


def test_documents_beyond_the_largest_number_are_left_out():
    """And do not run into the next row."""
    groups = document_numbers(BATCH, 1)
    np.testing.assert_array_equal(groups[1, :5], 1)
    np.testing.assert_array_equal(groups[:, 5:], -1)
    np.testing.assert_array_equal(sums_of(jnp.ones((2, 16)), groups, 2), [5, 5])


def test_a_group_outside_the_range_is_left_out():
    groups = jnp.asarray([[0, 1, -1, 2, 1, -7]])
    values = jnp.asarray([[1.0, 2.0, 4.0, 8.0, 16.0, 32.0]])
    np.testing.assert_array_equal(sums_of(values, groups, 2), [1, 18])


def test_a_token_s_gradient_is_that_of_its_group():
    groups = jnp.asarray([[0, 1, -1, 2, 1, 0]])
    factors = jnp.asarray([3.0, 5.0])

    def total(values):
        return (factors * sums_of(values, groups, 2)).sum()

    np.testing.assert_array_equal(jax.grad(total)(jnp.ones((1, 6))), [[3, 5, 0, 0, 5, 3]])


@pytest.mark.long
def test_a_preference_between_two_rows_is_differentiable():
    """Such as DPO's: -log sigmoid of the difference of two rows' log-probabilities."""

    def preference(sums):
        return -jax.nn.log_sigmoid(sums[0] - sums[1])

    def loss(of_tokens):
        def total(params):
            values = of_tokens(params) * BATCH["weights"]
            return preference(sums_of(values, row_numbers(BATCH), 2))

        return total

    def plain(params):
        return preference((of_full_logits(params) * BATCH["weights"]).sum(1))

    chunked = loss(lambda params: log_probabilities(params, 4))
    got = jax.jit(lambda params: [jax.grad(f)(params) for f in (chunked, plain)])
    ours, theirs = got(make_params(MODEL))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert jnp.abs(a - b).max() <= 1e-5 * jnp.abs(b).max()


@pytest.mark.long
@pytest.mark.parametrize("name", ["mixture", "gpt2", "post_norms"])
def test_they_are_those_of_the_full_logits_of_other_models(name):
    params, config = make_params(MODELS[name]), MODELS[name]
    decoder = decoder_of(2, config)

    @jax.jit
    def both(params):
        x = decoder.embed(params, BATCH)
        x, _, _ = decoder.run_layers(params, x, decoder.tokens(BATCH))
        logits, _ = decoder.logits(params, BATCH)
        return token_log_probabilities(decoder, params, x, BATCH["labels"]), logits

    found, logits = both(params)
    labels = jnp.clip(BATCH["labels"], 0, 39)
    plain = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]
    is_known = labels == BATCH["labels"]
    np.testing.assert_allclose(found, jnp.where(is_known, plain, 0), atol=1e-5)
