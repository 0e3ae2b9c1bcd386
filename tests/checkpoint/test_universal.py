"""The pattern language: each pattern against slices that numpy takes, and each violation named."""

import dataclasses
import itertools

import numpy as np
import pytest

from jaxscale.checkpoint.patterns import Cut, Offset, Rule, Target, load_rules
from jaxscale.checkpoint.universal import Shard, merge
from jaxscale.checkpoint.views import Divided
from jaxscale.types import InputError


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def shards_of(name, arrays, axis="tensor"):
    return [Shard(name, {axis: rank}, array) for rank, array in enumerate(arrays)]


def merged(shards, *rules):
    return {path: array[:] for path, array in merge(shards, rules).items()}


def test_unique():
    whole = normal(3, 4)
    got = merged([Shard("w", {}, whole)], Rule("w", to="params/w"))
    np.testing.assert_array_equal(got["params/w"], whole)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_fragment_of_any_dim_with_uneven_widths(dim):
    whole = normal(4, 5, 6)
    parts = np.split(whole, [1, 3], axis=dim)
    got = merged(shards_of("w", parts), Rule("w", cuts=(Cut("tensor", dim),)))
    np.testing.assert_array_equal(got["w"], whole)


def test_replicated_copies_must_be_equal():
    scale = normal(4)
    rule = Rule("norm", kind="replicated")
    np.testing.assert_array_equal(merged(shards_of("norm", [scale, scale]), rule)["norm"], scale)
    broken = merge(shards_of("norm", [scale, scale + 1]), [rule])["norm"]
    with pytest.raises(InputError, match="norm of rank tensor=0 and norm of rank tensor=1"):
        broken[:]


def test_average_of_copies_that_went_apart():
    copies = [normal(4, seed=seed) for seed in range(3)]
    got = merged(shards_of("router", copies), Rule("router", kind="average"))["router"]
    np.testing.assert_allclose(got, np.mean(copies, axis=0, dtype=np.float64), rtol=1e-7)


def fused(q, k, v, num_ranks):
    """What ranks hold of grouped-query q, k and v, each cut by heads and fused again."""
    parts = zip(*(np.split(part, num_ranks) for part in (q, k, v)))
    return [np.concatenate(part) for part in parts]


def test_grouped_query_qkv_fused_on_each_rank():
    q, k, v = normal(16, 6), normal(4, 6, seed=1), normal(4, 6, seed=2)
    rule = Rule("qkv", cuts=(Cut("tensor", 0, blocks=(16, 4, 4)),))
    for num_ranks in (1, 2, 4):
        got = merged(shards_of("qkv", fused(q, k, v, num_ranks)), rule)["qkv"]
        np.testing.assert_array_equal(got, np.concatenate([q, k, v]))


def test_fused_blocks_of_uneven_widths():
    gate, up = normal(5, 2), normal(5, 2, seed=1)
    parts = [
        np.concatenate([gate[:3], up[:2]]),
        np.concatenate([gate[3:], up[2:]]),
    ]
    cut = Cut("tensor", 0, blocks=(5, 5), widths=((3, 2), (2, 3)))
    got = merged(shards_of("gate_up", parts), Rule("gate_up", cuts=(cut,)))["gate_up"]
    np.testing.assert_array_equal(got, np.concatenate([gate, up]))
    uneven = Rule("gate_up", cuts=(Cut("tensor", 0, blocks=(5, 5)),))
    with pytest.raises(InputError, match="widths in rule 'gate_up', as 5 rows are not even"):
        merge(shards_of("gate_up", parts), [uneven])


@pytest.mark.parametrize("num_tensor", [1, 2])
def test_gate_up_cut_over_tensor_and_then_over_data(num_tensor):
    """The second cut goes through the fused tensor of a rank, across gate and up."""
    gate, up = normal(12, 3), normal(12, 3, seed=1)
    shards = []
    for tensor in range(num_tensor):
        own = [np.split(part, num_tensor)[tensor] for part in (gate, up)]
        for data, part in enumerate(np.split(np.concatenate(own), 3)):
            shards.append(Shard("gate_up", {"tensor": tensor, "data": data}, part))
    rule = Rule("gate_up", cuts=(Cut("data", 0), Cut("tensor", 0, blocks=(12, 12))))
    got = merged(shards, rule)["gate_up"]
    np.testing.assert_array_equal(got, np.concatenate([gate, up]))


