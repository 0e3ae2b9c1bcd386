"""Phi-3-small against formulas in float64 on tensors as its files have them.

No maintained implementation exists to compare with. The formulas are those of the paper (arXiv
2404.14219) and of the released configuration; they know nothing of our names and layouts.
"""

import functools
import json

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from jaxscale.checkpoint.safetensors import NewTensor, write_safetensors
from jaxscale.convert.folder import open_folder, read_config
from jaxscale.convert.weights import export_tensors
from jaxscale.models.config.facts import checkpoint_facts
from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.parameters import abstract_params, count_parameters, parameter_table
from jaxscale.ops.precision import Policy
from jaxscale.serve.decoding import generate_tokens
from jaxscale.serve.sampling import SamplingConfig
from jaxscale.types import InputError

RELEASED = {
    "model_type": "phi3small",
    "attention_dropout_prob": 0.0,
    "blocksparse_block_size": 64,
    "blocksparse_homo_head_pattern": False,
    "blocksparse_num_local_blocks": 16,
    "blocksparse_triton_kernel_block_size": 64,
    "blocksparse_vert_stride": 8,
    "bos_token_id": 100257,
    "dense_attention_every_n_layers": 2,
    "embedding_dropout_prob": 0.1,
    "eos_token_id": 100257,
    "ff_dim_multiplier": None,
    "ff_intermediate_size": 14336,
    "ffn_dropout_prob": 0.1,
    "gegelu_limit": 20.0,
    "gegelu_pad_to_256": True,
    "hidden_act": "gegelu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 8192,
    "mup_attn_multiplier": 1.0,
    "mup_embedding_multiplier": 10.0,
    "mup_use_scaling": True,
    "mup_width_multiplier": 8.0,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pad_sequence_to_multiple_of_64": True,
    "reorder_and_upcast_attn": False,
    "rope_embedding_base": 1000000,
    "rope_position_scale": 1.0,
    "torch_dtype": "bfloat16",
    "attention_bias": False,
    "vocab_size": 100352,
}
D, N, K, H, F, V, T = 32, 4, 2, 8, 24, 61, 300
TINY = RELEASED | {
    "hidden_size": D,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "ff_intermediate_size": F,
    "vocab_size": V,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "blocksparse_num_local_blocks": 1,
    "blocksparse_vert_stride": 3,
    "mup_attn_multiplier": 2.0,
}
SHAPES = {
    "input_layernorm.weight": (D,),
    "input_layernorm.bias": (D,),
    "self_attn.query_key_value.weight": ((N + 2 * K) * H, D),
    "self_attn.query_key_value.bias": ((N + 2 * K) * H,),
    "self_attn.dense.weight": (D, D),
    "self_attn.dense.bias": (D,),
    "post_attention_layernorm.weight": (D,),
    "post_attention_layernorm.bias": (D,),
    "mlp.up_proj.weight": (2 * F, D),
    "mlp.up_proj.bias": (2 * F,),
    "mlp.down_proj.weight": (D, F),
    "mlp.down_proj.bias": (D,),
}


@functools.cache
def tensors():
    """Tensors of a tiny model; some hidden elements reach the clamp at 20."""
    rng = np.random.default_rng(0)
    shapes = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in SHAPES.items()}
    shapes |= {"model.embed_tokens.weight": (V, D)}
    shapes |= {f"model.final_layernorm.{name}": (D,) for name in ("weight", "bias")}
    found = {}
    for name, shape in shapes.items():
        mean = float("layernorm.weight" in name)
        std = 4.0 if "up_proj" in name else 0.5
        found[name] = (mean + std * rng.normal(size=shape)).astype(np.float32)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("phi3_small")
    (path / "config.json").write_text(json.dumps(TINY))
    new = [NewTensor(n, t.shape, t.dtype, lambda t=t: t) for n, t in tensors().items()]
    write_safetensors(path, new, max_shard_bytes=10**9)
    return open_folder(path)


@pytest.fixture(scope="module")
def params(folder):
    device = SingleDeviceSharding(jax.devices()[0])
    shapes = abstract_params(parameter_table(folder.config), "float32")
    return folder.params(
        jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=device), shapes)
    )


# The formulas


def layer_norm(name, x):
    w, b = tensors()[f"{name}.weight"], tensors()[f"{name}.bias"]
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w + b


def linear(name, x):
    return x @ tensors()[f"{name}.weight"].T.astype(float) + tensors()[f"{name}.bias"]


