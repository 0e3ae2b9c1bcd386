"""Buckets of megatron-core's distributed optimizer, laid out by this test for two stages."""

import numpy as np
import pytest

from jaxscale.checkpoint.boxes import Merged, Placement
from jaxscale.checkpoint.megatron_buckets import with_states_by_name
from jaxscale.checkpoint.pickled import Named
from jaxscale.types import InputError

NUM_STAGES, NUM_LAYERS, ALIGNED = 2, 4, 64
EMBEDDING, NORM = "embedding.word_embeddings.weight", "decoder.final_layernorm.weight"
ATTENTION = "decoder.layers.self_attention.linear_qkv.weight"
SHAPES = {EMBEDDING: (7, 4), ATTENTION: (NUM_LAYERS, 6, 4), NORM: (4,)}
ARGUMENTS = {
    "tensor_model_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "pipeline_model_parallel_size": NUM_STAGES,
    "transformer_impl": "local",
}


def draw(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


MODEL, MOMENT = draw(0), draw(1)


def whole(name, array):
    zeros, ones = (0,) * array.ndim, (1,) * array.ndim
    placement = Placement(array, zeros, zeros, array.shape, ones, name)
    return Merged(name, array.shape, array.dtype, ((placement,),))


def bucket_of(weights, stage):
    """A stage's part of the model from the last weight on, each from a multiple of 64 on."""
    per_stage = NUM_LAYERS // NUM_STAGES
    layers = list(weights[ATTENTION][stage * per_stage : (stage + 1) * per_stage])
    # The last stage has a copy of the embedding, to which the unembedding is tied.
    own = [*layers, weights[NORM], weights[EMBEDDING]] if stage else [weights[EMBEDDING], *layers]
    flat = []
    for array in reversed(own):
        flat.append(np.pad(array.ravel(), (0, -array.size % ALIGNED)))
    return np.concatenate(flat)


def name_of(group, state, *, bucket=0, buffer=0):
    kind = "dtype_(torch.bfloat16, torch.float32)"
    start = f"optimizer.distributed.dp_group_idx_{group}.gbuf_idx_{buffer}"
    return f"{start}.{kind}.bucket_idx_{bucket}.{state}"


def leaves():
    found = dict(MODEL)
    for stage in range(NUM_STAGES):
        found[name_of(stage, "param")] = bucket_of(MODEL, stage)
        found[name_of(stage, "exp_avg")] = bucket_of(MOMENT, stage)
    return found


def read(arrays, **changed):
    arguments = Named("argparse.Namespace", (), ARGUMENTS | changed)
    merged = {name: whole(name, array) for name, array in arrays.items()}
    return with_states_by_name(merged, arguments)


def test_a_tied_embedding_is_on_both_stages():
    got = read(leaves())
    states = {"param": MODEL, "exp_avg": MOMENT}
    assert got.keys() == {
        *MODEL,
        *(f"optimizer.state.{state}.{name}" for state in states for name in MODEL),
    }
    for state, arrays in states.items():
        for name, array in arrays.items():
            leaf = got[f"optimizer.state.{state}.{name}"]
            np.testing.assert_array_equal(leaf[:], array, err_msg=f"{state} {name}")


def test_copies_whose_moments_went_apart_are_named():
    arrays = leaves()
    arrays[name_of(1, "exp_avg")][0] += 1  # the tied embedding comes first
    leaf = read(arrays)[f"optimizer.state.exp_avg.{EMBEDDING}"]
    with pytest.raises(InputError, match=r"different values in .*pipeline=0.*pipeline=1"):
        leaf[:]


def renamed(before, after):
    found = leaves()
    found[after] = found.pop(before)
    return found


LOST = {
    "a bucket": (
        lambda: renamed(name_of(0, "exp_avg"), name_of(0, "exp_avg", bucket=1)),
        r"buckets \[1\]', expected all exp_avg of group 0",
    ),
    "a group": (
        lambda: renamed(name_of(1, "param"), name_of(2, "param")),
        "group 2', expected those of",
    ),
    "a buffer": (
        lambda: leaves() | {name_of(0, "param", buffer=1): np.zeros(64, np.float32)},
        "buffer 1 of a rank', expected weights of one type",
    ),
    "a stage": (
        lambda: {name: array for name, array in leaves().items() if "group_idx_1" not in name},
        "1 ranks of pipeline', expected 2",
    ),
    "masters": (
        lambda: {name: array for name, array in leaves().items() if ".param" not in name},
        "no float32 master of",
    ),
}


@pytest.mark.parametrize("what", LOST)
def test_what_is_lost_is_named(what):
    make, message = LOST[what]
    with pytest.raises(InputError, match=message):
        read(make())


def test_stages_of_other_numbers_of_layers_are_refused():
    arrays = leaves()
    arrays[ATTENTION] = np.concatenate([MODEL[ATTENTION], MODEL[ATTENTION][:1]])
    with pytest.raises(InputError, match=r"linear_qkv.weight \(4, 6, 4\)', expected shape \(5,"):
        read(arrays)