def test_experts_in_three_dims_cut_over_experts_and_their_inner_dim():
    whole = normal(4, 3, 8)
    shards = []
    for expert, group in enumerate(np.split(whole, 2)):
        for tensor, part in enumerate(np.split(group, 2, axis=2)):
            shards.append(Shard("experts.w1", {"expert": expert, "tensor": tensor}, part))
    rule = Rule(r"experts\.w1", cuts=(Cut("tensor", 2), Cut("expert", 0)))
    np.testing.assert_array_equal(merged(shards, rule)["experts.w1"], whole)


def test_single_experts_and_layers_become_one_stack():
    whole = normal(4, 2, 3, 5)  # [layers, experts, in, out]
    shards = []
    for stage in range(2):
        for group in range(2):
            for layer in range(2):
                name = f"layers.{layer}.experts.0.w1"
                ranks = {"pipeline": stage, "expert": group}
                shards.append(Shard(name, ranks, whole[2 * stage + layer, group]))
    rule = Rule(
        r"layers\.(?P<layer>\d+)\.experts\.(?P<expert>\d+)\.w1",
        to="layers/w1",
        stack=("layer", "expert"),
        offsets={"layer": Offset("pipeline", (0, 2)), "expert": Offset("expert", (0, 1))},
    )
    np.testing.assert_array_equal(merged(shards, rule)["layers/w1"], whole)


def test_stage_offsets_also_count_in_names():
    shards = [Shard("layers.0.w", {"pipeline": stage}, normal(2, seed=stage)) for stage in (0, 1)]
    rule = Rule(
        r"layers\.(?P<layer>\d+)\.w",
        to="layers/{layer}/w",
        offsets={"layer": Offset("pipeline", (0, 3))},
    )
    got = merged(shards, rule)
    assert set(got) == {"layers/0/w", "layers/3/w"}
    np.testing.assert_array_equal(got["layers/3/w"], normal(2, seed=1))


def test_padding_of_the_vocabulary_is_dropped():
    whole = normal(10, 3)
    padded = np.concatenate([whole, np.full((6, 3), np.nan, np.float32)])
    for num_ranks in (1, 2, 4, 8):  # of 8 ranks the last three hold padding alone
        rule = Rule("embed", cuts=(Cut("tensor", 0, size=10),))
        got = merged(shards_of("embed", np.split(padded, num_ranks)), rule)["embed"]
        np.testing.assert_array_equal(got, whole)


def test_tied_copies_under_two_names_on_two_stages():
    whole = normal(4, 3)
    shards = [Shard("embed", {"pipeline": 0}, whole), Shard("head", {"pipeline": 1}, whole)]
    rule = Rule("embed|head", to="params/embed", kind="replicated")
    np.testing.assert_array_equal(merged(shards, rule)["params/embed"], whole)


def test_strided_shards():
    whole = normal(7, 2)
    parts = [whole[rank::3] for rank in range(3)]
    rule = Rule("w", cuts=(Cut("tensor", 0, is_strided=True),))
    np.testing.assert_array_equal(merged(shards_of("w", parts), rule)["w"], whole)


def test_moments_have_the_geometry_of_their_parameter():
    parameter, moment = normal(4, 2), normal(4, 2, seed=1)
    shards = []
    for state, whole in {"params": parameter, "exp_avg": moment}.items():
        for rank, part in enumerate(np.split(whole, 2)):
            shards.append(Shard("w", {"tensor": rank}, part, state))
    got = merged(shards, Rule("w", cuts=(Cut("tensor", 0),)))
    np.testing.assert_array_equal(got["params/w"], parameter)
    np.testing.assert_array_equal(got["exp_avg/w"], moment)


