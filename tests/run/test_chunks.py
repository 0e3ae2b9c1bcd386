"""What a run in chunks takes of devices and hosts is told by arithmetic, and refused by it."""

import dataclasses
import math
import operator
import re
from pathlib import Path

import pytest

from jaxscale import cli
from jaxscale.launch.memory import GIB
from jaxscale.planner.chunks import chunked_memory, longest_length, suggested_chunk
from jaxscale.planner.memory import step_memory
from jaxscale.planner.state import StateCounter
from jaxscale.run.chunks import memory_of_chunks
from jaxscale.run.job import job_of, layout_of
from jaxscale.run.run import load_run

FILE = Path(__file__).resolve().parents[2] / "experiments/configs/papers/fpdt_8b.gin"


@pytest.fixture(scope="module")
def run():
    return load_run([FILE])


def test_what_rests_on_the_host_is_what_is_kept(run):
    """Of 32 layers 262,144 inputs and outputs of 4,096 elements in bfloat16, and the lse."""
    job, layout = job_of(run), layout_of(run)
    strategy = dataclasses.replace(run.execution.strategy, attention="host")
    memory = chunked_memory(job, layout, StateCounter(job)(run.mesh), strategy)
    of_layer = 262_144 * 4_096 * 2
    assert memory.host["inputs"] == 32 * of_layer
    assert memory.host["attention's outputs"] == 32 * (of_layer + 262_144 * 32 * 4)
    # Of four chunks of q, do and dq, 8 bytes an element, two wait at once.
    assert memory.host["chunks"] == 2 * of_layer
    some = dataclasses.replace(strategy, device_input_bytes=of_layer // 4)
    memory = chunked_memory(job, layout, StateCounter(job)(run.mesh), some)
    assert memory.host["inputs"] == 3 * memory.device["inputs"] == 24 * of_layer
    # Of 8 key heads of 128 keys, values and their gradients, in bfloat16 and as they are added up.
    here = dataclasses.replace(strategy, chunks="device")
    memory = chunked_memory(job, layout, StateCounter(job)(run.mesh), here)
    assert memory.host["chunks"] == 0
    assert memory.device["chunks"] == 262_144 * 2 * 8 * 128 * (2 + 2 + 4)
    execution = dataclasses.replace(job.execution, checkpoint_every=4, checkpoint_place="host")
    in_groups = dataclasses.replace(job, execution=execution)
    memory = chunked_memory(in_groups, layout, StateCounter(job)(run.mesh), strategy)
    assert memory.host["groups' inputs"] == 8 * of_layer
    assert memory.host["inputs"] == 4 * of_layer


@pytest.mark.parametrize(
    ("sizes", "num_heads"), [(dict(sequence=8), 8), (dict(sequence=16), 16), (dict(tensor=16), 16)]
)
def test_copies_of_key_heads_are_counted(run, sizes, num_heads):
    """More devices than the 8 key heads hold some of them twice.

    A step with one key head, compiled for four H200s, took 6.41 GiB: 5.19 were told without copies
    and 5.94 with them.
    """
    mesh = dataclasses.replace(run.mesh, **sizes)
    changed = dataclasses.replace(run, mesh=mesh)
    job, layout = job_of(changed), layout_of(changed)
    strategy = dataclasses.replace(run.execution.strategy, chunks="device")
    memory = chunked_memory(job, layout, StateCounter(job)(mesh), strategy)
    assert memory.device["chunks"] == 262_144 / math.prod(mesh.sizes) * 2 * num_heads * 128 * (
        2 + 2 + 4
    )


@pytest.mark.parametrize(("num_loss_chunks", "compiled_gib"), [(4, 40.68), (12, 27.79)])
def test_a_loss_in_few_chunks_is_fuller_than_a_layer(num_loss_chunks, compiled_gib):
    """Beside two layers compiled for an H200."""
    settings = ["model.num_layers=2", "data.sequence_length=196608"]
    settings += ["mesh.is_optimizer_on_host=False", "execution.strategy.attention=host"]
    settings += ["execution.strategy.chunks=device"]
    run = load_run([FILE], [*settings, f"execution.num_loss_chunks={num_loss_chunks}"])
    memory = memory_of_chunks(run)
    assert memory.on_device / GIB == pytest.approx(compiled_gib, rel=0.1)
    assert memory.on_host / GIB == pytest.approx(6.05, rel=0.001)


def test_groups_of_whole_layers_keep_their_inputs_and_what_one_group_keeps():
    file = FILE.parents[1] / "runs/llama_1b.gin"
    settings = ["execution.is_scanned=True", "execution.remat='dots'"]
    kept = {}
    for every in (1, 4):
        run = load_run([file], [*settings, f"execution.checkpoint_every={every}"])
        job = job_of(run)
        kept[every] = step_memory(job, layout_of(run), StateCounter(job)(run.mesh)).stashed
    of_input = job.batch_size * job.length * job.model.model_dim * 2
    assert kept[4] == pytest.approx(kept[1] / 4 + 4 * of_input)


def test_the_longest_sequence_fits_and_one_chunk_more_does_not(run):
    job, layout, strategy = job_of(run), layout_of(run), run.execution.strategy
    state, limits = StateCounter(job)(run.mesh), (100 * GIB, 128 * GIB)

    def needs(length):
        longer = dataclasses.replace(job, length=length)
        memory = chunked_memory(longer, layout, state, strategy)
        return memory.on_device, memory.on_host

    step = strategy.chunk_tokens
    longest = longest_length(needs, step, device_bytes=limits[0], host_bytes=limits[1])
    assert longest > step
    for length, is_expected in ((longest, True), (longest + step, False)):
        assert all(map(operator.le, needs(length), limits)) == is_expected


def test_inspect_shows_strategies_side_by_side(capsys):
    assert cli.main(["inspect", str(FILE)]) == 0
    shown = capsys.readouterr().out
    row = r"^  {} +([\d.]+) +([\d.]+) +([\d,]+) +[\d.]+$"
    found = {}
    names = "chunks, all on the device", "chunks, all on the host"
    for name in (*names, "whole layers, ZeRO-3", "the same, inputs on the host"):
        device, host, longest = re.search(row.format(name), shown, re.MULTILINE).groups()
        found[name] = float(device), float(host), int(longest.replace(",", ""))
    device, host, whole, away = found.values()
    assert whole[0] > away[0] and whole[1] < away[1] and whole[2] < away[2] < host[2]
    assert device[0] > host[0] and device[1] < host[1] and device[2] < host[2]
    assert re.search(r"^chunk_tokens +65536 would fit, 65536 is set$", shown, re.MULTILINE)


def test_inspect_bounds_lengths_by_the_memory_of_a_host_that_is_given(capsys):
    row = r"^  as it is set +[\d.]+ +([\d.]+) +([\d,]+) +([\d.]+)$"
    longest, taken = {}, {}
    for host_gib in (130, 260):
        settings = ["host_gib", "mesh.is_optimizer_on_host"]
        given = [f"{name}={value}" for name, value in zip(settings, (host_gib, False), strict=True)]
        assert cli.main(["inspect", str(FILE), *(f"--set={each}" for each in given)]) == 0
        shown = capsys.readouterr().out
        assert f" and {host_gib}.00 of its host" in shown
        host, tokens, of_longest = re.search(row, shown, re.MULTILINE).groups()
        longest[host_gib] = int(tokens.replace(",", ""))
        taken[host_gib] = float(of_longest)
    # 256 KiB a token of inputs, and of queries 32 for each but those of two chunks.
    assert float(host) == 68
    assert longest == {130: 458_752, 260: 917_504}
    assert taken == {130: 112 + 10, 260: 224 + 24}


def test_inspect_says_what_the_longest_sequence_takes_of_a_host_that_it_does_not_ask(capsys):
    """A length that fits the device alone is none that fits."""
    assert cli.main(["inspect", str(FILE), "--set=mesh.is_optimizer_on_host=False"]) == 0
    shown = capsys.readouterr().out
    assert "(no host is asked: host_gib)" in shown
    row = r"^  as it is set +[\d.]+ +[\d.]+ +([\d,]+) +([\d.]+)$"
    tokens, taken = re.search(row, shown, re.MULTILINE).groups()
    assert (tokens, float(taken)) == ("1,048,576", 256 + 28)
    assert "host          68.00 GiB per device, compared with no host; give host_gib" in shown


@pytest.mark.parametrize(
    ("length", "chunk", "expected"),
    [(262_144, 65_536, 65_536), (1_048_576, 65_536, 262_144), (98_304, 32_768, 49_152)],
)
def test_a_suggested_chunk_is_large_and_divides_the_sequence(run, length, chunk, expected):
    job, layout = job_of(run), layout_of(run)
    longer = dataclasses.replace(job, length=length)
    strategy = dataclasses.replace(run.execution.strategy, chunk_tokens=chunk)
    state = StateCounter(job)(run.mesh)
    for device_bytes, found in ((110 * GIB, expected), (10 * GIB, None)):
        suggested = suggested_chunk(longer, layout, state, strategy, device_bytes=device_bytes)
        assert suggested == found
