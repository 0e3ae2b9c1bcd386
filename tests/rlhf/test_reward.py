"""The reward model: its loss by hand, on one device and on meshes, beside each answer by itself."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.losses import NextTokenLoss
from jaxscale.models.parameters import init_params, parameter_table
from jaxscale.models.values import token_values
from jaxscale.ops.draws import with_token_keys
from jaxscale.ops.precision import Policy
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.parallel.sequence.fpdt.strategy import FullyPipelined
from jaxscale.rlhf.reward import RewardLoss
from jaxscale.types import InputError
from tests.parallel.comparison import (
    KEY,
    canonical,
    dense,
    gradient_on_mesh,
    make_params,
    mixture,
    relative_errors,
)

MODEL = dense(max_length=32, use_value_head=True)
with jax.enable_x64(True):
    POLICY = Policy("float64", "float64", "float64", "float64")
EXECUTION = ExecutionConfig()
LOSS = RewardLoss(MODEL, POLICY, EXECUTION, centering=0.02)
LAST = dataclasses.replace(LOSS, compared="last_token")
# Of each row the pairs: tokens of the prompt, of chosen and rejected answer, tokens that the two
# have in common at their beginning, and tokens that the template writes behind the second one. Most
# answers end with token 0, which is also that of padding. There are equal lengths, answers that are
# the beginning of the other, either way, equal answers, full rows and an empty one.
ROWS = (
    ((3, 4, 2, 1, 1), (1, 2, 2, 0, 0), (2, 1, 5, 1, 2)),
    ((4, 3, 5, 3, 1), (1, 6, 2, 2, 0)),
    ((5, 4, 4, 4, 0), (2, 2, 2, 1, 0)),
    ((1, 8, 1, 0, 0), (2, 12, 5, 2, 0)),
    (),
    ((2, 14, 14, 12, 0),),
    ((6, 1, 1, 0, 3),),
    ((1, 1, 1, 0, 0),),
)
LENGTH = 32


def pairs():
    """(row, tokens of the chosen text, of the rejected one, tokens behind, of the prompt)."""
    rng = np.random.default_rng(0)
    for row, sizes in enumerate(ROWS):
        for num_prompt, num_chosen, num_rejected, num_common, num_behind in sizes:
            prompt = rng.integers(1, 64, num_prompt)
            longest = rng.integers(1, 32, max(num_chosen, num_rejected))
            answers = [longest[:num_chosen].copy(), longest[:num_rejected].copy()]
            answers[1][num_common:] += 32  # no token of the chosen one
            for answer in answers:
                answer[num_common + 1 :][-1:] = 0
            if num_chosen == num_common < num_rejected:
                answers[1][num_common] = answers[0][-1]  # it goes on with the same token again
            texts = [np.append(prompt, answer) for answer in answers]
            yield row, *texts, rng.integers(1, 64, num_behind), num_prompt


@functools.cache
def make_batch():
    shape = len(ROWS), LENGTH
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "segments", "positions")}
    batch["labels"] = np.full(shape, 7)
    batch["weights"] = np.zeros(shape)
    used, numbers = [0] * len(ROWS), [0] * len(ROWS)
    for row, chosen, rejected, behind, num_prompt in pairs():
        for text, more in ((chosen, behind[:0]), (rejected, behind)):
            whole = np.append(text, more)
            start, numbers[row] = used[row], numbers[row] + 1
            here = slice(start, start + len(whole))
            batch["tokens"][row, here] = whole
            batch["segments"][row, here] = numbers[row]
            batch["positions"][row, here] = np.arange(len(whole))
            batch["weights"][row, start + num_prompt - 1 : start + len(text) - 1] = 1
            used[row] += len(whole)
    assert max(used) == LENGTH and numbers == [2 * len(sizes) for sizes in ROWS]
    return batch


def divergence(chosen, rejected):
    """The number of the first token in which two texts differ; of equal ones that of the last."""
    for number in range(max(len(chosen), len(rejected))):
        if number in (len(chosen), len(rejected)) or chosen[number] != rejected[number]:
            return number
    return len(chosen) - 1


def pair_loss(values, lengths, first, loss):
    """(loss, its slope) of one pair by the values [2, LENGTH] of its texts, token by token."""
    slope, ends = np.zeros_like(values), (np.array([0, 1]), np.array(lengths) - 1)
    last = max(lengths) - 1
    numbers = range(first, last + 1) if loss.compared == "each_token" else [last]
    total = loss.centering * values[ends].sum() ** 2
    slope[ends] += 2 * loss.centering * values[ends].sum()
    for number in numbers:
        places = (ends[0], np.minimum(number, ends[1]))
        chosen, rejected = values[places]
        total -= np.log(1 / (1 + np.exp(rejected - chosen))) / len(numbers)
        slope[places] += np.array([-1, 1]) / (1 + np.exp(chosen - rejected)) / len(numbers)
    return total, slope


def values_apart(params):
    """[texts, LENGTH]: each text at the beginning of a row of its own, two texts a pair."""
    texts = [text for _, *both, _, _ in pairs() for text in both]
    tokens = np.zeros((len(texts), LENGTH), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    batch = {"tokens": tokens, "positions": np.broadcast_to(np.arange(LENGTH), tokens.shape)}
    decoder = Decoder(MODEL, policy=POLICY)
    x, _, _ = decoder.run_layers(params, decoder.embed(params, batch), decoder.tokens(batch))
    h = decoder.hidden(params, x)
    return h @ params["value_head"]["weights"][0]


@jax.jit
def values_and_gradient(params, slopes):
    """The values, and the gradient of a loss that has these slopes by each of them."""
    values, pullback = jax.vjp(values_apart, params)
    return values, pullback(slopes)[0]


@functools.cache
def wanted(loss):
    """(sum of losses, scores [pairs, 2], gradient)."""
    params, total, scores = make_params(MODEL), 0.0, []
    slopes = np.zeros((2 * sum(map(len, ROWS)), LENGTH))
    with jax.enable_x64(True):
        values = np.asarray(values_and_gradient(params, slopes)[0])
        for number, (_, *texts, _, _) in enumerate(pairs()):
            rows, lengths = slice(2 * number, 2 * number + 2), [len(text) for text in texts]
            of_pair, slopes[rows] = pair_loss(values[rows], lengths, divergence(*texts), loss)
            total, scores = total + of_pair, [*scores, values[rows][[0, 1], np.array(lengths) - 1]]
        _, gradient = values_and_gradient(params, slopes)
    return total, np.stack(scores), jax.tree.map(np.asarray, gradient)


def assert_as_by_hand(loss, sums, gradient):
    total, scores, wanted_gradient = wanted(loss)
    found, weight, figures = sums
    np.testing.assert_allclose(found, total, rtol=1e-12)
    assert weight == len(scores) == sum(map(len, ROWS))
    margin = scores[:, 0] - scores[:, 1]
    is_equal = margin == 0
    assert is_equal.sum() == 1 and 0 < (margin > 0).sum() < len(margin) - 1
    # Whose scores differ by rounding where the two are computed in other chunks.
    assert figures["accuracy"] - (margin > 0).sum() in (0, is_equal.sum())
    np.testing.assert_allclose(figures["margin"], margin.sum(), rtol=1e-10)
    np.testing.assert_allclose(figures["chosen_reward"], scores[:, 0].sum(), rtol=1e-10)
    np.testing.assert_allclose(figures["rejected_reward"], scores[:, 1].sum(), rtol=1e-10)
    errors = relative_errors(gradient, wanted_gradient)
    assert len(errors) > 10 and all(error < 1e-10 for error in errors.values()), errors


@pytest.mark.parametrize("loss", [LOSS, LAST], ids=["each token", "last token"])
def test_pairs_in_rows_have_the_loss_and_gradient_of_answers_apart(loss):
    with jax.enable_x64(True):

        def total(params):
            sums = loss(params, make_batch(), None)
            return sums[0], sums

        gradient, sums = jax.jit(jax.grad(total, has_aux=True))(make_params(MODEL))
        assert_as_by_hand(loss, sums, gradient)


MESHES = [
    dict(data=2, sequence=2, zero=3),
    dict(tensor=2, sequence=2),
    dict(data=2, tensor=2),
    dict(sequence=2, ring=2),
    dict(expert=2, tensor=2),
]


@pytest.mark.parametrize(
    ("loss", "sizes"),
    [
        pytest.param(
            loss,
            sizes,
            marks=[] if loss is LOSS and number == 0 else pytest.mark.long,
            id=f"{loss.compared} {sizes}",
        )
        for loss in (LOSS, LAST)
        for number, sizes in enumerate(MESHES)
    ],
)
def test_every_mesh_has_the_same_loss_and_gradient(loss, sizes):
    with jax.enable_x64(True):
        region, run = gradient_on_mesh(MODEL, MeshConfig(**sizes), loss)
        stored = region.specs.layout.store(make_params(MODEL), region.specs.dims)
        sums, gradient = run(stored, make_batch(), KEY)
        assert_as_by_hand(loss, sums, canonical(region.specs, gradient))


IN_CHUNKS = [
    (4, dict(sequence=2), dict(chunks="device")),
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
    settings = dict(num_microbatches=num_microbatches, strategy=strategy)
    with jax.enable_x64(True):
        region, run = gradient_on_mesh(MODEL, MeshConfig(**sizes), loss, **settings)
        stored = region.specs.layout.store(make_params(MODEL), region.specs.dims)
        sums, gradient = run(stored, make_batch(), KEY)
        assert_as_by_hand(LOSS, sums, canonical(region.specs, gradient))


def test_values_are_float32_sums_of_what_is_computed_in_bfloat16():
    params = init_params(parameter_table(MODEL), KEY, "bfloat16")
    assert params["value_head"]["weights"].dtype == jnp.float32
    assert params["layers"]["0"]["ffn"]["up"].dtype == jnp.bfloat16
    weights = np.random.default_rng(0).normal(size=(1, 16)).astype(np.float32)
    params["value_head"]["weights"] = jnp.asarray(weights)
    decoder = Decoder(MODEL, policy=Policy("bfloat16", "bfloat16"))
    x = jax.random.normal(KEY, (2, 8, 16), jnp.bfloat16)
    values = token_values(decoder, params, x)
    assert values.dtype == jnp.float32
    h = np.asarray(decoder.hidden(params, x)).astype(np.float32)
    np.testing.assert_allclose(values, h @ weights[0], rtol=1e-5, atol=1e-6)


def test_before_the_first_update_the_loss_is_log_2_and_the_head_has_a_gradient():
    with jax.enable_x64(True):
        params = init_params(parameter_table(MODEL), KEY, "float64")

        def total(params):
            sums = LOSS(params, make_batch(), None)
            return sums[0], sums

        gradient, (loss, weight, figures) = jax.jit(jax.grad(total, has_aux=True))(params)
    np.testing.assert_allclose(float(loss) / float(weight), np.log(2), rtol=1e-12)
    assert float(figures["chosen_reward"]) == float(figures["accuracy"]) == 0
    assert np.linalg.norm(gradient["value_head"]["weights"]) > 0.1


def test_a_margin_of_hundreds_is_no_infinity():
    """-log of a sigmoid that is 0 in float32; upstream's loss became infinite there."""
    params = jax.tree.map(np.float32, make_params(MODEL))
    params["value_head"] = {"weights": 1e4 * params["value_head"]["weights"]}
    loss = dataclasses.replace(LOSS, centering=0.0, policy=Policy("float32", "float32"))
    value, _, figures = jax.jit(loss)(params, make_batch(), None)
    assert abs(float(figures["margin"])) > 1e3 and np.isfinite(value)


