"""Logits and routers equal those of Hugging Face's Llama, Mixtral and PhiMoE, which share nothing with ours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.models.config import ModelConfig
from jaxscale.models.sparsemixer import numbers_of, sparsemixer
from jaxscale.models.transformer import StackConfig, forward
from jaxscale.ops.draws import Draws
from jaxscale.ops.precision import Policy

SHAPE = dict(
    vocab_size=97,
    num_layers=2,
    model_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_length=64,
)
TORCH = (
    "torch is no dependency of ours; with its CPU build installed this compares with Hugging Face"
)


def stacked(state, pattern, shape=None):
    """The layers' torch weights [out, in] as one stack [L, in, out], reshaped."""
    layers = [state[pattern.format(layer)].numpy().T for layer in range(SHAPE["num_layers"])]
    return jnp.asarray(np.stack(layers)).reshape(shape or (len(layers), *layers[0].shape))


def attention_params(state):
    """The parameters that Llama and Mixtral name alike."""
    layers, dim, heads, kv_heads, size = 2, 32, 4, 2, 8
    prefix = "model.layers.{}."
    return {
        "norm": {"scale": stacked(state, prefix + "input_layernorm.weight")},
        "q": stacked(state, prefix + "self_attn.q_proj.weight", shape=(layers, dim, heads, size)),
        "k": stacked(
            state, prefix + "self_attn.k_proj.weight", shape=(layers, dim, kv_heads, size)
        ),
        "v": stacked(
            state, prefix + "self_attn.v_proj.weight", shape=(layers, dim, kv_heads, size)
        ),
        "o": stacked(state, prefix + "self_attn.o_proj.weight", shape=(layers, heads, size, dim)),
    }


def outer_params(state):
    """Embedding, final norm and unembedding."""
    return {
        "embedding": {"tokens": jnp.asarray(state["model.embed_tokens.weight"].numpy())},
        "final_norm": {"scale": jnp.asarray(state["model.norm.weight"].numpy())},
        "head": {"weights": jnp.asarray(state["lm_head.weight"].numpy())},
    }


