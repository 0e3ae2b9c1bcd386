"""Bad input through the command.

One line that names the parameter, what was given and what was expected; exit code 2;.
no traceback unless asked for; nothing on disk is harmed or left behind."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxscale import cli
from jaxscale.train.metrics import read_history

ROOT = Path(__file__).resolve().parents[1]
SETUP = """
include '{tiny}'
CORPUS = ('{root}/corpus',)
CACHE = '{root}/cache'
DIRECTORY = '{root}/run'
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A corpus, and the finished run of two steps that some cases find in their directory."""
    root = tmp_path_factory.mktemp("bad_input")
    (root / "corpus").mkdir()
    for number in range(20):
        (root / "corpus" / f"{number}.txt").write_text(f"document {number}\n" * (number + 5))
    write_file(root)
    assert pretrain(root, "train.steps=2", "optimizer.warmup_steps=1") == 0
    return root


@pytest.fixture
def root(shared, tmp_path):
    """The corpus and its cache, without the run."""
    for name in ("corpus", "cache"):
        shutil.copytree(shared / name, tmp_path / name, copy_function=shutil.copy2)
    write_file(tmp_path)
    return tmp_path


def write_file(root, more=""):
    (root / "run.gin").write_text(SETUP.format(tiny=ROOT / "tests/tiny.gin", root=root) + more)


def pretrain(root, *overrides, debug=False):
    arguments = [
        "pretrain",
        str(root / "run.gin"),
        *(f"--set={override}" for override in overrides),
    ]
    return cli.main(arguments + ["--debug"] * debug)


def files(root):
    """Every file and folder with what is in it; the cache of tokens may come and go."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None
        for path in sorted(root.rglob("*"))
        if path.relative_to(root).parts[0] != "cache"
    }


def refused(capsys, root, *overrides):
    """The message of a call that must fail as bad input should."""
    before = files(root)
    capsys.readouterr()
    assert pretrain(root, *overrides) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert lines[-1].startswith("jaxscale pretrain: ") and "Traceback" not in captured.err
    assert len(lines) == 1, captured.err
    assert files(root) == before
    return lines[0]