def test_nothing_is_dropped_out():
    model = mixture(expert_dropout=0.5, max_length=32, use_value_head=True)
    loss = jax.jit(dataclasses.replace(LOSS, model=model))
    with jax.enable_x64(True):
        params, batch = make_params(model), make_batch()
        values = [loss(params, each, KEY)[0] for each in (batch, with_token_keys(batch, KEY))]
    assert values[0] == values[1]


BAD = {
    "not causal": (dict(model=dense(is_causal=False, use_value_head=True)), "sees what follows it"),
    "no value head": (dict(model=dense()), r"ModelConfig\.use_value_head: given False"),
    "compared": (dict(compared="mean"), r"reward_loss\.compared: given 'mean'"),
    "centering": (dict(centering=-1.0), r"reward_loss\.centering: given -1\.0"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_has_no_meaning_is_refused(name):
    fields, message = BAD[name]
    with pytest.raises(InputError, match=message):
        dataclasses.replace(LOSS, **fields)


def test_values_and_logits_are_not_taken_for_one_another():
    batch = {"tokens": np.zeros((1, 4), np.int32), "positions": np.arange(4)[None]}
    with pytest.raises(InputError, match=r"use_value_head: given True, expected False for logits"):
        Decoder(MODEL).logits(make_params(MODEL), batch)
    loss = NextTokenLoss(dense(is_tied=True, use_value_head=True), Policy(), EXECUTION)
    with pytest.raises(InputError, match=r"use_value_head: given True, expected False for logits"):
        loss(make_params(loss.model), make_batch(), None)
    with pytest.raises(InputError, match=r"use_value_head: given False, expected True for values"):
        token_values(Decoder(dense()), make_params(dense()), np.zeros((1, 4, 16)))
