"""What a checkpoint records of its model, and the flat fields that older ones recorded."""

import contextlib
import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from jaxscale.checkpoint.manager import CheckpointConfig, Checkpoints
from jaxscale.checkpoint.matching import check_fingerprint
from jaxscale.kernels.attention.tiles import BlockLayout
from jaxscale.models.config import (
    AttentionConfig,
    DenseMixerRouter,
    ExpertsConfig,
    FeedForwardConfig,
    LayerConfig,
    LinearScaling,
    Llama3Scaling,
    MaskedSamplingRouter,
    ModelConfig,
    NormConfig,
    RotaryConfig,
    SparseMixerRouter,
    TopKRouter,
    YarnScaling,
)
from jaxscale.models.config.facts import checkpoint_facts, from_flat
from jaxscale.models.parameters import abstract_params, parameter_table
from jaxscale.types import InputError
from tests.models.examples import SHAPE

SMALL = from_flat(**SHAPE)
MOE = SHAPE | dict(moe_pattern=(True,), num_experts=4, expert_dim=8)


def replaced(config, path, value):
    """The configuration with the field at a path such as "pattern.0.attention.window"."""
    name, _, rest = path.partition(".")
    if isinstance(config, tuple):
        items = list(config)
        items[int(name)] = replaced(items[int(name)], rest, value)
        return tuple(items)
    new = replaced(getattr(config, name), rest, value) if rest else value
    return dataclasses.replace(config, **{name: new})


# The flat form


def test_few_flat_fields_give_the_defaults_of_the_flat_configuration():
    attention = AttentionConfig(
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rotary=RotaryConfig(theta=10000.0, fraction=1.0, scaling=None),
        biases=(),
        qk_norm=None,
        window=None,
        softcap=None,
        scale=None,
        layout=None,
    )
    feed_forward = FeedForwardConfig(dim=24, activation="swiglu", use_bias=False)
    assert (
        ModelConfig(
            vocab_size=40,
            num_layers=4,
            model_dim=16,
            max_length=16,
            pattern=(
                LayerConfig(attention, feed_forward, norm_position="before", is_parallel=False),
            ),
            prefix=(),
            norm=NormConfig(kind="rmsnorm", epsilon=1e-5, use_bias=False),
            is_causal=True,
            use_learned_positions=False,
            is_tied=False,
            use_head_bias=False,
            logit_softcap=None,
            init_std=0.02,
        )
        == SMALL
    )


def test_few_flat_fields_of_a_mixture_give_its_defaults():
    assert from_flat(**MOE).pattern[0].feed_forward == ExpertsConfig(
        num_experts=4,
        dim=8,
        num_active=2,
        activation="swiglu",
        router=TopKRouter(is_renormalised=True),
        balance_loss=0.01,
        z_loss=0.0,
        dropout=0.0,
    )


def test_every_flat_field_has_its_place():
    config = from_flat(
        **SHAPE | {"num_layers": 5},
        norm="layernorm",
        norm_epsilon=1e-3,
        use_bias=True,
        activation="gelu",
        positions="learned",
        windows=(None, 4),
        is_tied=True,
        use_head_bias=True,
        use_qk_norm=True,
        logit_softcap=3.0,
        attention_softcap=5.0,
        moe_pattern=(False, True),
        num_dense_prefix=1,
        num_experts=4,
        num_active_experts=3,
        expert_dim=8,
        router="sparsemixer_v2",
        router_threshold=0.3,
        router_mask="released",
        router_expert_gradient="released",
        balance_loss=0.5,
        router_z_loss=0.25,
        expert_dropout=0.1,
        init_std=0.1,
    )
    attention = AttentionConfig(
        4, 2, 8, None, ("q", "k", "v", "o"), qk_norm="head", window=None, softcap=5.0
    )
    windowed = dataclasses.replace(attention, window=4)
    dense = FeedForwardConfig(24, "gelu", use_bias=True)
    router = SparseMixerRouter(0.3, "released", version="v2", expert_gradient="released")
    experts = ExpertsConfig(4, 8, 3, "gelu", router, balance_loss=0.5, z_loss=0.25, dropout=0.1)
    assert config == ModelConfig(
        vocab_size=40,
        num_layers=5,
        model_dim=16,
        max_length=16,
        pattern=(LayerConfig(attention, dense), LayerConfig(windowed, experts)),
        prefix=(LayerConfig(attention, dense),),
        norm=NormConfig("layernorm", 1e-3, use_bias=True),
        use_learned_positions=True,
        is_tied=True,
        use_head_bias=True,
        logit_softcap=3.0,
        init_std=0.1,
    )


