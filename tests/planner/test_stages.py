"""The dynamic programme finds what trying everything finds."""

import functools
import itertools
import math
import time

import jax
import numpy as np
import pytest

from jaxscale.models.parameters import abstract_params
from jaxscale.planner import timing
from jaxscale.planner.blocks import make_blocks
from jaxscale.planner.cluster import Cluster
from jaxscale.planner.costs import LAUNCH_S
from jaxscale.planner.execute import StagedGradient
from jaxscale.planner.function import load_plan, plan_function
from jaxscale.planner.picture import draw_stages
from jaxscale.planner.stages import StagePlanner, Table, fastest_cut
from jaxscale.run.run import load_run
from jaxscale.types import InputError, RunError
from tests.planner.functions import costs_of, mlp, random_loss, resnet
from tests.run.runs import ROOT


def cuts_of(num_blocks, num_devices):
    """The places of all cuts into stages with all replicas."""
    for num_stages in range(1, min(num_blocks, num_devices) + 1):
        for inner in itertools.combinations(range(1, num_blocks), num_stages - 1):
            ends = (0, *inner, num_blocks)
            for replicas in itertools.product(range(1, num_devices + 1), repeat=num_stages):
                if sum(replicas) <= num_devices:
                    yield list(zip(ends, ends[1:], replicas))


def shortest(table, limit_bytes):
    """The seconds of the fastest step, by trying all cuts."""
    num_blocks, num_devices = table.seconds.shape[1] - 1, table.seconds.shape[2] - 1
    best = math.inf
    for places in cuts_of(num_blocks, num_devices):
        if all(table.num_bytes[place] <= limit_bytes for place in places):
            ticks = table.num_microbatches + len(places) - 1
            slowest = max(table.seconds[place] for place in places)
            best = min(best, ticks * slowest + max(table.sums[place] for place in places))
    return best


def random_table(rng):
    """Costs of five blocks at most on five devices at most; three of ten places are impossible."""
    num_blocks, num_devices = rng.integers(1, 6, 2)
    shape = (num_blocks + 1, num_blocks + 1, num_devices + 1)
    seconds, num_bytes = rng.integers(1, 20, (2, *shape)).astype(float)
    sums = rng.integers(0, 200, shape).astype(float)
    is_stage = np.triu(np.ones(shape[:2], bool), 1)
    is_possible = is_stage[:, :, None] & (rng.random(shape) > 0.3) & (np.arange(shape[2]) > 0)
    each = (np.where(is_possible, costs, math.inf) for costs in (seconds, sums, num_bytes))
    return Table(*each, num_microbatches=int(rng.integers(1, 9)))


def test_the_fastest_cut_is_that_of_trying_everything():
    """Short ticks, a long sum of gradients and little memory pull apart."""
    rng = np.random.default_rng(0)
    num_impossible = 0
    for _ in range(300):
        table, limit_bytes = random_table(rng), rng.integers(8, 20)
        wanted = shortest(table, limit_bytes)
        cut = fastest_cut(table, limit_bytes, 5, math.inf)
        num_impossible += cut is None
        if cut is None:
            assert wanted == math.inf
            continue
        assert table.ticks_s(cut) + table.longest_sum(cut) == wanted
        assert cut.largest == max(table.seconds[place] for place in cut.places())
        assert all(table.num_bytes[place] <= limit_bytes for place in cut.places())
        assert cut.places() in cuts_of(*(size - 1 for size in table.seconds.shape[1:]))
    assert 0 < num_impossible < 150


def test_the_plan_of_a_random_graph_is_that_of_trying_everything():
    """Its micro-batches, too, within a random limit of memory."""
    rng = np.random.default_rng(0)
    num_impossible = 0
    for _ in range(100):
        costs = costs_of(random_loss(int(rng.integers(1 << 30)), num_values=6))
        blocks = make_blocks(costs, 2e11, int(rng.integers(2, 6)))
        cluster = Cluster.parse(f"h200:1x{rng.integers(1, 5)}")
        planner = StagePlanner(costs, blocks, num_rows=4, cluster=cluster, limit_bytes=0)
        num_bytes = planner.table(1).num_bytes
        planner.limit_bytes = rng.choice(num_bytes[np.isfinite(num_bytes)])
        wanted = min(shortest(planner.table(num), planner.limit_bytes) for num in (1, 2))
        if math.isinf(wanted):
            num_impossible += 1
            with pytest.raises(RunError, match="no plan fits"):
                planner.search()
        else:
            assert planner.search().seconds == wanted
    assert 0 < num_impossible < 50


def test_more_memory_or_devices_are_never_worse():
    case = mlp(num_layers=6, width=64, rows=64)
    seconds = []
    for limit_bytes in (3.3e5, 4e5, 2e6):
        for devices in ("h200:1x2", "h200:1x4"):
            cluster = Cluster.parse(devices)
            plan = plan_function(*case, cluster=cluster, limit_bytes=limit_bytes, num_blocks=8)
            assert max(stage.num_bytes for stage in plan.stages.stages) <= limit_bytes
            seconds.append(plan.stages.seconds)
    by_memory = np.reshape(seconds, (3, 2))
    assert (np.diff(by_memory, axis=0) <= 0).all() and (np.diff(by_memory, axis=1) <= 0).all()