EXPERTS = """
from __gin__ import dynamic_registration
from jaxscale import run
run.LayerConfig.feed_forward = @run.ExpertsConfig()
run.ExpertsConfig.num_experts = 3
run.ExpertsConfig.dim = 16
"""
CASES = {
    "misspelt name": (["train.stepz=3"], "stepz", "closest is 'steps'"),
    "misspelt parameter": (["trian.steps=3"], "trian", "'train'"),
    "text for a number": (
        ["train.steps=many"],
        "steps",
        "given 'many', expected a value of type int",
    ),
    "number for a text": (["directory=3"], "directory", "given 3, expected a value of type str"),
    "float for an int": (
        ["data.batch_size=8.0"],
        "batch_size",
        "given 8.0, expected a value of type int",
    ),
    "unknown choice": (["optimizer.name='sgd'"], "OptimizerConfig.name", "'adamw', 'muon', 'lion'"),
    "more steps than are counted": (["train.steps=10000000000"], "steps", "at most 2147483647"),
    "infinite rate": (["optimizer.learning_rate=1e400"], "learning_rate", "a finite number above"),
    "directory without a name": (["directory="], "Run.directory", "the name of a folder"),
    "directory with a long name": ([f"directory={'x' * 300}"], "xxx", "File name too long"),
    "model beyond memory": (
        ["model.model_dim=1000000000"],
        "model: given",
        "GiB a device: ",
    ),
    "devices beyond reason": (
        ["runtime.num_cpu_devices=100000"],
        "RuntimeConfig.num_cpu_devices",
        "at most 1024",
    ),
    "no steps": (["train.steps=0"], "TrainConfig.steps", "given 0, expected a number above 0"),
    "warm-up": (
        ["optimizer.warmup_steps=99"],
        "warmup_steps",
        "warmup_steps + decay steps <= steps, but 99 + 0 > 30",
    ),
    "missing tokenizer": (
        ["data.tokenizer.kind='huggingface'", "data.tokenizer.path='/absent/tokenizer'"],
        "TokenizerConfig.path",
        "given '/absent/tokenizer'",
    ),
    "mesh": (
        ["mesh.data=2"],
        "MeshConfig",
        "= 1 * 2 * 1 * 1 * 2 = 4 to equal the number of devices, 8",
    ),
    "pipeline": (
        ["mesh.pipeline=2", "mesh.data=2"],
        "MeshConfig.pipeline",
        "given 2",
        "pipeline * num_chunks <= periods of the stack, but 2 * 1 = 2 > 1",
    ),
    "zero bubble": (
        ["mesh.pipeline=2", "mesh.data=2", "model.num_layers=2", "mesh.schedule='zero_bubble'"],
        "ExecutionConfig.is_scanned",
        "given True, expected False",
    ),
    "heads of a group": (
        ["model.pattern.0.attention.num_kv_heads=3"],
        "num_kv_heads",
        "num_heads % num_kv_heads == 0 (4 heads)",
    ),
    "heads on the mesh": (
        ["model.pattern.0.attention.num_heads=6", "model.pattern.0.attention.num_kv_heads=3"],
        "MeshConfig.tensor",
        "num_kv_heads % tensor == 0",
        "3 % 2 = 1",
    ),
    "batch": (
        ["data.batch_size=6"],
        "DataConfig.batch_size",
        "batch_size % (data * expert * num_microbatches) == 0, here 6 % (4 * 1 * 1) = 2",
    ),
    "micro-batches": (
        ["train.num_microbatches=3"],
        "DataConfig.batch_size",
        "here 8 % (4 * 1 * 3) = 8",
    ),
    "sequence": (
        ["data.sequence_length=64"],
        "DataConfig.sequence_length: given 64",
        "sequence_length <= max_length = 32",
    ),
    "vocabulary": (
        ["model.vocab_size=200"],
        "model.vocab_size: given 200",
        "200 >= 257 does not hold",
    ),
    "pattern": (
        ["train.trainable='('"],
        "TrainConfig.trainable: given '('",
        "a regular expression",
    ),
    "pattern that matches nothing": (
        ["train.trainable='lora'"],
        "TrainConfig.trainable",
        "embedding/tokens",
    ),
    "profile": (
        ["train.profile_steps=(5, 99)"],
        "TrainConfig.profile_steps",
        "0 <= first < second <= 30",
    ),
    "start of a run": (
        ["train.init_from='/absent'"],
        "TrainConfig.init_from: given '/absent'",
        "a checkpoint",
    ),
    "determinism": (
        ["runtime.is_deterministic=True", "execution.attention='cudnn'"],
        "ExecutionConfig.attention",
        "given 'cudnn'",
        "one of ('reference', 'chunked', 'invariant', 'triton')",
    ),
    "attention": (
        ["execution.attention='flash'"],
        "ExecutionConfig.attention: given 'flash', expected one of",
        "'chunked'",
    ),
    "chunks of the loss": (
        ["execution.num_loss_chunks=3"],
        "ExecutionConfig.num_loss_chunks: given 3",
        "; nearest: 2 or 4",
    ),
    "length of a chunk": (
        ["execution.attention='chunked'"],
        "ExecutionConfig.attention: given 'chunked'",
        "T % 512 == 0",
    ),
    "soft-cap": (
        ["execution.attention='cudnn'", "model.pattern.0.attention.softcap=30.0"],
        "ExecutionConfig.attention: given 'cudnn'",
        "soft-cap",
    ),
    "weight of the z-loss": (
        ["train.z_loss=-1.0"],
        "TrainConfig.z_loss: given -1.0",
        "0 or a finite number above",
    ),
    "no devices": (
        ["runtime.num_cpu_devices=0"],
        "RuntimeConfig.num_cpu_devices: given 0",
        "above 0",
    ),
    "flags": (
        ["runtime.xla_flags=('xla_x=1',)"],
        "RuntimeConfig.xla_flags: given 'xla_x=1'",
        "--xla_",
    ),
    "kernels": (
        ["runtime.kernels='triton'"],
        "RuntimeConfig.kernels: given 'triton'",
        "a GPU of compute capability 8.0 or newer, but this is cpu",
    ),
    "block sizes": (
        ["runtime.block_sizes='/absent.json'"],
        "RuntimeConfig.block_sizes: given '/absent.json'",
        "No such file",
    ),
    "seed": (
        ["train.seed=9999999999"],
        "TrainConfig.seed: given 9999999999",
        "0 <= seed <= 4294967295",
    ),
    "devices": (["runtime.num_cpu_devices=5"], "RuntimeConfig.num_cpu_devices: given 5", "8"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_misfit_is_refused_before_anything_happens(root, capsys, name):
    overrides, *parts = CASES[name]
    message = refused(capsys, root, *overrides)
    assert all(part in message for part in parts), message


def test_the_page_lists_them():
    page = (ROOT / "docs" / "bad_input.md").read_text()
    missing = [
        name
        for name, (overrides, *_) in CASES.items()
        if f"| {name} | `{overrides[0][:12]}" not in page
    ]
    assert not missing


def test_a_misspelt_name_in_the_file(root, capsys):
    write_file(
        root,
        "from __gin__ import dynamic_registration\nfrom jaxscale import run\n"
        "run.TrainConfig.stepz = 3",
    )
    assert "run.gin:8" in (message := refused(capsys, root)) and "closest is 'steps'" in message


def test_block_sizes_of_another_device(root, capsys):
    (root / "a10.json").write_text('{"device": "NVIDIA A10", "blocks": {}}')
    message = refused(capsys, root, f"runtime.block_sizes='{root}/a10.json'")
    assert (
        "a file of this device, cpu, but it is of NVIDIA A10: jaxscale tune writes one" in message
    )


def test_experts_that_do_not_divide_over_the_mesh(root, capsys):
    write_file(root, EXPERTS)
    message = refused(capsys, root, "mesh.data=2", "mesh.expert=2")
    assert "MeshConfig.expert" in message
    assert "num_experts % expert == 0" in message and "3 % 2 = 1" in message


def test_a_missing_file(root, capsys):
    (root / "run.gin").rename(root / "run2.gin")
    message = refused(capsys, root)
    assert (
        f"given '{root / 'run.gin'}', expected an existing gin file; closest is 'run2.gin'"
        in message
    )


def test_a_file_with_a_byte_order_mark(root, capsys):
    path = root / "run.gin"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert "TrainConfig.steps: given 0" in refused(capsys, root, "train.steps=0")


@pytest.mark.parametrize("name", ["CACHE", "CORPUS", "DIRECTORY", "data.tokenizer.path"])
def test_a_name_that_no_file_can_have(root, capsys, name):
    path = str(root / ("n" * 300))
    value = (path,) if name == "CORPUS" else path
    kind = ["data.tokenizer.kind='sentencepiece'"] * name.startswith("data")
    message = refused(capsys, root, *kind, f"{name}={value!r}")
    assert "nnn" in message and "File name too long" in message


def test_a_pipe_for_a_file(root, capsys):
    (root / "run.gin").unlink()
    os.mkfifo(root / "run.gin")
    assert cli.main(["pretrain", str(root / "run.gin")]) == 2
    assert "a gin file; this is a pipe or device" in capsys.readouterr().err


def test_a_file_whose_name_no_file_can_have(root, capsys):
    assert cli.main(["pretrain", str(root / ("n" * 300))]) == 2
    assert "nnn: File name too long" in capsys.readouterr().err


def test_a_prompt_with_a_stray_byte(shared, capsys):
    assert cli.main(["generate", str(shared / "run.gin"), "--set=prompts=a\udcff"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(r"jaxscale generate: text: given 'a\udcff', expected text of whole")


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin"])
def test_a_token_cache_with_flipped_bytes(root, capsys, name):
    shutil.rmtree(root / "cache")
    assert cli.main(["data", str(root / "run.gin")]) == 0
    (path,) = (root / "cache").glob(f"*/{name}")
    path.write_bytes(bytes(byte ^ 255 for byte in path.read_bytes()))
    message = refused(capsys, root)
    assert "DataConfig.cache_directory: given" in message and f"{name} has changed" in message


def test_a_missing_corpus(root, capsys):
    shutil.rmtree(root / "corpus")
    message = refused(capsys, root)
    assert "TextSource.paths" in message and str(root / "corpus") in message


@pytest.mark.parametrize("content", [None, ""], ids=["no files", "an empty file"])
def test_an_empty_corpus(root, capsys, content):
    for path in (root / "corpus").iterdir():
        path.unlink()
    if content is not None:
        (root / "corpus" / "0.txt").write_text(content)
    expected = (
        "the corpus is empty" if content == "" else "expected at least one file that matches *.txt"
    )
    assert expected in refused(capsys, root)


EVALUATOR = """
from __gin__ import dynamic_registration
from jaxscale import run
run.Run.evaluators = {'held_out': @run.BitsPerByte%s}
run.DataConfig.held_out_fraction = 1e-9
"""


@pytest.mark.parametrize(
    ("brackets", "part"), [("()", "leaves documents in the split 'held_out'"), ("", "brackets")]
)
def test_an_evaluator_that_cannot_evaluate(root, capsys, brackets, part):
    write_file(root, EVALUATOR % brackets)
    assert part in refused(capsys, root)


def test_a_checkpoint_of_another_model(shared, root, capsys):
    shutil.copytree(shared / "run", root / "run")
    message = refused(capsys, root, "model.pattern.0.feed_forward.dim=64")
    assert "feed_forward.dim" in message and "64" in message and "32" in message


def test_a_checkpoint_of_another_optimizer(shared, root, capsys):
    shutil.copytree(shared / "run", root / "run")
    assert "OptimizerConfig.name" in refused(capsys, root, "optimizer.name='lion'")


def test_other_data_than_the_run_was_begun_with(shared, root, capsys):
    shutil.copytree(shared / "run", root / "run")
    assert "DataConfig.seed: given 1, expected 0" in refused(capsys, root, "data.seed=1")


def test_a_history_that_is_no_text(shared, root, capsys):
    shutil.copytree(shared / "run", root / "run")
    (root / "run" / "metrics.jsonl").write_bytes(b"\xff\xfe\x00")
    message = refused(capsys, root, "train.steps=3")
    assert "metrics.jsonl', expected a history of figures, as text" in message


def test_an_unwritable_directory(root, capsys):
    (root / "run").write_text("a file where the folder should be")
    message = refused(capsys, root)
    assert str(root / "run") in message and "folder" in message


def test_debug_shows_the_traceback(root):
    with pytest.raises(ValueError, match="closest is 'steps'"):
        pretrain(root, "train.stepz=3", debug=True)


@pytest.fixture
def small_disk(mount_disk):
    return mount_disk("8m")


def fill(disk, *, but):
    """Takes all space but `but` bytes."""
    (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - but))


def test_a_read_only_run_is_evaluated(shared, root, small_disk, capsys):
    """Its figures are printed, and a warning says that they are nowhere else."""
    shutil.copytree(shared / "run", small_disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    write_file(root, f"DIRECTORY = '{small_disk}/run'\n")
    assert cli.main(["evaluate", str(root / "run.gin")]) == 0
    printed = capsys.readouterr()
    assert "held_out/bits_per_byte" in printed.out
    assert "evaluation_2.json: Read-only file system" in printed.err


def test_a_disk_full_from_the_start_harms_nothing(shared, root, small_disk, capsys):
    run = shutil.copytree(shared / "run", small_disk / "run")
    before = files(run)
    fill(small_disk, but=0)
    assert pretrain(root, f"directory={str(run)!r}", "train.steps=9") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("jaxscale pretrain: directory: given") and "No space left" in message
    after = files(run)
    assert {name: after[name] for name in before} == before


@pytest.mark.long
@pytest.mark.parametrize("but", [96, 24])
def test_a_disk_that_fills_up_harms_nothing(shared, root, small_disk, but):
    """The second checkpoint, written while training goes on, does not fit in so many KiB.

    The run goes on from the first once there is space again.
    """
    run = shutil.copytree(shared / "run", small_disk / "run")
    before = files(run / "checkpoints")
    fill(small_disk, but=but * 1024)
    command = [sys.executable, "-m", "jaxscale", "pretrain", str(root / "run.gin")]
    for override in (f"directory={str(run)!r}", "train.steps=9", "checkpoint.save_every=3"):
        command.append(f"--set={override}")
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(root / "compiled")}
    start = functools.partial(
        subprocess.run,
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    process = start()
    assert process.returncode == 2, process.stderr
    message = process.stderr.splitlines()[-1]
    assert message.startswith("jaxscale pretrain: ") and "No space left" in message
    assert str(run) in message and "Traceback" not in process.stderr, process.stderr
    after = files(run / "checkpoints")
    assert {name: after[name] for name in before} == before
    assert "TrainConfig.steps" in (run / "config.gin").read_text()
    (small_disk / "ballast").unlink()
    assert start().returncode == 0
    steps = [line["step"] for line in read_history(run / "metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, 10))