def llama():
    """A random Llama, its parameters in our tree and the configuration."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            max_position_embeddings=64,
            rms_norm_eps=1e-5,
            attn_implementation="eager",
        )
    )
    state = model.state_dict()
    ffn = {
        name: stacked(state, "model.layers.{}.mlp." + name + "_proj.weight")
        for name in ("gate", "up", "down")
    }
    ffn["norm"] = {"scale": stacked(state, "model.layers.{}.post_attention_layernorm.weight")}
    params = outer_params(state) | {
        "layers": {"0": {"attention": attention_params(state), "ffn": ffn}}
    }
    return model, params, ModelConfig(**SHAPE, ffn_dim=48)


def mixtral():
    """The same for a Mixtral of four experts, two a token."""
    from transformers import MixtralConfig, MixtralForCausalLM

    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=97,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            max_position_embeddings=64,
            num_local_experts=4,
            num_experts_per_tok=2,
            rope_theta=10000.0,
            rms_norm_eps=1e-5,
            attn_implementation="eager",
            experts_implementation="eager",
        )
    )
    state = model.state_dict()
    params = outer_params(state) | {
        "layers": {"0": {"attention": attention_params(state), "moe": moe_params(state)}}
    }
    config = ModelConfig(**SHAPE, ffn_dim=48, moe_pattern=(True,), num_experts=4, expert_dim=48)
    return model, params, config


def moe_params(state):
    """The parameters that Mixtral and PhiMoE name nearly alike."""
    prefix = "model.layers.{}."
    router = (
        "mlp.gate.weight" if prefix.format(0) + "mlp.gate.weight" in state else "mlp.router.weight"
    )
    joined = np.stack(
        [state[prefix.format(i) + "mlp.experts.gate_up_proj"].numpy() for i in range(2)]
    )
    down = np.stack([state[prefix.format(i) + "mlp.experts.down_proj"].numpy() for i in range(2)])
    gate, up = np.split(joined.swapaxes(2, 3), 2, -1)
    return {
        "norm": {"scale": stacked(state, prefix + "post_attention_layernorm.weight")},
        "router": stacked(state, prefix + router),
        "experts": {
            "gate": jnp.asarray(gate),
            "up": jnp.asarray(up),
            "down": jnp.asarray(down.swapaxes(2, 3)),
        },
    }


def phimoe():
    """The same for a PhiMoE, GRIN's architecture: biases of attention, norms and head, and its released router."""
    from transformers import PhimoeConfig, PhimoeForCausalLM

    model = PhimoeForCausalLM(
        PhimoeConfig(
            vocab_size=97,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            max_position_embeddings=64,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=8,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            rms_norm_eps=1e-5,
            attention_bias=True,
            lm_head_bias=True,
            router_jitter_noise=0.2,
            attn_implementation="eager",
            experts_implementation="eager",
        )
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # which starts at 0, where nothing could tell whether it is read
            parameter.data.normal_()
    state, prefix = model.state_dict(), "model.layers.{}."
    attention, moe, outer = attention_params(state), moe_params(state), outer_params(state)
    for name, heads in {"q": 4, "k": 2, "v": 2}.items():
        attention[f"{name}_bias"] = stacked(
            state, prefix + f"self_attn.{name}_proj.bias", (2, heads, 8)
        )
    attention["o_bias"] = stacked(state, prefix + "self_attn.o_proj.bias")
    attention["norm"]["bias"] = stacked(state, prefix + "input_layernorm.bias")
    moe["norm"]["bias"] = stacked(state, prefix + "post_attention_layernorm.bias")
    outer["final_norm"]["bias"] = jnp.asarray(state["model.norm.bias"].numpy())
    outer["head"]["bias"] = jnp.asarray(state["lm_head.bias"].numpy())
    config = ModelConfig(
        **SHAPE,
        ffn_dim=48,
        moe_pattern=(True,),
        num_experts=4,
        expert_dim=48,
        norm="layernorm",
        use_bias=True,
        use_head_bias=True,
        windows=(8,),
        router="sparsemixer_v2",
        router_mask="released",
        router_threshold=0.2,
    )
    return model, outer | {"layers": {"0": {"attention": attention, "moe": moe}}}, config


@pytest.mark.long
@pytest.mark.parametrize("make", [llama, mixtral, phimoe])
def test_logits_equal(make):
    torch = pytest.importorskip("torch", reason=TORCH)
    torch.manual_seed(0)
    model, params, config = make()
    model.eval()
    tokens = np.random.default_rng(0).integers(0, 97, (2, 24))
    with torch.no_grad():
        wanted = model(torch.from_numpy(tokens)).logits.numpy()
    batch = {"tokens": jnp.asarray(tokens), "positions": jnp.broadcast_to(jnp.arange(24), (2, 24))}
    got, _ = forward(
        params,
        batch,
        config=config,
        policy=Policy(compute="float32"),
        stack=StackConfig(remat="none"),
    )
    np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.long
def test_sparsemixer_v2_draws_and_differentiates_as_its_released_code(monkeypatch):
    """Given the same random numbers: the experts, their multipliers and the gradient of the logits."""
    torch = pytest.importorskip("torch", reason=TORCH)
    from transformers.models.phimoe.modeling_phimoe import sparsemixer as released

    tokens, threshold = 512, 0.3
    config = ModelConfig(
        **SHAPE,
        ffn_dim=48,
        moe_pattern=(True,),
        num_experts=16,
        expert_dim=48,
        router="sparsemixer_v2",
        router_mask="released",
        router_expert_gradient="released",
        router_threshold=threshold,
    )
    rng = np.random.default_rng(0)
    z, cotangent = rng.normal(size=(tokens, 16)), rng.normal(size=(tokens, 2))
    draws = Draws(jnp.asarray(rng.integers(0, 2**32, (1, tokens, 2)), jnp.uint32))
    numbers = torch.from_numpy(np.array(numbers_of(draws, config)[0], np.float64))
    exponentials = iter([-numbers[:, number, :-1].log() for number in range(2)])
    chances = iter([1 - numbers[:, number, -1:] for number in range(2)])
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self: next(exponentials))
    monkeypatch.setattr(torch, "rand_like", lambda like: next(chances))
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self: self)
    scores = torch.from_numpy(z).requires_grad_()
    gates, index = released(scores, threshold, training=True)
    (gates * torch.from_numpy(cotangent)).sum().backward()
    with jax.enable_x64(True):
        ours = sparsemixer(jnp.asarray(z)[None], draws, config)
        gradient = jax.grad(lambda z: (sparsemixer(z, draws, config).gates[0] * cotangent).sum())(
            jnp.asarray(z)[None]
        )
        np.testing.assert_array_equal(ours.index[0], index.numpy())
        np.testing.assert_allclose(
            ours.gates[0], gates.detach().numpy(), rtol=2e-4
        )  # it has 0.3333 for a third
        np.testing.assert_allclose(gradient[0], scores.grad.numpy(), atol=1e-12)
    assert (np.asarray(ours.gates) < 0.99).mean() > 0.1 and len({*map(tuple, index.tolist())}) > 100