VIOLATIONS = {
    "no rule": (["v"], [Rule("w")], "v of rank tensor=0: given 'no rule'"),
    "two rules": (["w"], [Rule("w"), Rule("w|v")], r"w of rank tensor=0: given \"'w' and 'w|v'\""),
    "not used": (["w"], [Rule("w"), Rule("v")], "rules: given 'v', expected a rule that matches"),
    "copies": (["w", "w"], [Rule("w")], "w of rank tensor=0 and w of rank tensor=1.*rule 'w'"),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_violation_names_tensor_rule_and_ranks(name):
    names, rules, message = VIOLATIONS[name]
    shards = [Shard(name, {"tensor": rank}, normal(2)) for rank, name in enumerate(names)]
    with pytest.raises(InputError, match=message):
        merge(shards, rules)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cut("tensor", -1), "Cut.dim"),
        (lambda: Cut("tensor", 0, size=0), "Cut.size"),
        (lambda: Cut("tensor", 0, blocks=(6, -2)), "Cut.blocks"),
        (lambda: Cut("tensor", 0, blocks=(2,), widths=((3, -1),)), "Cut.widths"),
        (lambda: Offset("pipeline", (-1, 0)), "Offset.firsts"),
        (lambda: Target("a", rows=-1), "Target.rows"),
        (lambda: Target("a", shape=(-4, -6)), "Target.shape"),
        (lambda: Rule("w", shape=(-4, -6)), "Rule.shape"),
        (lambda: Rule("w", to="{0.__class__}"), "Rule.to"),
        (lambda: Rule("w", to="{0:>9999999999}"), "Rule.to"),
        (lambda: Rule("w", to="{0!r}"), "Rule.to"),
        (lambda: Target("{"), "Rule.to"),
    ],
)
def test_numbers_and_paths_that_mean_nothing_are_refused(make, message):
    """Of rows -1 and 5 the sum is 4, and so is the product of -4 and -1."""
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("part", [dict(stack=("n",)), dict(to="w{n}")])
def test_a_group_that_matches_nothing_of_a_name_is_no_number(part):
    with pytest.raises(InputError, match=r"w of the only rank: given"):
        merge([Shard("w", {}, normal(2))], [Rule(r"w(?P<n>\d+)?", **part)])


@pytest.mark.parametrize("said", [dict(size=8), dict(blocks=(6, 2))])
def test_a_lost_last_rank_is_missed_where_the_whole_is_said(said):
    parts = np.split(normal(8, 3), 2)
    with pytest.raises(InputError, match="w of rank tensor=0"):
        merge(shards_of("w", parts[:1]), [Rule("w", cuts=(Cut("tensor", 0, **said),))])


def test_a_missing_rank_is_named():
    parts = [Shard("w", {"tensor": rank}, normal(2)) for rank in (0, 2)]
    with pytest.raises(InputError, match=r"all of 3 ranks of rule 'w'; missing are \[1\]"):
        merge(parts, [Rule("w", cuts=(Cut("tensor", 0),))])


def test_a_part_that_the_last_rank_lost_is_named():
    """What is left looks whole; that there are two ranks is known from another tensor."""
    shards = [*shards_of("v", [normal(2), normal(2)]), Shard("w", {"tensor": 0}, normal(2))]
    with pytest.raises(InputError, match=r"all of 2 ranks of rule 'v.w'; missing are \[1\]"):
        merge(shards, [Rule("v|w", cuts=(Cut("tensor", 0),))])


def test_a_missing_layer_is_named():
    shards = [Shard(f"layers.{layer}", {}, normal(2)) for layer in (0, 2)]
    rule = Rule(r"layers\.(?P<layer>\d+)", to="layers", stack=("layer",))
    with pytest.raises(InputError, match=r"layers: .*nothing writes \[1\]"):
        merge(shards, [rule])


def test_ranks_of_different_shapes_are_named():
    shards = shards_of("w", [normal(2, 3), normal(2, 4)])
    with pytest.raises(InputError, match=r"w of rank tensor=1: given .2, 4.*w of rank tensor=0"):
        merge(shards, [Rule("w", cuts=(Cut("tensor", 0),))])
    shards = shards_of("w", [normal(2), normal(2).astype(np.float16)])
    with pytest.raises(InputError, match="w of rank tensor=1: given 'float16'"):
        merge(shards, [Rule("w", cuts=(Cut("tensor", 0),))])


def test_whole_numbers_have_no_average():
    shards = shards_of("w", [np.array([0, 1]), np.array([3, 4])])
    with pytest.raises(InputError, match="given 'int64', expected numbers with a mean"):
        merge(shards, [Rule("w", kind="average")])


def test_lost_last_ranks_of_an_offset_are_missed():
    """The layers that are left would look like a model of fewer."""
    rule = Rule(
        r"layers\.(?P<layer>\d+)\.w",
        "layers/w",
        stack=("layer",),
        offsets={"layer": Offset("pipeline", (0, 2))},
    )
    shards = [
        Shard(f"layers.{layer}.w", {"pipeline": stage}, normal(3))
        for stage, layer in itertools.product(range(2), range(2))
    ]
    assert merge(shards, [rule])["layers/w"].shape == (4, 3)
    with pytest.raises(InputError, match=r"1 ranks of pipeline.*expected 2, as group layer"):
        merge(shards[:2], [rule])