@pytest.mark.parametrize(
    ("name", "router"),
    [
        ("gshard", TopKRouter()),
        ("densemixer", DenseMixerRouter()),
        ("masked_sampling", MaskedSamplingRouter(0.3, "released")),
        ("sparsemixer", SparseMixerRouter(0.3, "released", version="v1")),
        ("sparsemixer_v2", SparseMixerRouter(0.3, "released", version="v2")),
        ("sparsemixer_v2_star", SparseMixerRouter(0.3, "released", version="v2_star")),
    ],
)
def test_a_router_s_flat_name_is_one_of_the_classes(name, router):
    fields = dict(router=name, router_threshold=0.3, router_mask="released")
    config = from_flat(**MOE, **fields, num_active_experts=1)
    assert config.pattern[0].feed_forward.router == router


def test_patterns_of_two_lengths_repeat_together():
    config = from_flat(**MOE | {"num_layers": 6}, windows=(None, 2, 4))
    assert [layer.attention.window for layer in config.pattern] == [None, 2, 4]
    mixed = from_flat(**MOE | {"num_layers": 6, "moe_pattern": (True, False)}, windows=(None, 2, 4))
    kinds = [(layer.attention.window, layer.is_moe) for layer in mixed.pattern]
    assert kinds == [(None, True), (2, False), (4, True), (None, False), (2, True), (4, False)]


def test_flat_fields_without_rotary_positions():
    for positions in ("none", "learned"):
        config = from_flat(**SHAPE, positions=positions)
        assert config.pattern[0].attention.rotary is None
        assert config.use_learned_positions is (positions == "learned")


# The fingerprint


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("init_std", 0.5),
        ("max_length", 32),
        ("pattern.0.feed_forward.balance_loss", 0.5),
        ("pattern.0.feed_forward.z_loss", 0.5),
        ("pattern.0.feed_forward.dropout", 0.5),
        ("pattern.0.feed_forward.router", DenseMixerRouter()),
        ("pattern.0.feed_forward.router", MaskedSamplingRouter(0.3)),
    ],
)
def test_what_is_of_training_alone_is_not_recorded(path, value):
    model = from_flat(**MOE)
    facts = checkpoint_facts(replaced(model, path, value))
    assert facts["fingerprint"] == checkpoint_facts(model)["fingerprint"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("num_layers", 2),
        ("is_causal", False),
        ("is_tied", True),
        ("norm.epsilon", 1e-3),
        ("pattern.0.attention.rotary.theta", 5.0),
        ("pattern.0.attention.rotary.fraction", 0.5),
        ("pattern.0.attention.rotary.scaling", LinearScaling(2.0)),
        ("pattern.0.attention.rotary", None),
        ("pattern.0.attention.biases", ("q",)),
        ("pattern.0.attention.qk_norm", "all"),
        ("pattern.0.attention.window", 8),
        ("pattern.0.attention.scale", 1.0),
        ("pattern.0.norm_position", "both"),
        ("pattern.0.is_parallel", True),
        ("pattern.0.feed_forward.num_active", 1),
        ("pattern.0.feed_forward.router", TopKRouter(is_renormalised=False)),
        ("pattern.0.feed_forward.router", SparseMixerRouter()),
    ],
)
def test_what_a_trained_model_computes_is_recorded(path, value):
    model = from_flat(**MOE)
    facts = checkpoint_facts(replaced(model, path, value))
    assert facts["fingerprint"] != checkpoint_facts(model)["fingerprint"]


