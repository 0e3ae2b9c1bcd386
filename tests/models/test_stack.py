"""How the stack runs never changes what it computes; the nnx surface; one step's fingerprint."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxscale import tree
from jaxscale.models.config import ModelConfig
from jaxscale.models.parameters import abstract_params
from jaxscale.models.transformer import StackConfig, Transformer, forward
from jaxscale.ops.precision import Policy
from jaxscale.train.losses import NextTokenLoss
from jaxscale.types import InputError

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "one_step.json"
FLOAT32 = Policy(compute="float32")
MODEL = ModelConfig(
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
DENSE = ModelConfig(
    vocab_size=48,
    num_layers=2,
    model_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    ffn_dim=24,
    max_length=16,
)


@functools.cache
def make_params(model=MODEL):
    """Waves, so that no random generator and no value such as 0 or 1 is in the golden numbers."""

    def wave(path, leaf):
        phase = sum(map(ord, jax.tree_util.keystr(path))) + np.arange(np.prod(leaf.shape)).reshape(
            leaf.shape
        )
        return jnp.asarray(
            0.2 * np.sin(1.7 * phase + phase**2 % 11) + (path[-1].key == "scale"), jnp.float32
        )

    return jax.tree_util.tree_map_with_path(wave, abstract_params(model, "float32"))


def make_batch():
    """Two documents and padding in each of two rows, from no random generator that could change."""
    tokens = (np.arange(34).reshape(2, 17) * 7 + 3) ** 2 % 47
    segments = np.tile(np.repeat([1, 2, 0], (6, 7, 3)), (2, 1))
    positions = np.tile(np.concatenate([np.arange(n) for n in (6, 7, 3)]), (2, 1))
    return jax.tree.map(
        jnp.asarray,
        dict(
            tokens=tokens[:, :-1],
            labels=tokens[:, 1:],
            segments=segments,
            positions=positions,
            weights=(segments > 0).astype("float32"),
        ),
    )


@functools.cache
def value_and_gradient(model=MODEL, **stack):
    loss = NextTokenLoss(model, FLOAT32, StackConfig(num_loss_chunks=2, **stack), z_loss=1e-3)
    run = jax.jit(jax.value_and_grad(lambda p: loss(p, make_batch(), None)[0]))
    return run(make_params(model))


def fingerprint(**stack):
    """The loss and the norm of each gradient."""
    value, gradient = value_and_gradient(**stack)
    norms = {path: float(jnp.linalg.norm(leaf)) for path, leaf in tree.flatten(gradient).items()}
    return {"loss": float(value), "gradient_norms": norms}


@pytest.mark.parametrize("is_scanned", [True, False])
def test_one_step_fingerprint(is_scanned):
    """Golden numbers of the loss and every gradient; 2e-5 relative covers float32 sums in another order."""
    golden, got = json.loads(GOLDEN.read_text()), fingerprint(is_scanned=is_scanned)
    assert got["loss"] == pytest.approx(golden["loss"], rel=2e-5)
    assert got["gradient_norms"] == pytest.approx(golden["gradient_norms"], rel=2e-5)


@pytest.mark.parametrize(
    "stack",
    [
        dict(remat="none"),
        dict(remat="dots"),
        dict(remat="names", saved_names=("q",), offloaded_names=("residual",)),
        dict(remat="names", offloaded_names=("attention",), is_scanned=False),
    ],
    ids=["none", "dots", "offloaded", "offloaded_unrolled"],
)
def test_remat_changes_no_gradient(stack):
    value, gradient = value_and_gradient(DENSE, **stack)
    wanted_value, wanted = value_and_gradient(DENSE)
    np.testing.assert_allclose(value, wanted_value, rtol=1e-6)
    for (path, got), want in zip(
        tree.flatten(gradient).items(), jax.tree.leaves(wanted), strict=True
    ):
        assert jnp.abs(got - want).max() <= 1e-5 * jnp.abs(want).max(), path


def test_remat_keeps_less_the_more_it_recomputes():
    def kept(remat):
        loss = NextTokenLoss(DENSE, FLOAT32, StackConfig(num_loss_chunks=2, remat=remat))
        pullback = jax.eval_shape(
            lambda p: jax.vjp(lambda p: loss(p, make_batch(), None)[0], p)[1], make_params(DENSE)
        )
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    residual = 2 * 16 * DENSE.model_dim
    assert (
        kept("full") + DENSE.num_layers * residual
        < kept("dots")
        < kept("none") - DENSE.num_layers * residual
    )


def test_offloaded_names_go_to_the_host():
    """The CPU compiler drops the transfer, so it is looked for in the traced program."""

    def traced(**stack):
        loss = NextTokenLoss(DENSE, FLOAT32, StackConfig(num_loss_chunks=2, **stack))
        return str(
            jax.make_jaxpr(jax.grad(lambda p: loss(p, make_batch(), None)[0]))(make_params(DENSE))
        )

    assert "device_put" in traced(remat="names", offloaded_names=("residual",))
    assert "device_put" not in traced(remat="names", saved_names=("residual",))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(remat="some"), "StackConfig.remat: given 'some'"),
        (dict(remat="names", saved_names=("logits",)), "StackConfig.saved_names: given 'logits'"),
        (
            dict(remat="names", offloaded_names=("logits",)),
            "StackConfig.offloaded_names: given 'logits'",
        ),
        (
            dict(attention="flash"),
            "StackConfig.attention: given 'flash', expected one of None, 'reference'",
        ),
        (dict(num_loss_chunks=0), "StackConfig.num_loss_chunks: given 0"),
        (dict(saved_names=("q",)), '"names" when saved_names or offloaded_names are given'),
    ],
)
def test_a_wrong_setting_is_named(settings, message):
    with pytest.raises(InputError) as error:
        StackConfig(**settings)
    assert message in str(error.value)


def test_a_named_attention_backend_is_used_on_one_device():
    stack = StackConfig(attention="chunked")
    with pytest.raises(InputError, match="T % 512 == 0, but T = 16"):
        jax.eval_shape(
            functools.partial(forward, config=MODEL, stack=stack), make_params(), make_batch()
        )
    with pytest.raises(InputError, match="T % 512 == 0, but T = 16"):
        jax.eval_shape(NextTokenLoss(MODEL, FLOAT32, stack), make_params(), make_batch(), None)


def test_the_loss_traces_on_abstract_shapes():
    """A model of 70 billion parameters on two million tokens: nothing is allocated."""
    large = ModelConfig(
        vocab_size=128256,
        num_layers=80,
        model_dim=8192,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        ffn_dim=28672,
        max_length=8192,
    )
    types = dict(
        tokens="int32", labels="int32", weights="float32", segments="int32", positions="int32"
    )
    batch = {name: jax.ShapeDtypeStruct((256, 8192), dtype) for name, dtype in types.items()}
    loss = NextTokenLoss(large, Policy(), StackConfig())
    params = abstract_params(large, "float32")
    gradient, sums = jax.eval_shape(
        jax.grad(lambda p, b: (lambda s: (s[0], s))(loss(p, b, None)), has_aux=True), params, batch
    )
    assert jax.tree.map(lambda g: g.shape, gradient) == jax.tree.map(lambda p: p.shape, params)
    assert sums[0].shape == sums[1].shape == ()


@pytest.fixture(scope="module")
def module():
    return Transformer(DENSE, rngs=nnx.Rngs(params=3), policy=FLOAT32)


def test_the_module_equals_the_function(module):
    batch = make_batch()
    wanted, _ = jax.jit(functools.partial(forward, config=DENSE, policy=FLOAT32))(
        module.pure_params(), batch
    )
    run = nnx.jit(lambda m, b: m(b["tokens"], b["positions"], b["segments"]))
    np.testing.assert_allclose(run(module, batch), wanted, atol=1e-6)
    graph, state = nnx.split(module)
    np.testing.assert_allclose(run(nnx.merge(graph, state), batch), wanted, atol=1e-6)
    assert jax.tree.map(jnp.shape, module.pure_params()) == jax.tree.map(
        lambda p: p.shape, abstract_params(DENSE, "float32")
    )


def test_the_module_differentiates(module):
    tokens = make_batch()["tokens"]

    @nnx.jit
    @nnx.grad
    def gradient(m):
        return (m(tokens) ** 2).mean()

    def plain(params):
        positions = jnp.broadcast_to(jnp.arange(16), (2, 16))
        return (
            forward(
                params, {"tokens": tokens, "positions": positions}, config=DENSE, policy=FLOAT32
            )[0]
            ** 2
        ).mean()

    wanted = jax.tree.leaves(jax.jit(jax.grad(plain))(module.pure_params()))
    got = jax.tree.leaves(gradient(module))
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(fingerprint(), indent=1) + "\n")
