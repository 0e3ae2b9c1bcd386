"""DPO: the loss of pairs in rows, on one device and on meshes, beside each answer by itself."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale import tree
from jaxscale.models.config import LoraConfig
from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.lora import TRAINABLE, base, without_adapters
from jaxscale.ops.draws import with_token_keys
from jaxscale.ops.precision import Policy
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.parallel.sequence.fpdt.strategy import FullyPipelined
from jaxscale.rlhf.dpo import DpoLoss
from jaxscale.types import InputError
from tests.parallel.comparison import (
    KEY,
    dense,
    gradient_on_mesh,
    make_params,
    mixture,
    relative_errors,
)

MODEL = dataclasses.replace(dense(max_length=32), lora=LoraConfig(rank=2, alpha=4.0))
with jax.enable_x64(True):
    POLICY = Policy("float64", "float64", "float64", "float64")
EXECUTION = ExecutionConfig(num_loss_chunks=2)
BETA, SMOOTHING = 0.3, 0.1
LOSS = DpoLoss(MODEL, POLICY, EXECUTION, beta=BETA, label_smoothing=SMOOTHING)
# Of each row, (tokens, those of them that are the answer) of chosen and rejected in turn. The first
# row has two pairs, the third is full, the last has none.
ROWS = (
    ((6, 3), (7, 2), (5, 4), (8, 1)),
    ((4, 2), (20, 12)),
    ((16, 8), (16, 3)),
    (),
)
LENGTH = 32


def documents():
    """(row, place of the first token, tokens, answer tokens) of each, two by two."""
    for row, sizes in enumerate(ROWS * 2):
        place = 0
        for size, num_answer in sizes:
            yield row, place, size, num_answer
            place += size


@functools.cache
def make_batch():
    rng = np.random.default_rng(0)
    shape = len(ROWS) * 2, LENGTH
    batch = {name: np.zeros(shape, np.int32) for name in ("segments", "positions")}
    batch |= {name: rng.integers(0, 64, shape) for name in ("tokens", "labels")}
    batch["weights"] = np.zeros(shape)
    numbers = dict.fromkeys(range(shape[0]), 0)
    for row, place, size, num_answer in documents():
        numbers[row] += 1
        here = slice(place, place + size)
        batch["segments"][row, here] = numbers[row]
        batch["positions"][row, here] = np.arange(size)
        # The last token of a document predicts nothing.
        batch["weights"][row, place + size - 1 - num_answer : place + size - 1] = 1
    return batch


@functools.cache
def apart():
    """The documents of the batch, each at the beginning of a row of its own without segments."""
    rows = []
    for row, place, size, _ in documents():
        here = slice(place, place + size)
        padded = {name: np.zeros(LENGTH, a.dtype) for name, a in make_batch().items()}
        for name, array in make_batch().items():
            padded[name][:size] = array[row, here]
        rows.append(padded | {"positions": np.arange(LENGTH)})
    return {name: np.stack([row[name] for row in rows]) for name in rows[0] if name != "segments"}


def log_p(config, params):
    """Of each document's answer by plain logits, [pairs, 2]."""
    batch = apart()
    logits, _ = Decoder(config, policy=POLICY).logits(params, batch)
    every = jax.nn.log_softmax(logits)
    of_labels = jnp.take_along_axis(every, batch["labels"][..., None], -1)[..., 0]
    return (of_labels * batch["weights"]).sum(1).reshape(-1, 2)


def by_equation(params):
    """Equation 7: (sum of losses, rewards [pairs, 2])."""
    reference = jax.lax.stop_gradient(log_p(without_adapters(MODEL), base(params)))
    rewards = BETA * (log_p(MODEL, params) - reference)
    p = jax.nn.sigmoid(rewards[:, 0] - rewards[:, 1])
    return -((1 - SMOOTHING) * jnp.log(p) + SMOOTHING * jnp.log(1 - p)).sum(), rewards


@functools.cache
def wanted():
    with jax.enable_x64(True):
        run = jax.jit(jax.value_and_grad(by_equation, has_aux=True))
        (loss, rewards), gradient = run(make_params(MODEL))
        return float(loss), np.asarray(rewards), tree.select(gradient, TRAINABLE)


def assert_as_by_equation(sums, gradient):
    loss, rewards, wanted_gradient = wanted()
    found, weight, figures = sums
    np.testing.assert_allclose(found, loss, rtol=1e-12)
    assert weight == len(rewards) == 8
    margin = rewards[:, 0] - rewards[:, 1]
    assert figures["accuracy"] == (margin > 0).sum() and 0 < (margin > 0).sum() < 8
    np.testing.assert_allclose(figures["margin"], margin.sum(), rtol=1e-10)
    np.testing.assert_allclose(figures["chosen_reward"], rewards[:, 0].sum(), rtol=1e-10)
    np.testing.assert_allclose(figures["rejected_reward"], rewards[:, 1].sum(), rtol=1e-10)
    errors = relative_errors(gradient, wanted_gradient)
    assert len(errors) > 4 and all(error < 1e-10 for error in errors.values()), errors


def test_pairs_in_rows_have_the_loss_and_gradient_of_the_equation():
    with jax.enable_x64(True):

        def total(params):
            sums = LOSS(params, make_batch(), None)
            return sums[0], sums

        gradient, sums = jax.jit(jax.grad(total, has_aux=True))(make_params(MODEL))
        assert_as_by_equation(sums, tree.select(gradient, TRAINABLE))