RULES = r"""
[[rule]]
match = 'layers\.(?P<layer>\d+)\.qkv'
to = 'layers/qkv'
stack = ['layer']
offsets = {layer = {axis = 'pipeline', firsts = [0, 2]}}
cuts = [{axis = 'tensor', dim = 0, blocks = [8, 4, 4]}]

[[rule]]
match = 'router'
kind = 'average'
"""


def test_rules_are_read_from_a_file(tmp_path):
    file = tmp_path / "rules.toml"
    file.write_text(RULES)
    qkv, router = load_rules(file)
    assert qkv == Rule(
        match=r"layers\.(?P<layer>\d+)\.qkv",
        to="layers/qkv",
        stack=("layer",),
        offsets={"layer": Offset("pipeline", (0, 2))},
        cuts=(Cut("tensor", 0, blocks=(8, 4, 4)),),
    )
    assert router == Rule("router", kind="average")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rule = 3", r"a file of \[\[rule\]\] tables"),
        ("[[rule]]\nmatch = '('", "a regular expression"),
        ("[[rule]]\nto = 'w'", "a table with match"),
        ("[[rule]]\nmatch = 'w'\nkind = 'shared'", "Rule.kind"),
        ("[[rule]]\nmatch = 'w'\nstack = ['layer']", "a named group of 'w'"),
        ("[[rule]]\nmatch = 'w'\ndim = 0", "one of axes, cuts, kind, match"),
        ("[[rule]]\nmatch = 'w'\ncuts = [{axis = 'tensor'}]", "a table with dim"),
        ("[[rule", "a TOML file"),
    ],
)
def test_a_file_that_is_wrong_is_refused(tmp_path, text, message):
    file = tmp_path / "rules.toml"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        load_rules(file)


def test_a_matrix_of_torch_becomes_one_with_heads():
    whole = normal(5, 4, 3)  # [D, N, H], in torch [N H, D]
    stored = whole.reshape(5, 12).T
    rule = Rule("q", cuts=(Cut("tensor", 0),), axes=(1, 0), shape=(5, 4, 3))
    (merged_whole,) = merge(shards_of("q", np.split(stored, 2)), [rule]).values()
    np.testing.assert_array_equal(merged_whole[()], whole)
    np.testing.assert_array_equal(merged_whole[1:4, 1:3, 2:], whole[1:4, 1:3, 2:])
    wrong = Rule("q", cuts=(Cut("tensor", 0),), axes=(1, 0), shape=(5, 3, 3))
    with pytest.raises(InputError, match=r"products are the dims \(5, 12\)"):
        merge(shards_of("q", np.split(stored, 2)), [wrong])
    wrong = Rule("q", cuts=(Cut("tensor", 0),), axes=(0, 0))
    with pytest.raises(InputError, match="each of the 2 dims once"):
        merge(shards_of("q", np.split(stored, 2)), [wrong])


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (6, 2, 2, 5), (1, 6, 4, 1, 5), (6, 4, 5)])
def test_any_box_of_divided_dims(shape):
    whole = normal(6, 4, 5)
    divided = Divided(whole, shape)
    draw = np.random.default_rng(0)
    for _ in range(20):
        ends = [sorted(draw.integers(0, size + 1, 2)) for size in shape]
        box = tuple(slice(int(a), int(b)) for a, b in ends)
        np.testing.assert_array_equal(divided[box], whole.reshape(shape)[box])


def test_one_fused_tensor_becomes_several_parameters():
    q, k, v = normal(8, 6), normal(4, 6, seed=1), normal(4, 6, seed=2)
    rule = Rule(
        r"layers\.(?P<layer>\d+)\.qkv",
        stack=("layer",),
        cuts=(Cut("tensor", 0, blocks=(8, 4, 4)),),
        targets=(
            Target("layers/q", rows=8, axes=(1, 0), shape=(6, 4, 2)),
            Target("layers/k", rows=4),
            Target("layers/v", rows=4, axes=(1, 0)),
        ),
    )
    got = merged(shards_of("layers.0.qkv", fused(q, k, v, 2)), rule)
    np.testing.assert_array_equal(got["layers/q"][0], q.T.reshape(6, 4, 2))
    np.testing.assert_array_equal(got["layers/k"][0], k)
    np.testing.assert_array_equal(got["layers/v"][0], v.T)
    short = dataclasses.replace(rule, targets=rule.targets[:2])
    with pytest.raises(InputError, match=r"8 \+ 4 rows, the targets of rule"):
        merge(shards_of("layers.0.qkv", fused(q, k, v, 2)), [short])
