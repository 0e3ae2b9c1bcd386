"""Losses that are plain functions: per-token log-probabilities, summed by row and by document."""

import functools

import jax
import numpy as np
import pytest

from jaxscale.models.config.facts import from_flat
from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.losses import (
    document_numbers,
    row_numbers,
    sum_by_group,
    token_log_probabilities,
)
from jaxscale.models.parameters import parameter_table
from jaxscale.ops.precision import Policy
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.train.config import TrainConfig
from jaxscale.train.optim import OptimizerConfig
from jaxscale.train.setup import make_setup
from jaxscale.types import InputError
from tests.parallel.comparison import (
    SIZES,
    make_batch,
    make_params,
    make_region,
    on_mesh,
    relative_errors,
)

LIMIT = 1e-9  # of each error of `relative_errors`, and of the loss
MODEL = from_flat(**SIZES, num_layers=1)
EXECUTION = ExecutionConfig(num_loss_chunks=2)
MAX_DOCUMENTS = 2  # of a row of `make_batch`


def scores(params, batch, operations, groups, num_groups):
    """Sums of log p of the labels that count, over groups of tokens."""
    policy = Policy("float64", "float64", "float64", "float64")
    decoder = Decoder(MODEL, operations, policy, EXECUTION)
    x = decoder.embed(params, batch)
    x, _, _ = decoder.run_layers(params, x, decoder.tokens(batch))
    log_p = token_log_probabilities(decoder, params, x, batch["labels"])
    weights = operations.collectives.own_tokens(batch["weights"])
    return sum_by_group(log_p * weights, groups, num_groups, operations.collectives)


def preference(params, batch, key, *, operations):
    """-log sigmoid(chosen - rejected) of rows two by two, as in DPO (arXiv 2305.18290)."""
    num_rows = len(batch["tokens"])
    by_row = scores(params, batch, operations, row_numbers(batch), num_rows)
    margin = by_row[0::2] - by_row[1::2]
    is_counted = operations.collectives.is_counted()
    loss = -jax.nn.log_sigmoid(margin).sum()
    metrics = {"margin": margin.sum() * is_counted}
    return loss * is_counted, num_rows / 2 * is_counted, metrics


def squares(params, batch, key, *, operations):
    """The square of each document's sum: wrong if a device has only a part of the sum."""
    num_groups = len(batch["tokens"]) * MAX_DOCUMENTS
    groups = document_numbers(batch, MAX_DOCUMENTS)
    by_document = scores(params, batch, operations, groups, num_groups)
    is_counted = operations.collectives.is_counted()
    return (by_document**2).sum() * is_counted, num_groups * is_counted, {}


@functools.cache
def on_one_device(loss):
    """((sum_loss, sum_weight, metrics), gradients) with the plain operations."""

    def sum_loss(params, batch):
        sums = loss(params, batch, None, operations=EXECUTION.operations())
        return sums[0], sums

    (_, sums), gradients = jax.jit(jax.value_and_grad(sum_loss, has_aux=True))(
        make_params(MODEL), make_batch()
    )
    return sums, gradients


LOSSES = [preference, squares]
# Both losses on the meshes that have all axes which share the tokens of a row.
CASES = [
    (preference, dict(sequence=2, tensor=2)),
    (squares, dict(sequence=2, ring=2)),
    (squares, dict(data=2, tensor=2)),
]
MESHES = [
    dict(data=2),
    dict(expert=2),
    dict(sequence=2),
    dict(sequence=2, ring=2),
    dict(tensor=2),
    dict(sequence=2, tensor=2),
    dict(data=2, tensor=2),
    dict(sequence=4, ring=2, tensor=2),
    dict(data=2, sequence=2, tensor=2, zero=3),
]
LONG = [(loss, sizes) for loss in LOSSES for sizes in MESHES if (loss, sizes) not in CASES]