MESHES = [
    dict(data=2, sequence=2, zero=3),
    dict(tensor=2, sequence=2),
    dict(data=2, tensor=2),
    dict(sequence=2, ring=2),
    dict(expert=2, tensor=2),
]


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(sizes, marks=[] if number == 1 else pytest.mark.long, id=str(sizes))
        for number, sizes in enumerate(MESHES)
    ],
)
def test_every_mesh_has_the_same_loss_and_gradient(sizes):
    with jax.enable_x64(True):
        config = MeshConfig(**sizes)
        region, run = gradient_on_mesh(MODEL, config, LOSS, trainable=TRAINABLE)
        stored = region.specs.layout.store(make_params(MODEL), region.specs.dims)
        sums, gradient = run(stored, make_batch(), KEY)
        assert_as_by_equation(sums, gradient)


IN_CHUNKS = [
    (4, dict(sequence=2), dict(chunks="device")),
    (2, dict(data=2, sequence=2, zero=3), dict()),
    (2, dict(tensor=2, sequence=2, num_microbatches=8), dict()),
]


@pytest.mark.long
@pytest.mark.parametrize(("num_chunks", "sizes", "places"), IN_CHUNKS, ids=str)
def test_layers_in_chunks_have_the_same_loss_and_gradient(num_chunks, sizes, places):
    """Pairs lie across chunks, and each shard has a share of every chunk."""
    sizes = dict(sizes)
    num_microbatches = sizes.pop("num_microbatches", 1)
    strategy = FullyPipelined(LENGTH // num_chunks, num_pieces=1, **places)
    execution = dataclasses.replace(EXECUTION, remat="none", strategy=strategy)
    loss = dataclasses.replace(LOSS, execution=execution)
    settings = dict(num_microbatches=num_microbatches, trainable=TRAINABLE, strategy=strategy)
    with jax.enable_x64(True):
        region, run = gradient_on_mesh(MODEL, MeshConfig(**sizes), loss, **settings)
        stored = region.specs.layout.store(make_params(MODEL), region.specs.dims)
        sums, gradient = run(stored, make_batch(), KEY)
        assert_as_by_equation(sums, gradient)


def test_before_the_first_update_the_loss_is_log_2():
    params = tree.map_with_path(
        lambda path, leaf: leaf * (not path.endswith("_lora/b")), make_params(MODEL)
    )
    with jax.enable_x64(True):
        loss, weight, figures = jax.jit(LOSS)(params, make_batch(), None)
    np.testing.assert_allclose(loss / weight, np.log(2), rtol=1e-12)
    assert abs(float(figures["chosen_reward"])) < 1e-12


def test_a_margin_of_hundreds_is_no_infinity():
    """-log of a sigmoid that is 0 in float32; upstream's loss became infinite there."""
    loss = dataclasses.replace(LOSS, beta=1e4, policy=Policy("float32", "float32"))
    params = jax.tree.map(np.float32, make_params(MODEL))
    value, _, figures = jax.jit(loss)(params, make_batch(), None)
    assert abs(float(figures["margin"])) > 1e3 and np.isfinite(value)


def test_a_forbidden_word_that_has_no_weight_changes_nothing():
    """A head's bias of -inf: of that label both log-probabilities are -inf."""
    model = dataclasses.replace(MODEL, use_head_bias=True)
    batch = dict(make_batch())
    batch["labels"] = np.where(batch["weights"] == 0, 63, batch["labels"] % 63)
    params = make_params(model)
    forbidden = tree.map_with_path(
        lambda path, leaf: (
            np.where(np.arange(64) == 63, -np.inf, 0) if path == "head/bias" else leaf
        ),
        params,
    )
    far = tree.map_with_path(
        lambda path, leaf: np.where(np.arange(64) == 63, -1e4, 0) if path == "head/bias" else leaf,
        params,
    )
    loss = dataclasses.replace(LOSS, model=model)
    with jax.enable_x64(True):
        run = jax.jit(jax.value_and_grad(lambda params: loss(params, batch, None)[0]))
        (value, gradient), (wanted, wanted_gradient) = run(forbidden), run(far)
    np.testing.assert_allclose(value, wanted, rtol=1e-12)
    adapters, others = (tree.select(each, TRAINABLE) for each in (gradient, wanted_gradient))
    assert all(error < 1e-9 for error in relative_errors(adapters, others).values())


def test_nothing_is_dropped_out():
    model = dataclasses.replace(
        mixture(expert_dropout=0.5, max_length=32), lora=LoraConfig(rank=2, targets=("q", "v"))
    )
    loss = jax.jit(dataclasses.replace(LOSS, model=model))
    with jax.enable_x64(True):
        params, batch = make_params(model), make_batch()
        values = [loss(params, each, KEY)[0] for each in (batch, with_token_keys(batch, KEY))]
    assert values[0] == values[1]


BAD = {
    "not causal": (dict(model=dataclasses.replace(MODEL, is_causal=False)), "sees what follows it"),
    "no adapters": (dict(model=without_adapters(MODEL)), r"ModelConfig\.lora: given None"),
    "beta": (dict(beta=0.0), r"dpo_loss\.beta: given 0\.0"),
    "smoothing": (dict(label_smoothing=0.5), "0 <= label_smoothing < 0.5"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_has_no_meaning_is_refused(name):
    fields, message = BAD[name]
    with pytest.raises(InputError, match=message):
        dataclasses.replace(LOSS, **fields)
