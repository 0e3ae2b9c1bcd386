"""Logits equal those of Hugging Face's Llama and Mixtral, an implementation that shares nothing with ours."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.models.config import ModelConfig
from jaxscale.models.transformer import StackConfig, forward
from jaxscale.ops.precision import Policy

SHAPE = dict(vocab_size=97, num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, max_length=64)
TORCH = "torch is no dependency of ours; with its CPU build installed this compares with Hugging Face"


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
        "k": stacked(state, prefix + "self_attn.k_proj.weight", shape=(layers, dim, kv_heads, size)),
        "v": stacked(state, prefix + "self_attn.v_proj.weight", shape=(layers, dim, kv_heads, size)),
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
            vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=48, max_position_embeddings=64, rms_norm_eps=1e-5, attn_implementation="eager",
        )
    )  # fmt: skip
    state = model.state_dict()
    ffn = {name: stacked(state, "model.layers.{}.mlp." + name + "_proj.weight") for name in ("gate", "up", "down")}
    ffn["norm"] = {"scale": stacked(state, "model.layers.{}.post_attention_layernorm.weight")}
    params = outer_params(state) | {"layers": {"0": {"attention": attention_params(state), "ffn": ffn}}}
    return model, params, ModelConfig(**SHAPE, ffn_dim=48)


def mixtral():
    """The same for a Mixtral of four experts, two a token."""
    from transformers import MixtralConfig, MixtralForCausalLM

    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=48, max_position_embeddings=64, num_local_experts=4, num_experts_per_tok=2,
            rope_theta=10000.0, rms_norm_eps=1e-5, attn_implementation="eager", experts_implementation="eager",
        )
    )  # fmt: skip
    state, prefix = model.state_dict(), "model.layers.{}."
    joined = np.stack([state[prefix.format(i) + "mlp.experts.gate_up_proj"].numpy() for i in range(2)])
    down = np.stack([state[prefix.format(i) + "mlp.experts.down_proj"].numpy() for i in range(2)])
    gate, up = np.split(joined.swapaxes(2, 3), 2, -1)
    moe = {
        "norm": {"scale": stacked(state, prefix + "post_attention_layernorm.weight")},
        "router": stacked(state, prefix + "mlp.gate.weight"),
        "experts": {"gate": jnp.asarray(gate), "up": jnp.asarray(up), "down": jnp.asarray(down.swapaxes(2, 3))},
    }
    params = outer_params(state) | {"layers": {"0": {"attention": attention_params(state), "moe": moe}}}
    config = ModelConfig(**SHAPE, ffn_dim=48, moe_pattern=(True,), num_experts=4, expert_dim=48)
    return model, params, config


@pytest.mark.long
@pytest.mark.parametrize("make", [llama, mixtral])
def test_logits_equal(make):
    torch = pytest.importorskip("torch", reason=TORCH)
    torch.manual_seed(0)
    model, params, config = make()
    tokens = np.random.default_rng(0).integers(0, 97, (2, 24))
    with torch.no_grad():
        wanted = model(torch.from_numpy(tokens)).logits.numpy()
    batch = {"tokens": jnp.asarray(tokens), "positions": jnp.broadcast_to(jnp.arange(24), (2, 24))}
    got, _ = forward(params, batch, config=config, policy=Policy(compute="float32"), stack=StackConfig(remat="none"))
    np.testing.assert_allclose(got, wanted, atol=1e-5)
