"""Each family: Hugging Face's own logits and greedy tokens, and the same bytes after a round trip.

experiments/huggingface_fixtures.py and bert_fixture.py have made the folders in fixtures/.
"""

import dataclasses
import functools
import importlib
import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from safetensors.numpy import load_file, save_file

from jaxscale import tree
from jaxscale.convert.families import BY_MODEL_TYPE
from jaxscale.convert.folder import CONFIG, open_folder, read_config, write_folder
from jaxscale.convert.weights import export_tensors, family_leaves, import_params
from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.parameters import abstract_params, parameter_table
from jaxscale.models.pooling import pair_logits, pooled
from jaxscale.ops.precision import Policy
from jaxscale.serve.decoding import generate_tokens
from jaxscale.serve.sampling import SamplingConfig
from jaxscale.types import InputError
from tests.models.naive import Naive

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = sorted([*json.loads((FIXTURES / "families.json").read_text()), "bert"])
PACKED = "mixtral_packed"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
MAX_ERROR = 2e-5  # relative to the largest logit; both compute in float32
# The other families decode by the same code; their tokens are compared in long runs.
DECODED = ("gpt2", "gemma2", "phi3_long")
LONG = pytest.mark.long


@functools.cache
def folder(name):
    return open_folder(FIXTURES / name)


def placed(config, dtype):
    """The parameters of a model as shapes on this device."""
    device = SingleDeviceSharding(jax.devices()[0])

    def place(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)

    return jax.tree.map(place, abstract_params(parameter_table(config), dtype))


@functools.cache
def params(name):
    return folder(name).params(placed(folder(name).config, "float32"))


@functools.cache
def arrays(name):
    with np.load(FIXTURES / name / "logits.npz") as file:
        return dict(file)


def decoder(name):
    execution = ExecutionConfig(remat="none")
    return Decoder(folder(name).config, policy=Policy(compute="float32"), execution=execution)


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal(name):
    tokens = arrays(name)["tokens"]
    assert_close(logits_of(name, tokens), arrays(name)[f"logits_{tokens.shape[1]}"])


def logits_of(name, tokens):
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    batch = {"tokens": tokens, "positions": positions}
    return jax.jit(decoder(name).logits)(params(name), batch)[0]


def assert_close(got, wanted):
    assert np.abs(got - wanted).max() <= MAX_ERROR * np.abs(wanted).max()


MOST_LONG = [pytest.param(each, marks=() if each in DECODED else LONG) for each in NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_no_element_of_a_leaf_is_unset(name):
    """A leaf begins with NaN; the plan's shares must cover it."""
    for path, leaf in tree.flatten(params(name)).items():
        assert not np.isnan(leaf).any(), path


@pytest.mark.parametrize("name", MOST_LONG)
def test_padding_on_both_sides_changes_no_logit(name):
    tokens = arrays(name)["tokens"]
    num = tokens.shape[1]
    batch = {
        "tokens": np.pad(tokens, ((0, 0), (3, 2)), constant_values=5),
        "positions": np.broadcast_to(np.clip(np.arange(-3, num + 2), 0, num - 1), (2, num + 5)),
        "segments": np.pad(np.ones_like(tokens), ((0, 0), (3, 2))),
    }
    got = jax.jit(decoder(name).logits)(params(name), batch)[0]
    assert_close(got[:, 3 : num + 3], arrays(name)[f"logits_{num}"])


@pytest.mark.parametrize("name", MOST_LONG)
def test_bfloat16_diverges_little(name):
    tokens = arrays(name)["tokens"]
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    batch = {"tokens": tokens, "positions": positions}
    narrow = Decoder(folder(name).config, execution=ExecutionConfig(remat="none"))
    got = jax.nn.log_softmax(jax.jit(narrow.logits)(params(name), batch)[0].astype("float32"))
    wanted = jax.nn.log_softmax(arrays(name)[f"logits_{tokens.shape[1]}"])
    divergence = (np.exp(wanted) * (wanted - got)).sum(-1).mean()
    # A token whose router's logits are close takes another expert.
    assert 0 < divergence < (1e-2 if folder(name).config.num_experts else 5e-4)


BOUNDARY = [("phi3_long", 15), ("phi3_long", 16), ("phi3_long", 17), ("phimoe_long", 15)]


@pytest.mark.parametrize(("name", "length"), BOUNDARY)
def test_logits_equal_around_the_original_length_of_16(name, length):
    tokens = arrays(name)["tokens"][:, :length]
    assert_close(logits_of(name, tokens), arrays(name)[f"logits_{length}"])


def test_bert_adds_the_types_of_tokens():
    tokens = arrays("bert")["tokens"]
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    batch = {"tokens": tokens, "positions": positions, "types": tokens % 2}
    assert_close(jax.jit(decoder("bert").logits)(params("bert"), batch)[0], arrays("bert")["typed"])


def test_bert_pools_the_first_token():
    tokens = arrays("bert")["tokens"]
    batch = {"tokens": tokens, "positions": np.broadcast_to(np.arange(24), tokens.shape)}
    got = jax.jit(functools.partial(pooled, decoder("bert")))(params("bert"), batch)
    assert_close(got, arrays("bert")["pooled"])
    with pytest.raises(InputError, match=r"ModelConfig.use_pooler: given False"):
        pooled(decoder("llama"), params("llama"), batch)


def test_bert_tells_whether_two_sentences_follow_each_other():
    tokens = arrays("bert")["tokens"]
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    batch = {"tokens": tokens, "positions": positions, "types": tokens % 2}
    got = jax.jit(functools.partial(pair_logits, decoder("bert")))(params("bert"), batch)
    assert_close(got, arrays("bert")["pair"])
    with pytest.raises(InputError, match=r"ModelConfig.use_pair_head: given False"):
        pair_logits(decoder("llama"), params("llama"), batch)


def test_the_norms_of_old_berts_have_other_names(tmp_path):
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): values
        for name, values in load_file(FIXTURES / "bert" / "model.safetensors").items()
    }
    save_file(old, tmp_path / "model.safetensors")
    (tmp_path / CONFIG).write_text((FIXTURES / "bert" / CONFIG).read_text())
    opened = open_folder(tmp_path)
    got = tree.flatten(opened.params(placed(opened.config, "float32")))
    for path, wanted in tree.flatten(params("bert")).items():
        np.testing.assert_array_equal(got[path], wanted, path)


