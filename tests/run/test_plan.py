"""`plan` finds a mesh, says why others lose, and writes a file that `pretrain` runs as it is."""

import importlib
import re
import types
from pathlib import Path

import jax
import pytest

from jaxscale import cli, config
from jaxscale.launch import ahead_of_time
from jaxscale.ops.device import named_kernels
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.planner import timing
from jaxscale.planner.plan import Plan, compare
from jaxscale.run.plan import plan
from jaxscale.run.pretrain import pretrain
from jaxscale.types import InputError
from tests.run.runs import GIN, ROOT, write_run

needs_plugin = pytest.mark.skipif(
    not ahead_of_time.has_plugin(), reason="jax-cuda13-plugin is not installed"
)
PAPERS = ROOT / "experiments" / "configs" / "papers"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With a tiny corpus and a run's file."""
    folder = tmp_path_factory.mktemp("plan")
    write_run(folder)
    return folder


def plan_file(folder, *overrides, devices="h200:1x8"):
    arguments = ["plan", str(folder / "run.gin"), "--devices", devices]
    given = [f"directory='{folder}/trained'", f"output='{folder}/plan.gin'", *overrides]
    return cli.main(arguments + [f"--set={each}" for each in given])


def test_the_written_file_trains_as_it_is(folder, capsys):
    overrides = ("train.steps=2", "pinned={'tensor': 2}", f"picture='{folder}/plan.png'")
    assert plan_file(folder, *overrides) == 0
    shown = capsys.readouterr().out
    assert re.match(r"h200:1x8: [\d,]+ layouts in \d+\.\d s\n", shown)
    assert re.search(r"^ *1 .* best$", shown, re.MULTILINE)
    assert re.search(r"^ *2 .*% slower: \w+ \+[\d.]+ ms$", shown, re.MULTILINE)
    assert re.search(r"^the file's own mesh: [\d.]+ ms, data 4, tensor 2, zero 1", shown, re.M)
    assert (folder / "plan.png").read_bytes().startswith(b"\x89PNG")
    chosen = Plan.load(folder / "plan.json")
    run = config.load(pretrain, [folder / "plan.gin"]).arguments["run"]
    assert run.mesh == chosen.candidate.layout.mesh and run.mesh.tensor == 2
    assert run.execution.remat == chosen.candidate.layout.remat
    assert run.train.steps == 2
    outcome = pretrain(run=run)
    assert (outcome.step, run.setup().mesh.size) == (2, len(jax.devices()))


def test_plans_are_compared(folder, capsys):
    first = config.run(plan, [folder / "run.gin"], settings(folder, "one", "{'tensor': 1}"))
    second = config.run(plan, [folder / "run.gin"], settings(folder, "two", "{'tensor': 2}"))
    capsys.readouterr()
    assert Plan.load(folder / "one.json") == first != second
    shown = compare(first, second)
    before, after = first.candidate.time.total, second.candidate.time.total
    step = re.search(r"^step +([\d.]+) +([\d.]+) +([+-][\d.]+) ms$", shown, re.MULTILINE)
    assert [float(step[1]), float(step[2])] == pytest.approx([before * 1e3, after * 1e3], abs=0.01)
    (folder / "no.json").write_text("{}")
    with pytest.raises(InputError, match="a plan that `jaxscale plan` wrote"):
        Plan.load(folder / "no.json")


def settings(folder, name, pinned):
    return [
        f"directory='{folder}/{name}'",
        "devices='h200:1x2'",
        f"output='{folder}/{name}.gin'",
        f"pinned={pinned}",
    ]


def test_a_planner_stands_where_a_mesh_goes(folder):
    (folder / "planned.gin").write_text(
        GIN.format(root=ROOT, folder=folder)
        + "run.Run.mesh = @run.PlannedMesh()\n"
        + "run.PlannedMesh.devices = 'h200:1x8'\n"
        + "run.PlannedMesh.pinned = {'pipeline': 2, 'schedule': 'gpipe'}\n"
    )
    overrides = [f"directory='{folder}/planned'", "execution.num_loss_chunks=1"]
    loaded = config.load(pretrain, [folder / "planned.gin"], overrides)
    mesh = loaded.arguments["run"].mesh
    assert isinstance(mesh, MeshConfig)
    assert (mesh.pipeline, mesh.schedule) == (2, "gpipe")
    assert loaded.arguments["run"].train.num_microbatches >= 2
    # What the run writes down gives the same run again.
    (folder / "again.gin").write_text(loaded.text)
    assert config.load(pretrain, [folder / "again.gin"]).arguments == loaded.arguments


def test_bad_input(folder, capsys):
    cases = {
        ("h300:1x8",): "devices: given 'h300', expected one of a100, h100, h200, v100_32gb",
        ("h200",): "DEVICE:HOSTSxDEVICES_PER_HOST",
        ("h200:1x1-1",): "at least one device that is left",
        ("h200:1x8", "pinned={'tensors': 2}"): "pinned: given 'tensors', expected one of",
        ("h200:1x8", "output='none/plan.gin'"): "output: given 'none/plan.gin', expected a file in",
        (
            "h200:1x8",
            "measure=True",
        ): "measure: given True, expected False where there is only a CPU",
        ("h200:1x8", "pinned={'tensor': 3}"): "values that the model and 8 devices allow",
    }
    for (devices, *overrides), message in cases.items():
        assert plan_file(folder, *overrides, devices=devices) == 2
        assert message in capsys.readouterr().err


