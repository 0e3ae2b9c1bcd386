"""How the layers run never changes what they compute; one step's fingerprint."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from jaxscale import tree
from jaxscale.models.config.facts import from_flat
from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import ByChunk, ExecutionConfig
from jaxscale.models.losses import NextTokenLoss
from jaxscale.models.parameters import abstract_params, parameter_table
from jaxscale.ops.attention import KERNEL_OUTPUT
from jaxscale.ops.backends import EXCHANGED
from jaxscale.ops.draws import with_token_keys
from jaxscale.ops.precision import Policy
from jaxscale.parallel.sequence.fpdt.strategy import FullyPipelined
from jaxscale.types import InputError

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "one_step.json"
FLOAT32 = Policy(compute="float32")
MODEL = from_flat(
    vocab_size=48,
    num_layers=4,
    model_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=24,
    max_length=16,
    windows=(None, 4),
    moe_pattern=(False, True),
    num_experts=4,
    expert_dim=16,
    router_z_loss=1e-3,
    use_qk_norm=True,
)
DENSE = from_flat(
    vocab_size=48,
    num_layers=2,
    model_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    ffn_dim=24,
    max_length=16,
)
# A dense layer, and a mixture with a window that draws its experts and what it drops.
DRAWING = from_flat(
    vocab_size=48,
    num_layers=2,
    model_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    ffn_dim=24,
    max_length=16,
    windows=(4,),
    moe_pattern=(True,),
    num_dense_prefix=1,
    num_experts=4,
    expert_dim=16,
    router="sparsemixer_v2",
    router_threshold=0.5,
    router_z_loss=1e-3,
    expert_dropout=0.5,
)


@functools.cache
def make_params(model=MODEL):
    """Waves, so that no random generator and no value such as 0 or 1 is in the golden numbers."""

    def wave(path, leaf):
        phase = sum(map(ord, jax.tree_util.keystr(path)))
        phase = phase + np.arange(np.prod(leaf.shape)).reshape(leaf.shape)
        values = 0.2 * np.sin(1.7 * phase + phase**2 % 11) + (path[-1].key == "scale")
        return jnp.asarray(values, jnp.float32)

    shapes = abstract_params(parameter_table(model), "float32")
    return jax.tree_util.tree_map_with_path(wave, shapes)


def make_batch(is_drawing=False):
    """Two documents and padding in each of two rows, from no random generator."""
    tokens = (np.arange(34).reshape(2, 17) * 7 + 3) ** 2 % 47
    segments = np.tile(np.repeat([1, 2, 0], (6, 7, 3)), (2, 1))
    positions = np.tile(np.concatenate([np.arange(n) for n in (6, 7, 3)]), (2, 1))
    batch = dict(
        tokens=tokens[:, :-1],
        labels=tokens[:, 1:],
        segments=segments,
        positions=positions,
        weights=(segments > 0).astype("float32"),
    )
    batch = jax.tree.map(jnp.asarray, batch)
    return with_token_keys(batch, jax.random.key(2)) if is_drawing else batch


def loss_of(model=MODEL, **execution):
    """params -> the loss of `make_batch`."""
    config = ExecutionConfig(num_loss_chunks=2, **execution)
    loss = NextTokenLoss(model, FLOAT32, config, z_loss=1e-3)
    return lambda params: loss(params, make_batch(model is DRAWING), None)[0]


@functools.cache
def value_and_gradient(model=MODEL, **execution):
    return jax.jit(jax.value_and_grad(loss_of(model, **execution)))(make_params(model))


def fingerprint(**execution):
    """The loss and the norm of each gradient."""
    value, gradient = value_and_gradient(**execution)
    norms = {path: float(jnp.linalg.norm(leaf)) for path, leaf in tree.flatten(gradient).items()}
    return {"loss": float(value), "gradient_norms": norms}


def assert_same_loss_and_gradient(got, wanted):
    """Two losses are the same, and every gradient."""
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-6)
    pairs = zip(tree.flatten(got[1]).items(), jax.tree.leaves(wanted[1]), strict=True)
    for (path, leaf), wanted_leaf in pairs:
        error = jnp.abs(leaf - wanted_leaf).max()
        assert error <= 1e-5 * jnp.abs(wanted_leaf).max(), path


@pytest.mark.parametrize(
    "execution",
    [
        pytest.param({}, id="scanned"),
        pytest.param({"is_scanned": False, "remat": "none"}, id="unrolled"),
        pytest.param({"is_scanned": False}, id="unrolled, remat", marks=pytest.mark.long),
    ],
)
def test_one_step_fingerprint(execution):
    """Golden loss and gradients; 2e-5 relative covers float32 sums in another order."""
    golden, got = json.loads(GOLDEN.read_text()), fingerprint(**execution)
    assert got["loss"] == pytest.approx(golden["loss"], rel=2e-5)
    assert got["gradient_norms"] == pytest.approx(golden["gradient_norms"], rel=2e-5)


@pytest.mark.parametrize(
    "execution",
    [
        dict(remat="none"),
        dict(remat="dots"),
        dict(remat="names", saved_names=("q",), offloaded_names=("residual",)),
        dict(remat="names", offloaded_names=("attention",), is_scanned=False),
        dict(remat="none", checkpoint_every=2, checkpoint_place="host"),
    ],
    ids=["none", "dots", "offloaded", "offloaded_unrolled", "in groups"],
)
def test_remat_changes_no_gradient(execution):
    assert_same_loss_and_gradient(value_and_gradient(DENSE, **execution), value_and_gradient(DENSE))


def layers_and_gradient(execution):
    """Residual, router's sums and a gradient of all of them through the layers of `DRAWING`."""
    decoder = Decoder(DRAWING, policy=FLOAT32, execution=execution)
    batch = make_batch(is_drawing=True)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def total(params):
        x = jnp.take(params["embedding"]["tokens"], batch["tokens"], axis=0)
        x, _, sums = decoder.run_layers(params, x, decoder.tokens(batch))
        losses = sum(each.balance.sum() + each.z.sum() for each in sums)
        return (x**2).sum() + losses, (x, sums)

    (value, found), gradient = jax.jit(total)(make_params(DRAWING))
    return (value, gradient), found