CONTINUED = [name for name in NAMES if name != "bert"]


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=() if each in DECODED else LONG) for each in CONTINUED]
)
def test_greedy_tokens_equal(name):
    tokens = arrays(name)["greedy"][0].tolist()
    sampling = SamplingConfig(temperature=0.0)
    got = generate_tokens(
        decoder(name),
        params(name),
        [tokens[:12]],
        sampling=sampling,
        max_new_tokens=len(tokens) - 12,
    )
    assert got[0] == tokens[12:]


@pytest.mark.parametrize("name", ["phi3_long", "phimoe_long"])
def test_rows_of_both_sides_of_the_original_length_share_a_batch(name):
    """By formulas: Hugging Face gives all rows the factors of the longest, and PhiMoE the short."""
    config = with_paper_mask(folder(name).config)
    tokens = np.random.default_rng(3).integers(0, 97, (2, 24))
    segments = np.repeat([[1] * 24, [1] * 16 + [0] * 8], 1, 0)
    positions = np.where(segments > 0, np.arange(24), 0)
    batch = {"tokens": tokens, "positions": positions, "segments": segments}
    model = dataclasses.replace(decoder(name), config=config)
    got = jax.jit(model.logits)(params(name), batch)[0]
    wanted = Naive(params(name), config).logits(batch)
    assert_close(np.asarray(got)[segments > 0], wanted[segments > 0])


def with_paper_mask(config):
    """The model with the form of its router's mask that the formulas have."""
    layers = []
    for layer in config.pattern:
        experts = layer.feed_forward
        if layer.is_moe:
            router = dataclasses.replace(experts.router, mask="paper")
            experts = dataclasses.replace(experts, router=router)
        layers.append(dataclasses.replace(layer, feed_forward=experts))
    return dataclasses.replace(config, pattern=tuple(layers))


def unread(name, tensor):
    """Elements of a tensor that no token reads, and that are lost therefore: OPT's first rows."""
    is_lost = name == "opt" and tensor.endswith("embed_positions.weight")
    return 2 if is_lost else 0


@pytest.mark.parametrize("name", [name for name in NAMES if name != PACKED])
def test_import_then_export_gives_the_same_bytes(name):
    opened = folder(name)
    tensors = export_tensors(opened.config, opened.family.layout, params(name), dtype=BFLOAT16)
    leaves = opened.leaves
    assert {tensor.name for tensor in tensors} == set(leaves)
    for tensor in tensors:
        skipped = unread(name, tensor.name)
        got, wanted = (array[skipped:] for array in (tensor.make(), leaves[tensor.name][()]))
        np.testing.assert_array_equal(got.view(np.uint16), wanted.view(np.uint16), tensor.name)


def test_packed_experts_are_those_of_the_same_model_one_by_one():
    got, wanted = (tree.flatten(params(name)) for name in (PACKED, "mixtral"))
    for path, leaf in wanted.items():
        np.testing.assert_array_equal(got[path], leaf)


@pytest.mark.parametrize("name", NAMES)
def test_the_configuration_that_is_written_is_read_as_the_same_model(name):
    opened = folder(name)
    written = opened.family.write(opened.config)
    names = opened.leaves.keys()
    assert read_config(opened.family, written, "config.json", names) == opened.config


