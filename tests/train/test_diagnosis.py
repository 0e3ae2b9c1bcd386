"""The first tensor that is not finite is named: a parameter, an activation or a gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale import tree
from jaxscale.models.config import ModelConfig
from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.losses import token_log_probabilities
from jaxscale.ops.precision import Policy
from jaxscale.parallel.batch import place
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.train.diagnosis import first_non_finite
from tests.train.examples import make_batch, make_model, make_stacked, make_training
from tests.train.regression import StackError, make_rows


def diagnose(training, params, batch):
    batch = place(training.setup.mesh, batch)
    return first_non_finite(training.setup, params, batch, jax.random.key(0))


def changed(training, **changes):
    """The first parameters; each path of `changes`, with "__" for "/", is changed by a function."""
    by_path = {name.replace("__", "/"): change for name, change in changes.items()}

    def change(path, leaf):
        return by_path.pop(path)(leaf) if path in by_path else leaf

    params = tree.map_with_path(change, training.start().params)
    assert not by_path
    return params


def set_to(value, *where):
    return lambda leaf: leaf.at[where or slice(None)].set(value)


def test_a_parameter():
    training = make_training()
    params = changed(training, layers__0__ffn__up=set_to(jnp.nan, 1, 2, 3))
    assert diagnose(training, params, make_batch()) == "parameter layers/0/ffn/up"


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(), MeshConfig(data=2, tensor=2)],
    ids=["one_device", "mesh"],
)
def test_an_activation_that_overflows_names_its_layer(mesh):
    """Finite values of 2e38 in the second layer: their sum is not."""
    training = make_training(mesh=mesh)
    params = changed(training, layers__0__attention__v=set_to(2e38, 1))
    assert diagnose(training, params, make_batch()) == "layers/0/v, layer 1 of its stack"


@dataclasses.dataclass(frozen=True)
class LogProbabilities:
    """A loss with a loop over chunks of its own, in which the final norm stands."""

    model: ModelConfig
    execution: ExecutionConfig = ExecutionConfig(num_loss_chunks=2)

    def __call__(self, params, batch, key, *, operations):
        decoder = Decoder(self.model, operations, Policy(compute="float32"), self.execution)
        x = decoder.embed(params, batch)
        x, _, _ = decoder.run_layers(params, x, decoder.tokens(batch))
        log_p = token_log_probabilities(decoder, params, x, batch["labels"])
        return -log_p.sum(), jnp.float32(log_p.size), {}


def test_an_activation_of_a_loss_of_log_probabilities():
    training = make_training()
    setup = dataclasses.replace(training.setup, loss_fn=LogProbabilities(make_model()))
    params = changed(training, layers__0__attention__v=set_to(2e38, 1))
    name = diagnose(dataclasses.replace(training, setup=setup), params, make_batch())
    assert name == "layers/0/v, layer 1 of its stack"


# The rows of a stack in the order in which a pipeline stores them.
PADDED = MeshConfig(pipeline=2, data=2, tensor=2, stage_periods=(1, 2), zero=3), (0, None, 1, 2)
EXPERTS = dict(moe_pattern=(True,), num_experts=4, expert_dim=16)
PERMUTED = MeshConfig(pipeline=2, num_chunks=2, schedule="interleaved"), (0, 2, 1, 3)


@pytest.mark.parametrize(
    ("stored", "experts", "path", "layer", "name"),
    [
        pytest.param(
            *(PADDED, {}, "layers/0/attention/v", 2, "layers/0/v, layer 2 of its stack"),
            marks=pytest.mark.long,
        ),
        (PADDED, {}, "prefix/0/attention/v", None, "prefix/0/v"),
        (PADDED, {}, "head/weights", None, "logits"),
        pytest.param(
            *(PERMUTED, EXPERTS, "layers/0/moe/router", 1, "layers/0/router, layer 1 of its stack"),
            marks=pytest.mark.long,
        ),
    ],
    ids=["padded", "prefix", "head", "permuted"],
)
def test_an_activation_in_a_pipeline(stored, experts, path, layer, name):
    mesh, rows = stored
    num_layers = 2 + max(row for row in rows if row is not None)
    model = make_model(num_layers=num_layers, num_dense_prefix=1, **experts)
    training = make_training(model, mesh, num_microbatches=2)
    where = () if layer is None else (rows.index(layer),)
    params = changed(training, **{path.replace("/", "__"): set_to(2e38, *where)})
    assert diagnose(training, params, make_batch()) == f"{name}, micro-batch 0"


def test_a_feed_forward_that_overflows():
    """Of the last layer, which no other follows."""
    training, change = make_training(), set_to(1e25, 1)
    params = changed(training, layers__0__ffn__up=change, layers__0__ffn__down=change)
    assert diagnose(training, params, make_batch()) == "layers/0/feed_forward, layer 1 of its stack"


def test_an_output_projection_that_overflows():
    training, change = make_training(), set_to(1e25, 1)
    params = changed(training, layers__0__attention__v=change, layers__0__attention__o=change)
    assert diagnose(training, params, make_batch()) == "layers/0/attended, layer 1 of its stack"


def test_a_router_that_overflows():
    training = make_training(make_model(moe_pattern=(False, True), num_experts=4, expert_dim=16))
    params = changed(training, layers__1__moe__router=set_to(2e38))
    assert diagnose(training, params, make_batch()) == "layers/1/router, layer 0 of its stack"


def test_logits_that_overflow():
    training = make_training(mesh=MeshConfig(data=2, tensor=2))
    params = changed(training, head__weights=set_to(2e38, 7))
    assert diagnose(training, params, make_batch()) == "logits"


@pytest.mark.parametrize(
    ("label", "value", "name"), [(2, 1.0, "loss"), (9, np.nan, "parameter head/weights")]
)
def test_a_forbidden_word_is_no_fault(label, value, name):
    """But a label that is forbidden is one of the loss, which is infinite."""
    training, rows = make_training(make_model(use_head_bias=True)), make_batch()
    rows["labels"] = np.full_like(rows["labels"], label)
    params = changed(training, head__bias=set_to(-jnp.inf, 2), head__weights=set_to(value, 1, 1))
    assert diagnose(training, params, rows) == name


def test_the_micro_batch_is_named():
    """Row 2, of micro-batch 2 % 4, alone has the token that reads what overflows."""
    training, batch = make_training(num_microbatches=4), make_batch()
    is_row_2 = np.arange(8)[:, None] == 2
    batch["tokens"] = np.where(is_row_2, 31, batch["tokens"]).astype(np.int32)

    def only_token_31_has_dim_0(leaf):
        return leaf.at[:, 0].set(0).at[31].set(jnp.eye(16)[0])

    params = changed(
        training,
        embedding__tokens=only_token_31_has_dim_0,
        layers__0__attention__v=set_to(2e38, 0, 0),
    )
    name = "layers/0/v, layer 0 of its stack, micro-batch 2"
    assert diagnose(training, params, batch) == name


def test_a_loss_of_ones_own():
    """Of a loss that has no stack nothing is known but the contract."""
    training = make_training()
    trained = training.setup.loss_fn

    def loss_fn(params, batch, key, *, operations):
        loss, weight, _ = trained(params, batch, key, operations=operations)
        return loss * jnp.inf, weight, {}

    setup = dataclasses.replace(training.setup, loss_fn=loss_fn)
    batch = place(setup.mesh, make_batch())
    assert first_non_finite(setup, training.start().params, batch, jax.random.key(0)) == "loss"


def test_nothing():
    training = make_training()
    name = "nothing: this time every tensor was finite"
    assert diagnose(training, training.start().params, make_batch()) == name


@functools.partial(jax.custom_vjp)
def blow_up(x):
    return x


blow_up.defvjp(lambda x: (x, None), lambda _, g: (g * jnp.inf,))


def test_a_gradient_alone(monkeypatch):
    """The forward is finite; the backward of the final norm's input is not."""
    hidden = Decoder.hidden
    monkeypatch.setattr(
        Decoder,
        "hidden",
        lambda decoder, params, x: hidden(decoder, params, blow_up(x)),
    )
    training = make_training(num_microbatches=2)
    name = "gradient of layers/0/ffn/down, layer 1 of its stack"
    assert diagnose(training, training.start().params, make_batch()) == name


def test_a_gradient_alone_in_a_pipeline():
    """The backward of the last layer's output is not finite; the stack has rows 0, none, 1, 2."""
    mesh = MeshConfig(pipeline=2, stage_periods=(1, 2))
    training = make_stacked(3, mesh, StackError(change=blow_up))
    assert list(training.setup.region.specs.layout.order) == [0, -1, 1, 2]
    name = "gradient of layers/0/down, layer 2 of its stack"
    assert diagnose(training, training.start().params, make_rows(0)) == name