def test_a_model_too_large_says_what_is_nearest(folder, capsys):
    overrides = ("model.vocab_size=1000000", "model.model_dim=65536")
    assert plan_file(folder, *overrides, devices="v100_32gb:1x1") == 1
    error = capsys.readouterr().err
    assert re.search(
        r"no layout fits; the nearest needs [\d,]+ bytes above [\d,]+: moments on the host, M",
        error,
    )


def test_moments_go_to_the_host_only_where_they_must(folder, capsys):
    for num_layers, is_on_host in ((60, False), (110, True)):
        overrides = (f"model.num_layers={num_layers}", "model.model_dim=65536")
        assert plan_file(folder, *overrides, devices="v100_32gb:1x1") == 0
        layout = Plan.load(folder / "plan.json").candidate.layout
        assert layout.mesh.is_optimizer_on_host == is_on_host
        assert ("moments on the host" in capsys.readouterr().out) == is_on_host


def test_fewer_devices_may_be_faster_when_some_are_gone(folder, capsys):
    """Of seven that are left a batch of eight rows can use four."""
    overrides = ("pinned={'pipeline': 1, 'tensor': 1, 'sequence': 1}",)
    assert plan_file(folder, *overrides, devices="h200:1x8-1") == 0
    assert Plan.load(folder / "plan.json").candidate.layout.num_devices == 4


@pytest.mark.long
@needs_plugin
def test_the_best_is_compiled_for_the_devices(folder, capsys):
    assert plan_file(folder, "num_compiled=2", "pinned={'pipeline': 1}") == 0
    shown = capsys.readouterr().out
    found = re.search(r"^1 compiled: ([\d.]+) GiB, [\d.]+ modelled$", shown, re.M)
    memory = Plan.load(folder / "plan.json").candidate.memory.total
    assert float(found[1]) == pytest.approx(memory / 2**30, abs=0.01)


def test_layers_of_the_best_plans_are_measured_by_a_flag(folder, capsys, monkeypatch):
    module = importlib.import_module("jaxscale.run.plan")
    monkeypatch.setattr(module, "_calibrated", lambda cluster: cluster)
    monkeypatch.setattr(timing, "median_s", lambda function, *values: 1.0)
    arguments = ["plan", str(folder / "run.gin"), "--devices", "h200:1x1", "--measure"]
    given = [f"--set=directory='{folder}/trained'", f"--set=output='{folder}/plan.gin'"]
    assert cli.main(arguments + given) == 0
    assert re.search(r"^measured 2 layers and heads in \d", capsys.readouterr().out, re.MULTILINE)

    def exhausted(function, *values):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")

    monkeypatch.setattr(timing, "median_s", exhausted)
    assert cli.main(arguments + given) == 1
    shown = capsys.readouterr()
    assert "impossible: M 1, remat none: a layer with 8 rows ran out of memory" in shown.out
    assert "in every layout a layer ran out of memory" in shown.err


def test_plans_are_compiled_with_the_kernels_that_the_run_names(folder, monkeypatch):
    module, named = importlib.import_module("jaxscale.run.planned_memory"), []
    step = types.SimpleNamespace(
        lowered=types.SimpleNamespace(as_text=lambda: "a program"), compile=lambda: None
    )
    monkeypatch.setattr(module, "described_devices", lambda *args, **kwargs: [])
    monkeypatch.setattr(
        module, "lower_step", lambda run, devices: named.append(named_kernels()) or step
    )
    monkeypatch.setattr(module, "memory_of", lambda step: ahead_of_time.Memory(2**30, 0, 2**29))
    assert plan_file(folder, "num_compiled=2", "runtime.kernels='xla'") == 0
    assert plan_file(folder, "num_compiled=1") == 0
    assert named == ["xla", "xla", None]


def test_plans_of_one_program_are_compiled_once(folder, capsys, monkeypatch):
    module, compiled = importlib.import_module("jaxscale.run.planned_memory"), []
    lowered = types.SimpleNamespace(as_text=lambda: "one program")
    step = types.SimpleNamespace(lowered=lowered, compile=lambda: compiled.append("a step"))
    monkeypatch.setattr(module, "described_devices", lambda *args, **kwargs: [])
    monkeypatch.setattr(module, "lower_step", lambda run, devices: step)
    monkeypatch.setattr(module, "memory_of", lambda step: ahead_of_time.Memory(2**30, 0, 2**29))
    assert plan_file(folder, "num_compiled=3") == 0
    shown = capsys.readouterr().out
    assert len(re.findall(r"^\d compiled: 1.50 GiB", shown, re.MULTILINE)) == 3
    assert compiled == ["a step"]
    assert Plan.load(folder / "plan.json").candidate.memory.total == pytest.approx(1.5 * 2**30)