@pytest.mark.parametrize("name", ["llama", "phimoe", "qwen3_moe"])
def test_an_export_without_its_import_finds_the_family(name, tmp_path):
    opened = folder(name)
    write_folder(tmp_path, opened.config, params(name), dtype=BFLOAT16, max_shard_bytes=9000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = open_folder(tmp_path)
    assert (again.config, again.family) == (opened.config, opened.family)
    got = again.params(placed(again.config, "float32"))
    jax.tree.map(np.testing.assert_array_equal, got, params(name))


def test_a_stack_of_layers_of_two_types_loses_no_bit():
    """Its type was that of the first layer's tensor."""
    opened = folder("llama")
    name = "model.layers.1.input_layernorm.weight"
    finer = np.float32(1 + 2**-20) + opened.leaves[name][()].astype(np.float32)
    leaves = dict(opened.leaves) | {name: finer}
    found = family_leaves(opened.config, opened.family.layout, leaves, where="llama")
    leaf = found["layers/0/attention/norm/scale"]
    assert leaf.dtype == np.float32
    np.testing.assert_array_equal(leaf[1:][0], finer)


def test_parameters_take_the_type_that_is_asked_for():
    wanted = placed(folder("llama").config, "bfloat16")
    got = folder("llama").params(wanted)
    assert jax.tree.map(lambda leaf: leaf.dtype, got) == jax.tree.map(
        lambda leaf: leaf.dtype, wanted
    )
    assert got["layers"]["0"]["attention"]["q"].dtype == BFLOAT16


@pytest.mark.long
def test_the_fixtures_can_be_made_again(tmp_path):
    """Where torch and transformers are installed: the same weights, and logits but for rounding."""
    pytest.importorskip("torch")
    maker = importlib.import_module("experiments.huggingface_fixtures")
    families = json.loads((FIXTURES / "families.json").read_text())
    for name, family in families.items():
        maker.write_model(tmp_path / name, family.pop("class"), **family)
        again, before = (load_file(at / name / "model.safetensors") for at in (tmp_path, FIXTURES))
        assert again.keys() == before.keys()
        for tensor, values in before.items():
            np.testing.assert_array_equal(again[tensor].view("u2"), values.view("u2"), tensor)
        with np.load(tmp_path / name / "logits.npz") as file:
            for array, values in arrays(name).items():
                np.testing.assert_allclose(file[array], values, atol=1e-4)


def test_every_family_has_a_fixture():
    models = {json.loads((FIXTURES / name / CONFIG).read_text())["model_type"] for name in NAMES}
    # test_phi3_small.py has the oracle of the one that Hugging Face does not have.
    assert models | {"phi3small"} == {each.model_types[0] for each in BY_MODEL_TYPE.values()}


def test_an_import_reads_each_tensor_once_and_one_at_a_time():
    """So host memory is bounded by the largest tensor, besides leaves that lie on the host."""
    opened = folder("llama")
    held = []

    class Counting:
        def __init__(self, leaf):
            self.shape, self.dtype, self._leaf = leaf.shape, leaf.dtype, leaf

        def __getitem__(self, index):
            held.append(self._leaf[index].nbytes)
            return self._leaf[index]

    leaves = {name: Counting(leaf) for name, leaf in opened.leaves.items()}
    stored = placed(opened.config, "float32")
    import_params(opened.config, opened.family.layout, leaves, stored=stored, where="llama")
    assert len(held) == len(leaves) and max(held) == 97 * 32 * 2


WINDOW = 2047  # of Phi-3-mini


@functools.cache
def windowed(window):
    """The tiny Phi-3 with a window of the released size, on 2,050 tokens."""
    config = folder("phi3").config
    layers = [
        dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, window=window))
        for layer in config.pattern
    ]
    return dataclasses.replace(config, pattern=tuple(layers), max_length=4096)


@pytest.mark.long
def test_a_window_of_2047_is_kept_to_the_token_in_both_types():
    """Files say 2047; backends that ignored it, or rounded angles, failed beyond it."""
    config, num = windowed(WINDOW), WINDOW + 3
    tokens = np.random.default_rng(5).integers(0, config.vocab_size, (1, num))
    batch = {"tokens": tokens, "positions": np.arange(num)[None]}
    execution = ExecutionConfig(remat="none")

    def logits(window, compute):
        model = Decoder(windowed(window), policy=Policy(compute=compute), execution=execution)
        return np.asarray(jax.jit(model.logits)(params("phi3"), batch)[0], np.float32)[0]

    wanted = Naive(params("phi3"), config).logits(batch | {"segments": np.ones((1, num), int)})[0]
    got = logits(WINDOW, "float32")
    around = slice(WINDOW - 1, None)
    assert_close(got[around], wanted[around])
    for other in (WINDOW - 1, WINDOW + 1, None):
        assert np.abs(logits(other, "float32")[-1] - wanted[-1]).max() > 1e-4
    narrow = jax.nn.log_softmax(logits(WINDOW, "bfloat16")[around])
    divergence = np.exp(narrow) * (narrow - jax.nn.log_softmax(wanted[around]))
    assert divergence.sum(-1).max() < 2e-3