def test_a_drawing_router_is_recorded_but_for_its_gradient():
    model = from_flat(**MOE, router="sparsemixer_v2")
    path = "pattern.0.feed_forward.router"
    facts = checkpoint_facts(model)["fingerprint"]
    same = replaced(model, f"{path}.expert_gradient", "released")
    assert checkpoint_facts(same)["fingerprint"] == facts
    for name, value in (("threshold", 0.1), ("mask", "released"), ("version", "v2_star")):
        other = replaced(model, f"{path}.{name}", value)
        assert checkpoint_facts(other)["fingerprint"] != facts


def test_a_table_of_positions_has_the_length_of_the_longest_sequence():
    learned = from_flat(**SHAPE, positions="learned")
    longer = dataclasses.replace(learned, max_length=32)
    facts = [checkpoint_facts(model)["fingerprint"] for model in (learned, longer)]
    assert facts[0] != facts[1]


# Parts that a model may have or not, with a value of each.
OPTIONAL = {
    "pattern.0.attention.rotary": [
        None,
        RotaryConfig(),
        RotaryConfig(scaling=LinearScaling(2.0)),
        RotaryConfig(scaling=Llama3Scaling(8.0, 1.0, 4.0, 8)),
        RotaryConfig(scaling=YarnScaling(4.0, 8)),
    ],
    "pattern.0.attention.layout": [None, BlockLayout(1, 2), BlockLayout(2, 2)],
    "pattern.0.attention.window": [None, 8],
    "prefix": [(), SMALL.pattern],
}
PAIRS = [
    (path, saved, current)
    for path, values in OPTIONAL.items()
    for saved, current in itertools.permutations(values, 2)
]


def recorded(model):
    """The fingerprint as a checkpoint's JSON returns it."""
    return json.loads(json.dumps(checkpoint_facts(model)["fingerprint"]))


@pytest.mark.parametrize("path", OPTIONAL)
def test_a_model_goes_on_from_its_own_checkpoint(path):
    for value in OPTIONAL[path]:
        facts = checkpoint_facts(replaced(SMALL, path, value))
        saved = json.loads(json.dumps(facts["fingerprint"]))
        assert facts["upgrade"](saved) == saved, "nothing of today's is renamed"
        check_fingerprint(facts["upgrade"](saved), facts["fingerprint"], "here")


@pytest.mark.parametrize(("path", "saved", "current"), PAIRS)
def test_a_part_that_only_one_of_two_models_has_is_told(path, saved, current):
    saved = recorded(replaced(SMALL, path, saved))
    facts = checkpoint_facts(replaced(SMALL, path, current))
    with pytest.raises(InputError, match=path.rsplit(".", 1)[-1]):
        check_fingerprint(facts["upgrade"](saved), facts["fingerprint"], "here")


def without(saved, path):
    """Nested dicts without the field at a dotted path."""
    name, _, rest = path.partition(".")
    if rest:
        return saved | {name: without(saved[name], rest)}
    return {key: item for key, item in saved.items() if key != name}


@pytest.mark.parametrize(
    ("path", "other"),
    [
        ("is_causal", False),
        ("pattern.0.attention.layout", BlockLayout(1, 2)),
        ("pattern.0.attention.rotary", RotaryConfig(theta=5.0)),
        ("pattern.0.attention.rotary.fraction", 0.5),
        ("pattern.0.norm_position", "both"),
    ],
)
def test_a_field_that_is_newer_than_a_checkpoint_had_its_default(path, other):
    older = without(recorded(SMALL), path)
    same = checkpoint_facts(SMALL)
    check_fingerprint(same["upgrade"](older), same["fingerprint"], "here")
    changed = checkpoint_facts(replaced(SMALL, path, other))
    with pytest.raises(InputError, match=path.rsplit(".", 1)[-1]):
        check_fingerprint(changed["upgrade"](older), changed["fingerprint"], "here")