def test_what_rows_do_not_change_counts_for_each_microbatch():
    """Launches, and parameters that are read: forward, backward, and forward again."""
    costs = costs_of(mlp(num_layers=2, width=64, rows=64))
    part = costs.merged(costs.atoms)
    planner = StagePlanner(
        costs, [part], num_rows=64, cluster=Cluster.parse("h200:1x2"), limit_bytes=1e9
    )
    cost = costs.cost(part)
    one, four = (float(planner.table(num).seconds[0, 1, 1]) for num in (1, 4))
    assert cost.fixed_s > 3 * LAUNCH_S  # three matmuls
    assert one == pytest.approx(cost.forward_s + cost.backward_s + 3 * cost.fixed_s)
    assert 4 * four == pytest.approx(one + cost.forward_s + (4 * 4 - 3) * cost.fixed_s)


def test_what_fits_nowhere_says_by_how_much():
    with pytest.raises(RunError, match=r"no plan fits; the nearest is [\d,]+ bytes above 9,000 on"):
        plan_function(
            *mlp(num_layers=6, width=64, rows=64),
            cluster=Cluster.parse("h200:1x2"),
            limit_bytes=9000,
            num_blocks=8,
        )


def test_a_function_is_planned_drawn_and_trained(tmp_path):
    """Memory for two of the blocks makes stages."""
    loss, params, batch = resnet(num_blocks=4, channels=16, rows=8)
    found = plan_function(
        loss, params, batch, cluster=Cluster.parse("h200:1x4"), limit_bytes=2e5, num_blocks=8
    )
    plan = found.stages
    assert len(plan.stages) > 1 and plan.num_devices <= 4
    draw_stages(plan, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    staged = StagedGradient(loss, params, batch, plan=plan, devices=jax.devices())
    value, gradient = staged(params, batch)
    wanted, wanted_gradient = jax.value_and_grad(loss)(params, batch)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted_gradient))
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6 * largest)
    jax.tree.map(close, gradient, wanted_gradient)


def test_a_plan_is_saved_and_loaded(tmp_path):
    case, cluster = mlp(num_layers=4, width=16), Cluster.parse("h200:1x4")
    found = plan_function(*case, cluster=cluster, limit_bytes=1.3e4, num_blocks=6)
    found.save(tmp_path / "plan.json")
    loaded = load_plan(tmp_path / "plan.json", *case, cluster=cluster)
    assert len(loaded.stages) > 1
    assert [(s.part.members, s.num_replicas) for s in loaded.stages] == [
        (s.part.members, s.num_replicas) for s in found.stages.stages
    ]
    with pytest.raises(InputError, match="a plan for this loss, with these shapes"):
        load_plan(tmp_path / "plan.json", *mlp(num_layers=5, width=16), cluster=cluster)
    (tmp_path / "no.json").write_text("[]")
    with pytest.raises(InputError, match=r"a plan that `FunctionPlan.save` wrote"):
        load_plan(tmp_path / "no.json", *case, cluster=cluster)


def test_a_deep_model_is_planned_for_many_devices_in_seconds():
    """BERT of 96 layers and 4.9B parameters on 32 GPUs, for which RaNNC takes four hours."""
    run = load_run([ROOT / "experiments" / "configs" / "papers" / "rannc_bert.gin"], [])
    whole = abstract_params(run.table(), run.policy.parameters)

    def of_layer(leaf):
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)

    layer = jax.tree.map(of_layer, whole["layers"])
    params = {**whole, "layers": (layer,) * run.model.num_layers}
    dtypes = {"tokens": "int32", "labels": "int32", "positions": "int32", "weights": "float32"}
    shape = (run.data.batch_size, run.data.sequence_length)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in dtypes.items()}

    def loss(params, batch):
        key, operations = jax.random.key(0), run.execution.operations()
        return run.loss(run)(params, batch, key, operations=operations)[0]

    began = time.process_time()
    found = plan_function(
        loss, params, batch, cluster=Cluster.parse("v100_32gb:4x8"), limit_bytes=27 * 2**30
    )
    assert time.process_time() - began < 10
    stages = found.stages.stages
    assert len(stages) > 4 and found.stages.num_devices == 32
    seconds = [stage.seconds * stage.num_replicas for stage in stages]
    assert max(seconds) < 1.25 * sum(seconds) / len(seconds)


def test_blocks_alike_are_measured_once(caplog):
    caplog.set_level("INFO", "jaxscale.planner.measure")
    case = mlp(num_layers=12, width=16, rows=8)
    plan = plan_function(
        *case, cluster=Cluster.parse("h200:1x2"), num_blocks=6, measure_on=jax.devices()[0]
    )
    assert plan.stages.seconds > 0
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("measured 6 blocks") and int(message.split()[3]) > 0


def test_a_block_without_memory_is_in_no_plan(monkeypatch):
    """Running out of memory is never a cost."""

    def exhausted(function, *values):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")

    monkeypatch.setattr(timing, "median_s", exhausted)
    cluster = Cluster.parse("h200:1x2")
    with pytest.raises(RunError, match="a block ran out of memory when it was measured"):
        plan_function(*mlp(), cluster=cluster, num_blocks=3, measure_on=jax.devices()[0])

    def broken(function, *values):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(timing, "median_s", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        plan_function(*mlp(), cluster=cluster, num_blocks=3, measure_on=jax.devices()[0])


def test_bad_input():
    loss, params, batch = mlp()
    with pytest.raises(InputError, match=r"batch: .*one number of rows"):
        plan_function(
            loss, params, {**batch, "y": batch["y"][:3]}, cluster=Cluster.parse("h200:1x2")
        )