@pytest.mark.long
def test_layers_by_chunk_compute_and_differentiate_as_whole_ones():
    """With windows, documents, the router's losses, and draws of each token whatever its chunk."""
    unrolled = dict(is_scanned=False, remat="none")
    whole = layers_and_gradient(ExecutionConfig(**unrolled))
    chunked = layers_and_gradient(ExecutionConfig(**unrolled, strategy=ByChunk(4)))
    for got, wanted in zip(jax.tree.leaves(chunked[1]), jax.tree.leaves(whole[1]), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    assert_same_loss_and_gradient(chunked[0], whole[0])


@pytest.mark.parametrize(
    ("model", "execution"),
    [
        pytest.param(DENSE, {}, id="dense"),
        pytest.param(DRAWING, {}, id="drawing", marks=pytest.mark.long),
        pytest.param(MODEL, {}, id="mixture", marks=pytest.mark.long),
        pytest.param(MODEL, {"is_scanned": False}, id="unrolled", marks=pytest.mark.long),
    ],
)
def test_layers_by_chunk_have_the_loss_of_whole_ones(model, execution):
    chunked = value_and_gradient(model, strategy=ByChunk(4), **execution)
    assert_same_loss_and_gradient(chunked, value_and_gradient(model, **execution))


def test_a_number_of_chunks_that_does_not_divide_is_refused():
    loss = loss_of(DENSE, strategy=ByChunk(3))
    with pytest.raises(InputError, match=r"ByChunk\.num_chunks: given 3, .* 16 % 3 = 1"):
        jax.eval_shape(loss, make_params(DENSE))


def kept(remat, model=DENSE, **settings):
    """Elements that the backward is given."""
    loss = loss_of(model, remat=remat, **settings)
    pullback = jax.eval_shape(lambda p: jax.vjp(loss, p)[1], make_params(model))
    return sum(leaf.size for leaf in jax.tree.leaves(pullback))


def test_remat_keeps_less_the_more_it_recomputes():
    residuals = DENSE.num_layers * 2 * 16 * DENSE.model_dim
    assert kept("full") + residuals < kept("dots") < kept("none") - residuals


def test_of_a_group_of_layers_one_input_is_kept():
    model = dataclasses.replace(DENSE, num_layers=4)
    of_layer = 2 * 16 * model.model_dim
    assert kept("full", model) - kept("full", model, checkpoint_every=4) == 3 * of_layer
    in_chunks = dict(strategy=FullyPipelined(8, num_pieces=1), checkpoint_every=4)
    of_whole = kept("full", model, checkpoint_every=4)
    assert abs(kept("none", model, **in_chunks) - of_whole) < of_layer / 2


def test_layers_in_chunks_keep_no_converted_parameters():
    execution = ExecutionConfig(remat="none", strategy=FullyPipelined(8, num_pieces=1))
    loss = NextTokenLoss(DENSE, Policy(compute="bfloat16"), execution)
    params, batch = make_params(DENSE), make_batch()
    kept = jax.eval_shape(lambda p: jax.vjp(lambda p: loss(p, batch, None)[0], p)[1], params)
    converted = {leaf.shape for leaf in jax.tree.leaves(kept) if leaf.dtype == jnp.bfloat16}
    attention = params["layers"]["0"]["attention"]
    assert not converted & {attention[name].shape for name in ("q", "k")}


def test_offloaded_names_go_to_the_host():
    """The CPU compiler drops the transfer, so it is looked for in the traced program."""

    def traced(**execution):
        gradient = jax.grad(loss_of(DENSE, **execution))
        return str(jax.make_jaxpr(gradient)(make_params(DENSE)))

    assert "device_put" in traced(remat="names", offloaded_names=("residual",))
    assert "device_put" not in traced(remat="names", saved_names=("residual",))


def num_sines(execution, name):
    """How often the sine of a layer exp(sin(x)), its output under `name`, is made."""
    layer = execution.rematerialise(lambda x: jnp.exp(checkpoint_name(jnp.sin(x), name)))
    return str(jax.make_jaxpr(jax.grad(layer))(1.0)).count("= sin ")


@pytest.mark.parametrize("name, times", [(KERNEL_OUTPUT, 1), (EXCHANGED, 1), ("residual", 2)])
def test_what_costs_much_is_not_made_again_under_remat_dots(name, times):
    assert num_sines(ExecutionConfig(remat="dots"), name) == times


@pytest.mark.parametrize("names, times", [(("attention",), 1), (("q",), 2)])
def test_remat_of_names_keeps_attention_with_what_its_kernel_leaves_for_the_backward(names, times):
    execution = ExecutionConfig(remat="names", saved_names=names)
    assert num_sines(execution, KERNEL_OUTPUT) == times


@pytest.mark.parametrize(
    "settings",
    [
        dict(remat="full"),
        dict(remat="dots"),
        dict(remat="names", saved_names=("q",)),
        dict(remat="none", strategy=ByChunk(4)),
    ],
    ids=["full", "dots", "names", "by_chunk"],
)
def test_a_router_s_logits_are_not_made_again(settings):
    """They could differ in the last bit, and a draw of the backward from that of the forward."""
    gradient = jax.grad(loss_of(DRAWING, **settings))
    jaxpr = str(jax.make_jaxpr(gradient)(make_params(DRAWING)))
    assert jaxpr.count("name=router") == sum(layer.is_moe for layer in DRAWING.pattern)


@pytest.mark.parametrize("num_chunks", [1, 2])
def test_a_router_s_logits_are_not_made_again_where_groups_of_layers_are(num_chunks):
    model = dataclasses.replace(DRAWING, num_layers=5)
    strategy = FullyPipelined(16 // num_chunks, num_pieces=1)
    loss = loss_of(model, remat="none", checkpoint_every=2, strategy=strategy)
    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(make_params(model)))
    assert jaxpr.count("name=router") == num_chunks


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(remat="some"), "ExecutionConfig.remat: given 'some'"),
        (
            dict(remat="names", saved_names=("logits",)),
            "ExecutionConfig.saved_names: given 'logits'",
        ),
        (
            dict(remat="names", offloaded_names=("logits",)),
            "ExecutionConfig.offloaded_names: given 'logits'",
        ),
        (
            dict(attention="flash"),
            "ExecutionConfig.attention: given 'flash', expected one of None, 'reference'",
        ),
        (
            dict(checkpoint_every=2, is_scanned=False),
            "ExecutionConfig.checkpoint_every: given 2, expected 1 with is_scanned False",
        ),
        (dict(num_loss_chunks=0), "ExecutionConfig.num_loss_chunks: given 0"),
        (dict(strategy=ByChunk), "a strategy: @ByChunk() with brackets builds it"),
        (dict(saved_names=("q",)), '"names" when saved_names or offloaded_names are given'),
    ],
)
def test_a_wrong_setting_is_named(settings, message):
    with pytest.raises(InputError) as error:
        ExecutionConfig(**settings)
    assert message in str(error.value)