@pytest.mark.parametrize(
    ("loss", "sizes"),
    CASES + [pytest.param(*case, marks=pytest.mark.long) for case in LONG],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_sums_over_the_tokens_of_a_row_are_those_of_one_device(loss, sizes):
    """A plain function of the README's form, under every axis but the pipeline."""
    with jax.enable_x64(True):
        wanted_sums, wanted_gradients = on_one_device(loss)
        sums, gradients = on_mesh(MODEL, loss, **sizes)
        for got, wanted in zip(jax.tree.leaves(sums), jax.tree.leaves(wanted_sums), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=LIMIT)
        errors = relative_errors(gradients, wanted_gradients)
    assert all(error <= LIMIT for error in errors.values()), errors


def test_log_probabilities_are_those_of_the_logits():
    """Of the labels, by plain logits; 0 for a label outside the vocabulary."""
    with jax.enable_x64(True):
        policy = Policy("float64", "float64", "float64", "float64")
        decoder = Decoder(MODEL, EXECUTION.operations(), policy, EXECUTION)
        params, batch = make_params(MODEL), make_batch()
        labels = batch["labels"].copy()
        labels[0, :2] = -1, MODEL.vocab_size

        @jax.jit
        def both(params, batch, labels):
            x, _, _ = decoder.run_layers(
                params, decoder.embed(params, batch), decoder.tokens(batch)
            )
            log_p = token_log_probabilities(decoder, params, x, labels)
            return log_p, decoder.logits(params, batch)[0]

        found, logits = both(params, batch, labels)
        every = jax.nn.log_softmax(logits)
        known = np.clip(labels, 0, MODEL.vocab_size - 1)[..., None]
        wanted = np.take_along_axis(np.asarray(every), known, -1)[..., 0]
        wanted[0, :2] = 0
        np.testing.assert_allclose(found, wanted, rtol=1e-12)


def mean_logit(params, batch, key, *, operations):
    """Wants the logits of all tokens at once, which no member of a tensor group has."""
    policy = Policy("float64", "float64", "float64", "float64")
    decoder = Decoder(MODEL, operations, policy, EXECUTION)
    logits, _ = decoder.logits(params, batch)
    return logits.mean(), logits.size, {}


@pytest.mark.parametrize(
    ("loss", "sizes", "message"),
    [
        (mean_logit, dict(tensor=2), r"MeshConfig\.tensor: given 2.*token_log_probabilities"),
        (preference, dict(pipeline=2), "loss: given .* a loss in parts that stages can run"),
    ],
    ids=["logits", "pipeline"],
)
def test_a_loss_that_a_mesh_cannot_run_is_refused_to_whoever_evaluates_or_trains(
    loss, sizes, message
):
    model = from_flat(**SIZES, num_layers=2)
    region = make_region(model, MeshConfig(**sizes), num_microbatches=2)
    arguments = make_params(model), make_batch(), jax.random.key(0)
    for run in (region.evaluate(loss), region.gradient(loss)):
        with jax.enable_x64(True), pytest.raises(InputError, match=message):
            jax.eval_shape(run, *arguments)


def test_a_plain_function_is_refused_under_a_pipeline():
    settings = dict(
        table=parameter_table(from_flat(**SIZES, num_layers=2)),
        loss_fn=preference,
        optimizer=OptimizerConfig(),
        train=TrainConfig(steps=1, num_microbatches=2),
    )
    with pytest.raises(InputError) as error:
        make_setup(mesh=MeshConfig(pipeline=2), devices=jax.devices()[:2], **settings)
    message = str(error.value)
    assert message.startswith("loss: given <function preference")
    assert "expected a loss in parts that stages can run (start, prepare, body, finish" in message
    assert "or MeshConfig.pipeline = 1" in message
    for axis in ("data", "expert", "sequence", "tensor"):
        make_setup(mesh=MeshConfig(**{axis: 2}), devices=jax.devices()[:2], **settings)
