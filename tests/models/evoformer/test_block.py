"""The Evoformer's modules beside AlphaFold 2's and OpenFold's own code, and what masks hide.

The fixtures are written by experiments/evoformer/alphafold_fixture.py and esmfold_fixture.py.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale import tree
from jaxscale.models.evoformer import block
from jaxscale.models.evoformer.attention import triangle_attention
from jaxscale.models.evoformer.parameters import EvoformerConfig, evoformer_table
from jaxscale.models.parameters import count_parameters, init_params
from jaxscale.ops.attention.evoformer import evoformer_attention
from jaxscale.types import InputError

FIXTURES = Path(__file__).parent / "fixtures"
# Of AlphaFold 2's own block of its own widths, by its own code.
ALPHAFOLD_PARAMETERS = 1_829_952
SMALL = EvoformerConfig(
    msa_dim=12,
    pair_dim=8,
    num_msa_heads=3,
    num_pair_heads=2,
    head_dim=4,
    outer_dim=4,
    multiplication_dim=6,
)


def nested(flat):
    """Arrays by path as a tree."""
    out = {}
    for path, x in flat.items():
        *parents, name = path.split("/")
        inner = out
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = x
    return out


@pytest.fixture(scope="module")
def alphafold():
    """Operands with a leading batch of 1, cotangents, outputs and gradients."""
    return nested(np.load(FIXTURES / "alphafold.npz"))


@pytest.fixture(scope="module")
def esmfold():
    return nested(np.load(FIXTURES / "esmfold.npz"))


def assert_close(got, want, tolerance):
    """Largest difference over the largest value of each array, or over 1.

    Some gradients are 0 but for rounding: what shifts all logits of a query changes nothing.
    """
    got, want = tree.flatten(got), tree.flatten(want)
    assert got.keys() == want.keys()
    for path, x in want.items():
        error = np.abs(np.asarray(got[path], np.float64) - x).max()
        assert error <= tolerance * max(np.abs(x).max(), 1), (path, error)


def small(dtype=jnp.float32, seed=0):
    """Parameters, none of them at 0, and operands whose last residue is padding."""
    params = init_params(evoformer_table(SMALL), jax.random.key(seed), "float32")
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    params = jax.tree.map(lambda x: x + 0.3 * draw(*x.shape).astype(x.dtype), params)
    msa_mask = jnp.ones((2, 4, 6)).at[:, :, -1].set(0).at[:, 1].set(0)
    pair_mask = jnp.ones((2, 6, 6)).at[:, -1].set(0).at[:, :, -1].set(0)
    return params, draw(2, 4, 6, 12), draw(2, 6, 6, 8), msa_mask, pair_mask


@functools.partial(jax.jit, static_argnames="implementation")
def run(operands, cotangents, implementation="chunked"):
    """(msa, pair) and the gradients of parameters, msa and pair, of what no mask hides."""
    params, msa, pair, *masks = operands
    attention = functools.partial(evoformer_attention, implementation=implementation, key_chunk=3)

    def apply(params, msa, pair):
        outputs = block.evoformer_block(params, msa, pair, *masks, attention=attention)
        return [jnp.where(mask[..., None] > 0, x, 0) for x, mask in zip(outputs, masks)]

    outputs, pullback = jax.vjp(apply, params, msa, pair)
    return outputs, pullback(list(cotangents))


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_a_block_is_alphafolds(alphafold, implementation):
    """Where nothing is masked, and all gradients of what stands there."""
    arrays = ("msa", "pair", "msa_mask", "pair_mask")
    operands = alphafold["params"], *(alphafold[name][None] for name in arrays)
    cotangents = [alphafold["cotangents"][name][None] for name in ("msa", "pair")]
    (msa, pair), (dparams, dmsa, dpair) = run(operands, cotangents, implementation)
    want = {
        name: x * alphafold[f"{name}_mask"][..., None] for name, x in alphafold["output"].items()
    }
    assert_close({"msa": msa[0], "pair": pair[0]}, want, 1e-5)
    gradients = {"params": dparams, "msa": dmsa[0], "pair": dpair[0]}
    assert_close(gradients, alphafold["gradients"], 1e-5)


MODULES = {
    "starting": functools.partial(
        triangle_attention, is_ending=False, attention=evoformer_attention
    ),
    "ending": functools.partial(triangle_attention, is_ending=True, attention=evoformer_attention),
    "outgoing": functools.partial(block.triangle_multiplication, is_incoming=False),
    "incoming": functools.partial(block.triangle_multiplication, is_incoming=True),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_of_pairs_is_openfolds(esmfold, name):
    """With masks that hide any pairs, one row and one column whole."""
    own = esmfold[name]

    @jax.jit
    def apply(params, pair):
        return MODULES[name](params, pair, own["mask"]) * own["mask"][..., None]

    output, pullback = jax.vjp(apply, own["params"], own["pair"])
    assert_close({"output": output}, {"output": own["output"] * own["mask"][..., None]}, 1e-5)
    gradients = dict(zip(("params", "pair"), pullback(own["cotangent"])))
    assert_close(gradients, own["gradients"], 1e-5)


def test_attention_is_openfolds(esmfold):
    """The operation alone, with fewer keys than queries and the gradients of both biases."""
    own = esmfold["attention"]
    names = ("q", "k", "v", "mask_bias", "pair_bias")
    attend = functools.partial(evoformer_attention, key_chunk=4)
    output, pullback = jax.vjp(attend, *(own[name] for name in names))
    assert_close({"output": output}, {"output": own["output"]}, 2e-6)
    assert_close(dict(zip(names, pullback(own["cotangent"]))), own["gradients"], 2e-6)


def test_the_table_is_that_of_the_parameters(alphafold):
    table = evoformer_table(SMALL)
    shapes = {path: entry.shape for path, entry in tree.flatten(table).items()}
    found = {path: x.shape for path, x in tree.flatten(alphafold["params"]).items()}
    assert shapes == found


def test_the_default_widths_are_alphafolds():
    total, _ = count_parameters(evoformer_table(EvoformerConfig()))
    assert total == ALPHAFOLD_PARAMETERS


def test_a_fresh_block_changes_nothing():
    _, msa, pair, *masks = small()
    params = init_params(evoformer_table(SMALL), jax.random.key(0), "float32")
    outputs, _ = run((params, msa, pair, *masks), (msa, pair))
    for got, want, mask in zip(outputs, (msa, pair), masks):
        np.testing.assert_array_equal(got, want * mask[..., None])


def test_nothing_depends_on_what_masked_places_hold():
    """Neither results nor gradients, which are 0 there."""
    params, msa, pair, *masks = small()
    hidden = [mask[..., None] == 0 for mask in masks]
    want = run((params, msa, pair, *masks), (msa, pair))
    changed = jnp.where(hidden[0], 50, msa), jnp.where(hidden[1], -50, pair)
    got = run((params, *changed, *masks), (msa, pair))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)
    _, (_, *gradients) = want
    for gradient, is_hidden in zip(gradients, hidden):
        assert gradient.any() and not jnp.where(is_hidden, gradient, 0).any()


def test_with_everything_masked_nothing_is_nan():
    params, msa, pair, *masks = small()
    masks = [jnp.zeros_like(mask) for mask in masks]
    for x in jax.tree.leaves(run((params, msa, pair, *masks), (msa, pair))):
        assert np.isfinite(x).all()


def test_bfloat16_stays_by_float32():
    """Parameters stay in float32, and so do their gradients."""
    params, msa, pair, *masks = small(jnp.bfloat16)
    wide = msa.astype(jnp.float32), pair.astype(jnp.float32)
    want, _ = run((params, *wide, *masks), wide)
    got, (gradients, *_) = run((params, msa, pair, *masks), (msa, pair))
    assert {x.dtype for x in got} == {jnp.dtype(jnp.bfloat16)}
    assert_close(dict(enumerate(got)), dict(enumerate(want)), 2e-2)
    assert {x.dtype for x in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("number", "shape", "dtype"),
    [(0, (2, 4, 5, 12), None), (1, (2, 6, 5, 8), None), (2, (2, 6), None), (1, None, "bfloat16")],
)
def test_what_does_not_fit_is_refused(number, shape, dtype):
    params, *operands = small()
    changed = operands[number]
    changed = changed.astype(dtype) if dtype else jnp.zeros(shape)
    operands[number] = changed
    with pytest.raises(InputError, match="evoformer_block"):
        block.evoformer_block(params, *operands)


def test_a_width_of_zero_is_refused():
    with pytest.raises(InputError, match=r"EvoformerConfig\.head_dim"):
        EvoformerConfig(head_dim=0)