@pytest.mark.parametrize("given", [0, 2.0])
def test_a_wrong_number_of_chunks_is_named(given):
    with pytest.raises(InputError, match=rf"ByChunk\.num_chunks: given {given}"):
        ByChunk(given)


def test_a_named_attention_backend_is_used_on_one_device():
    execution = ExecutionConfig(attention="chunked")
    decoder = Decoder(MODEL, execution.operations(), FLOAT32, execution)
    with pytest.raises(InputError, match="T % 512 == 0, but T = 16"):
        jax.eval_shape(decoder.logits, make_params(), make_batch())
    with pytest.raises(InputError, match="T % 512 == 0, but T = 16"):
        loss = NextTokenLoss(MODEL, FLOAT32, execution)
        jax.eval_shape(loss, make_params(), make_batch(), None)


def test_the_loss_traces_on_abstract_shapes():
    """A model of 70 billion parameters on two million tokens: nothing is allocated."""
    large = from_flat(
        vocab_size=128256,
        num_layers=80,
        model_dim=8192,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        ffn_dim=28672,
        max_length=8192,
    )
    types = dict.fromkeys(("tokens", "labels", "segments", "positions"), "int32")
    types["weights"] = "float32"
    batch = {name: jax.ShapeDtypeStruct((256, 8192), dtype) for name, dtype in types.items()}
    loss = NextTokenLoss(large, Policy(), ExecutionConfig())
    params = abstract_params(parameter_table(large), "float32")

    def value_and_sums(params, batch):
        sums = loss(params, batch, None)
        return sums[0], sums

    gradient, sums = jax.eval_shape(jax.grad(value_and_sums, has_aux=True), params, batch)
    assert jax.tree.map(lambda g: g.shape, gradient) == jax.tree.map(lambda p: p.shape, params)
    assert sums[0].shape == sums[1].shape == ()


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(fingerprint(), indent=1) + "\n")