def test_a_field_without_a_default_cannot_be_older_than_a_checkpoint():
    facts = checkpoint_facts(SMALL)
    older = without(recorded(SMALL), "vocab_size")
    with pytest.raises(InputError, match=r"vocab_size='\(absent\)'"):
        check_fingerprint(facts["upgrade"](older), facts["fingerprint"], "here")


# Checkpoints of before and of today

# As the flat configuration of a dense model recorded itself, all of its fields.
FLAT = dict(
    vocab_size=40,
    num_layers=4,
    model_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=24,
    norm="rmsnorm",
    norm_epsilon=1e-5,
    use_bias=False,
    activation="swiglu",
    positions="rope",
    rope_theta=10000.0,
    windows=[None, 4],
    is_tied=False,
    use_head_bias=False,
    use_qk_norm=True,
    logit_softcap=None,
    attention_softcap=None,
    moe_pattern=[False],
    num_dense_prefix=0,
    num_experts=0,
    num_active_experts=2,
    expert_dim=0,
    router="gshard",
)
MIXED = FLAT | dict(
    num_layers=5,
    num_dense_prefix=1,
    moe_pattern=[False, True],
    num_experts=4,
    expert_dim=8,
    router="sparsemixer_v2",
    router_threshold=0.1,
    router_mask="paper",
)
OLD = {
    "dense": FLAT,
    "mixture": MIXED,
    "learned": FLAT | {"positions": "learned", "max_length": 16},
    # Of before heads had biases and routers had masks.
    "older": {n: v for n, v in MIXED.items() if n not in ("use_head_bias", "router_mask")},
}


def model_of(flat):
    """The model that a user configures today for a flat fingerprint."""
    return from_flat(**{"max_length": 16} | flat | {"windows": (None, 4)})


@pytest.mark.parametrize("name", OLD)
def test_an_old_fingerprint_upgrades_to_that_of_the_same_model(name):
    facts = checkpoint_facts(model_of(OLD[name]))
    upgraded = facts["upgrade"](json.loads(json.dumps(OLD[name])))
    assert json.dumps(upgraded) == json.dumps(facts["fingerprint"])


def test_a_fingerprint_of_today_stays_as_it_is():
    facts = checkpoint_facts(SMALL)
    assert facts["upgrade"](facts["fingerprint"]) == facts["fingerprint"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint whose fingerprint is the flat one of `FLAT`."""
    config = CheckpointConfig(str(tmp_path_factory.mktemp("old")), save_every=1, keep_last=1)
    shapes = abstract_params(parameter_table(model_of(FLAT)), "float32")
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, "float32"), shapes)
    with contextlib.closing(Checkpoints(config, fingerprint=FLAT)) as checkpoints:
        checkpoints.save(1, {"params": jax.device_put(params)}, {})
    return config


def restored(config, model):
    here = SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        abstract_params(parameter_table(model), "float32"),
    )
    with contextlib.closing(Checkpoints(config, **checkpoint_facts(model))) as checkpoints:
        return checkpoints.restore_params(wanted)


def test_a_checkpoint_with_a_flat_fingerprint_is_restored(saved):
    params = restored(saved, model_of(FLAT))
    assert all((np.asarray(leaf) == 0.5).all() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "pattern.1.attention.window",
            8,
            "with pattern.1.attention.window=8; it is of another model with "
            "pattern.1.attention.window=4",
        ),
        ("pattern.0.attention.rotary.theta", 500.0, "pattern.0.attention.rotary.theta=10000.0"),
        ("pattern.0.attention.qk_norm", "all", "pattern.0.attention.qk_norm='head'"),
        ("norm.epsilon", 1e-6, "norm.epsilon=1e-05"),
        ("logit_softcap", 3.0, "logit_softcap=None"),
        ("is_causal", False, "is_causal=True"),
    ],
)
def test_a_checkpoint_with_a_flat_fingerprint_of_another_model_is_refused(
    saved, path, value, message
):
    model = model_of(FLAT)
    if path == "is_causal":
        model = replaced(model, "pattern.1.attention.window", None)
    with pytest.raises(InputError) as error:
        restored(saved, replaced(model, path, value))
    assert message in str(error.value)
