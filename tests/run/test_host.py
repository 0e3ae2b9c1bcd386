"""A run whose host has too little memory is refused before its first step, whatever rests there."""

import re
from pathlib import Path

import pytest

from jaxscale import cli
from jaxscale.launch.memory import GIB
from jaxscale.models.parameters import count_parameters
from jaxscale.run.host import check_host, host_parts
from jaxscale.run.run import load_run
from jaxscale.types import InputError

CONFIGS = Path(__file__).resolve().parents[2] / "experiments/configs"
IN_GROUPS = ("execution.is_scanned=True", "execution.checkpoint_every=4")
INPUTS_AWAY = (*IN_GROUPS, "execution.checkpoint_place='host'")
MOMENTS_AWAY = ("mesh.is_optimizer_on_host=True",)


def run_of(file, *overrides):
    return load_run([CONFIGS / file], overrides)


def assert_refused_with_a_tenth_less(monkeypatch, run, message, *, gib):
    """Whether the run fits a machine with so much memory, and is refused where a tenth is gone."""
    monkeypatch.setattr("jaxscale.run.host.pinnable_bytes", lambda: gib * GIB)
    check_host(run)  # of one device, however many there are
    monkeypatch.setattr("jaxscale.run.host.pinnable_bytes", lambda: 0.9 * gib * GIB)
    with pytest.raises(InputError, match=message):
        check_host(run)


def test_what_layers_in_chunks_keep_there_counts(monkeypatch):
    message = r"^FullyPipelined.inputs: given .* 64\.00 of inputs .* at most \d+\.\d+ GiB"
    assert_refused_with_a_tenth_less(monkeypatch, run_of("papers/fpdt_8b.gin"), message, gib=98)


def test_moments_of_whole_layers_count(monkeypatch):
    run = run_of("runs/llama_1b.gin", *MOMENTS_AWAY)
    total, _ = count_parameters(run.table())
    assert host_parts(run) == {"moments": 2 * 4 * total}
    message = r"^MeshConfig.is_optimizer_on_host: .*: 8\.48 of moments.* devices: use_8bit_moments"
    assert_refused_with_a_tenth_less(monkeypatch, run, message, gib=8.5)


def test_inputs_of_groups_of_whole_layers_count(monkeypatch):
    run = run_of("runs/llama_1b.gin", *INPUTS_AWAY)
    of_input = run.data.batch_size * run.data.sequence_length * run.model.model_dim * 2
    assert host_parts(run) == {"groups' inputs": run.model.num_layers // 4 * of_input}
    message = (
        r"^ExecutionConfig.checkpoint_place: .* of groups' inputs.*: a shorter sequence_length"
    )
    assert_refused_with_a_tenth_less(monkeypatch, run, message, gib=4 * of_input / GIB)
    both = host_parts(run_of("runs/llama_1b.gin", *INPUTS_AWAY, *MOMENTS_AWAY))
    assert set(both) == {"groups' inputs", "moments"}


def test_nothing_counts_where_all_is_on_the_device(monkeypatch):
    monkeypatch.setattr("jaxscale.run.host.pinnable_bytes", lambda: 0)
    run = run_of("runs/llama_1b.gin", *IN_GROUPS)
    assert host_parts(run) == {}
    check_host(run)


@pytest.mark.parametrize(
    ("host_gib", "verdict"),
    [
        (None, "compared with no host; give host_gib, what it has for each device"),
        (8, "of host_gib: no, 8.00 GiB"),
        (9, "of host_gib: yes, 9.00 GiB"),
    ],
)
def test_inspect_compares_whole_layers_with_a_host_that_is_given(capsys, host_gib, verdict):
    settings = [*MOMENTS_AWAY] + ([] if host_gib is None else [f"host_gib={host_gib}"])
    words = [f"--set={each}" for each in settings]
    assert cli.main(["inspect", str(CONFIGS / "runs/llama_1b.gin"), *words]) == 0
    line = rf"^host +8\.48 GiB per device, {re.escape(verdict)}$"
    assert re.search(line, capsys.readouterr().out, re.MULTILINE)


def test_on_a_cpu_what_rests_on_the_host_is_in_the_same_memory(capsys, monkeypatch):
    words = ["inspect", str(CONFIGS / "runs/llama_1b.gin"), "--set=runtime.platform=cpu"]
    words += [f"--set={each}" for each in MOMENTS_AWAY]
    assert cli.main(words) == 0
    step = re.search(r"^a step +([\d.]+) GiB", capsys.readouterr().out, re.MULTILINE)[1]
    for more, verdict in ((8, "no"), (9, "yes")):
        there = int((float(step) + more) * GIB)
        monkeypatch.setattr("jaxscale.run.inspect.host_bytes", lambda there=there: there)
        assert cli.main(words) == 0
        assert f"fits          this machine: {verdict}" in capsys.readouterr().out