def rotate(x, positions):
    angles = positions[:, None] * 1e6 ** (-np.arange(H // 2) / (H // 2))
    z = (x[..., : H // 2] + 1j * x[..., H // 2 :]) * np.exp(1j * angles)
    return np.concatenate([z.real, z.imag], -1)


def attention(place, layer, x):
    length = len(x)
    fused = linear(f"{place}self_attn.query_key_value", x).reshape(length, K, N // K + 2, H)
    t = np.arange(length)
    out = np.zeros((length, N, H))
    for head in range(N):
        q = rotate(fused[:, head // (N // K), head % (N // K)], t)
        k = rotate(fused[:, head // (N // K), -2], t)
        v = fused[:, head // (N // K), -1]
        sees = t[:, None] >= t
        if layer == 0:  # the second of two is dense
            i, j = t[:, None] // 64, t // 64
            sees = sees & ((i - j < 1) | ((j + head + 1) % 3 == 0))
        weights = np.exp(2.0 / H * q @ k.T) * sees
        out[:, head] = weights / weights.sum(-1, keepdims=True) @ v
    return linear(f"{place}self_attn.dense", out.reshape(length, D))


def feed_forward(place, x):
    hidden = linear(f"{place}mlp.up_proj", x)
    gate, up = np.minimum(hidden[:, 0::2], 20), np.clip(hidden[:, 1::2], -20, 20)
    assert (hidden > 20).any() and (hidden < -20).any()
    return linear(f"{place}mlp.down_proj", gate / (1 + np.exp(-1.702 * gate)) * (up + 1))


def logits_of(tokens):
    embedding = tensors()["model.embed_tokens.weight"].astype(float)
    x = 10 * embedding[tokens]
    for layer in range(2):
        place = f"model.layers.{layer}."
        x = x + attention(place, layer, layer_norm(f"{place}input_layernorm", x))
        x = x + feed_forward(place, layer_norm(f"{place}post_attention_layernorm", x))
    return layer_norm("model.final_layernorm", x) @ embedding.T / 8


def decoder(folder):
    execution = ExecutionConfig(remat="none")
    return Decoder(folder.config, policy=Policy(compute="float32"), execution=execution)


def test_logits_are_those_of_the_formulas(folder, params):
    tokens = np.random.default_rng(1).integers(0, V, (1, T))
    batch = {"tokens": tokens, "positions": np.arange(T)[None]}
    got = jax.jit(decoder(folder).logits)(params, batch)[0][0]
    wanted = logits_of(tokens[0])
    assert np.abs(got - wanted).max() <= 2e-5 * np.abs(wanted).max()


def test_decoding_sees_the_blocks_of_each_head(folder, params):
    text = np.random.default_rng(2).integers(0, V, 200).tolist()
    (new,) = generate_tokens(
        decoder(folder),
        params,
        [text],
        sampling=SamplingConfig(temperature=0.0),
        max_new_tokens=4,
    )
    for token in new:
        assert logits_of(np.array(text))[-1].argmax() == token
        text.append(token)


def test_an_export_has_the_same_bytes(folder, params):
    made = export_tensors(folder.config, folder.family.layout, params, dtype=np.dtype("float32"))
    assert {tensor.name for tensor in made} == tensors().keys()
    for tensor in made:
        np.testing.assert_array_equal(tensor.make(), tensors()[tensor.name], tensor.name)


def test_the_released_configuration_is_read_and_written(folder):
    model = read_config(folder.family, RELEASED, "config.json", ())
    assert round(count_parameters(parameter_table(model))[0] / 1e9, 2) == 7.39
    written = folder.family.write(model)
    again = read_config(folder.family, written, "config.json", ())
    found, wanted = (checkpoint_facts(each)["fingerprint"] for each in (again, model))
    assert found == wanted


def test_without_its_scaling_attention_alone_is_as_usual(folder):
    """Logits are divided by the width's multiplier all the same."""
    plain = read_config(folder.family, RELEASED | {"mup_use_scaling": False}, "config.json", ())
    scaled = read_config(folder.family, RELEASED, "config.json", ())
    attention = plain.layers[0].attention
    assert attention.scale == attention.head_dim**-0.5
    assert plain.unembedding_scale == scaled.unembedding_scale == 1 / 8


@pytest.mark.parametrize("kind", ["su", "longrope"])
def test_the_long_model_has_magnitudes_of_both_lists(folder, kind):
    scaling = {
        "type": kind,
        "short_factor": [1.0] * 64,
        "long_factor": [2.0] * 64,
        "short_mscale": 1.1,
        "long_mscale": 1.2,
        "original_max_position_embeddings": 8192,
    }
    values = RELEASED | {"max_position_embeddings": 131072, "rope_scaling": scaling}
    model = read_config(folder.family, values, "config.json", ())
    found = model.layers[0].attention.rotary.scaling
    assert (found.magnitude, found.long_magnitude) == (1.1, 1.2)
    assert (found.long_factors[0], found.original_length) == (2.0, 8192)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("blocksparse_block_size", 32),
        ("blocksparse_num_local_blocks", 0),
        ("blocksparse_homo_head_pattern", True),
        ("gegelu_limit", 7.0),
        ("rope_position_scale", 2.0),
    ],
)
def test_what_is_not_implemented_is_refused(folder, field, value):
    with pytest.raises(InputError, match=f"config.json: {field}: given {value}"):
        read_config(folder.family, RELEASED | {field: value}, "config.json", ())
