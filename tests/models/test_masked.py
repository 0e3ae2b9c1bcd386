"""The loss of hidden tokens: which are hidden, what the model sees, and what counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.masked import EVERY, MaskedTokenLoss
from jaxscale.ops.draws import with_token_keys
from jaxscale.ops.precision import Policy
from jaxscale.types import InputError
from tests.parallel.comparison import dense, make_batch, make_params, on_mesh, relative_errors

MODEL = dataclasses.replace(dense(), is_causal=False)
MASK = 63


def bert():
    """A model with what BERT has."""
    (layer,) = MODEL.pattern
    # Without the bias of keys, whose gradient is zero: a softmax does not see it.
    plain = dict(rotary=None, qk_norm=None, biases=("q", "v", "o"))
    attention = dataclasses.replace(layer.attention, **plain)
    return dataclasses.replace(
        MODEL,
        pattern=(dataclasses.replace(layer, attention=attention, norm_position="sum"),),
        use_learned_positions=True,
        num_token_types=2,
        use_embedding_norm=True,
        head_activation="gelu_exact",
        is_tied=True,
        use_head_bias=True,
    )


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def loss_of(model=MODEL, **fields):
    policy = Policy("float64", "float64", "float64", "float64")
    execution = ExecutionConfig(num_loss_chunks=2)
    return MaskedTokenLoss(model, policy, execution, mask_id=MASK, **fields)


def large_batch():
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 60, (64, 256)))
    positions = jnp.broadcast_to(jnp.arange(256), tokens.shape)
    return {"tokens": tokens, "positions": positions}


def test_of_the_hidden_tokens_most_are_masked_and_some_are_others():
    batch = with_token_keys(large_batch(), jax.random.key(0))
    seen, is_hidden = map(np.asarray, loss_of().hidden(batch))
    tokens = np.asarray(batch["tokens"])
    assert is_hidden.mean() == pytest.approx(0.15, abs=0.01)
    np.testing.assert_array_equal(seen[~is_hidden], tokens[~is_hidden])
    of_hidden = seen[is_hidden]
    assert (of_hidden == MASK).mean() == pytest.approx(0.8, abs=0.03)
    # Another token is the same one in 64 cases once.
    assert (of_hidden == tokens[is_hidden]).mean() == pytest.approx(0.1, abs=0.03)


def test_without_draws_the_same_positions_are_hidden():
    seen, is_hidden = map(np.asarray, loss_of().hidden(large_batch()))
    np.testing.assert_array_equal(np.flatnonzero(is_hidden[0]), np.arange(EVERY - 1, 256, EVERY))
    assert (seen[is_hidden] == MASK).all()


def test_the_loss_is_that_of_the_hidden_tokens_alone():
    batch, loss = make_batch(), loss_of()
    _, is_hidden = loss.hidden(batch)
    run = jax.jit(lambda params, batch: loss(params, batch, None)[:2])
    sum_loss, weight = run(make_params(MODEL), batch)
    assert weight == (batch["weights"] * is_hidden).sum() > 0
    # What stands at a hidden place is the label, and the labels of the next tokens are not read.
    assert run(make_params(MODEL), batch | {"labels": batch["labels"] * 0})[0] == sum_loss


@pytest.mark.parametrize(
    "sizes", [dict(sequence=2, tensor=2), dict(pipeline=2, num_microbatches=2)], ids=str
)
def test_on_a_mesh_it_is_that_of_one_device(sizes):
    """With draws, which do not depend on the mesh."""
    model = bert()
    loss = loss_of(model)
    wanted, wanted_gradients = jax.device_get(on_mesh(model, loss))
    found, gradients = jax.device_get(on_mesh(model, loss, **sizes))
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-9)
    errors = relative_errors(gradients, wanted_gradients)
    assert all(error <= 1e-9 for error in errors.values()), errors


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        (dense(), {}, "is_causal: given True, expected False for hidden tokens"),
        (MODEL, {"fraction": 1.0}, "fraction: given 1.0, expected 0 < fraction < 1"),
    ],
)
def test_a_wrong_setting_is_named(model, fields, message):
    with pytest.raises(InputError, match=message):
        loss_of(model, **fields)
