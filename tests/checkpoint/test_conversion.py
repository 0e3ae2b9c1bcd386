"""Converting in pieces: what comes out, the memory it takes, kills on the way, and damage."""

import itertools
import os
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxscale.checkpoint import conversion, manifest
from jaxscale.checkpoint.boxes import boxes, chunk_shape
from jaxscale.checkpoint.conversion import Destination, convert
from jaxscale.checkpoint.native import NativeCheckpoint, TreeForm
from jaxscale.checkpoint.rank_files import RankFiles, npz_arrays, write_npz
from jaxscale.types import InputError
from tests.checkpoint.states import FINGERPRINT, abstract, assert_same, mesh_of, open_at

ROOT = Path(__file__).resolve().parents[2]
STACK = (3, 4, 64, 128)  # [layers, experts, in, out]: 393 kB in float32
LARGE_STACK = (2, 4, 256, 512)  # 4 MiB
RULES = """
[[rule]]
match = 'w1'
cuts = [{axis = 'tensor', dim = 3}, {axis = 'expert', dim = 1}]

[[rule]]
match = 'norm'
kind = 'replicated'
"""


def write_ranks(folder, shape=STACK):
    """A stack of experts over 2 x 2 ranks and a norm on all; returns what they make up."""
    draw = np.random.default_rng(0)
    w1, norm = draw.normal(size=shape).astype(np.float32), np.float32([1, 2, 3])
    folder.mkdir()
    for expert, tensor in itertools.product(range(2), range(2)):
        part = np.split(np.split(w1, 2, axis=1)[expert], 2, axis=3)[tensor]
        np.savez(folder / f"expert={expert},tensor={tensor}.npz", w1=part, norm=norm)
    (folder / "rules.toml").write_text(RULES)
    return {"w1": w1, "norm": norm}


def read(folder):
    return {path: array[:] for path, array in NativeCheckpoint(folder).leaves().items()}


def assert_equal(got, wanted):
    assert got.keys() == wanted.keys()
    for path, array in wanted.items():
        assert got[path].dtype == array.dtype
        np.testing.assert_array_equal(got[path], array, err_msg=path)


@pytest.mark.parametrize("shape", [(), (5,), (7, 3), (3, 4, 5), (2, 1, 6)])
@pytest.mark.parametrize("limit", [1, 8, 40, 100, 10_000])
def test_chunks_are_within_the_limit_and_cover_the_array(shape, limit):
    chunk = chunk_shape(shape, 4, limit)
    assert 4 * np.prod(chunk) <= max(limit, 4)
    count = np.zeros(shape, int)
    for box in boxes(shape, chunk):
        count[box] += 1
    assert (count == 1).all()


def test_a_leaf_larger_than_the_budget_streams_through_it(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "BLOCK_BYTES", 1 << 12)
    wanted = write_ranks(tmp_path / "ranks", LARGE_STACK)
    leaves = RankFiles(tmp_path / "ranks").leaves()
    # The first conversion loads what stays in memory.
    convert({"norm": leaves["norm"]}, Destination(tmp_path, 0), identity="", budget_bytes=10_000)
    budget = wanted["w1"].nbytes // 4
    tracemalloc.start()
    convert(leaves, Destination(tmp_path, 1), identity="", budget_bytes=budget)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < budget
    assert_equal(read(tmp_path / "1"), wanted)
    assert manifest.find_damage(tmp_path / "1", lambda name: True) is None


def test_a_lost_chunk_of_zeros_is_missed_too(tmp_path):
    """Were it not written, one that is lost would be as good as one that was all zeros."""
    zeros = {"w": np.zeros((4, 64), np.float32)}
    convert(zeros, Destination(tmp_path, 1), identity="", budget_bytes=100_000)
    next((tmp_path / "1" / "state" / "w").glob("[0-9]*")).unlink()
    assert "no file" in manifest.find_damage(tmp_path / "1", lambda name: True)


def test_per_rank_files_are_there_whole_or_not_at_all(tmp_path):
    class Interrupted:
        shape, dtype = (4,), np.dtype("f4")

        def __getitem__(self, index):
            raise KeyboardInterrupt

    arrays = {"a": np.ones(4, np.float32), "b": Interrupted()}
    with pytest.raises(KeyboardInterrupt):
        write_npz(arrays, tmp_path / "all.npz", piece_bytes=100)
    assert not (tmp_path / "all.npz").exists()
    write_npz({"a": arrays["a"]}, tmp_path / "all.npz", piece_bytes=100)
    with pytest.raises(InputError, match="a file that does not exist yet"):
        write_npz({"a": arrays["a"]}, tmp_path / "all.npz", piece_bytes=100)
    assert npz_arrays(tmp_path / "all.npz").keys() == {"a"}


def test_our_own_checkpoint_is_converted_to_one_that_restores(tmp_path, saved_run):
    folder, states = saved_run
    source = NativeCheckpoint(folder / "2")
    destination = Destination(tmp_path, 2, FINGERPRINT, {"position": 9}, source.form)
    convert(source.leaves(), destination, identity="", budget_bytes=2_000)
    restored, data_state = open_at(tmp_path).restore(abstract(states[2], mesh_of(2, 4)))
    assert_same(restored, states[2])
    assert data_state == {"position": 9}
    assert TreeForm.of(states[2]) == source.form


def test_another_source_does_not_go_on_with_a_half_done_conversion(tmp_path):
    write_ranks(tmp_path / "ranks")
    leaves = RankFiles(tmp_path / "ranks").leaves()
    destination = Destination(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt):
        convert(leaves, destination, identity="a", budget_bytes=100_000, progress=interrupt)
    with pytest.raises(InputError, match="a half-done conversion of the same source"):
        convert(leaves, destination, identity="b", budget_bytes=100_000)
    convert(leaves, destination, identity="a", budget_bytes=100_000)
    with pytest.raises(InputError, match="a step that does not exist yet"):
        convert(leaves, destination, identity="a", budget_bytes=100_000)


@pytest.mark.parametrize("name", ["..", ".", ""])
def test_a_name_cannot_lead_out_of_the_step(tmp_path, name):
    with pytest.raises(InputError, match="paths that can be a folder's name"):
        convert({name: np.zeros(2)}, Destination(tmp_path, 1), identity="", budget_bytes=1000)
    assert not list(tmp_path.iterdir())


def interrupt(done, total):
    raise KeyboardInterrupt


def test_a_second_writer_is_kept_out(tmp_path):
    write_ranks(tmp_path / "ranks")
    leaves = RankFiles(tmp_path / "ranks").leaves()
    seen = []

    def start_another(done, total):
        with pytest.raises(InputError, match="into which no other process is converting"):
            convert(leaves, Destination(tmp_path, 1), identity="", budget_bytes=100_000)
        seen.append(done)

    first = Destination(tmp_path, 1)
    convert(leaves, first, identity="", budget_bytes=100_000, progress=start_another)
    assert seen and manifest.find_damage(tmp_path / "1", lambda name: True) is None


def test_a_disk_that_is_full_is_named_and_the_conversion_goes_on_later(tmp_path, monkeypatch):
    wanted = write_ranks(tmp_path / "ranks")
    leaves = RankFiles(tmp_path / "ranks").leaves()

    def full(*_):
        raise ValueError("Error writing [tensorstore_spec='...' os_error_code='28']")

    destination = Destination(tmp_path, 1)
    with monkeypatch.context() as patched:
        patched.setattr(conversion, "_write", full)
        with pytest.raises(InputError, match=f"a folder in which {tmp_path}/1 can be written"):
            convert(leaves, destination, identity="", budget_bytes=100_000)
    convert(leaves, destination, identity="", budget_bytes=100_000)
    assert_equal(read(tmp_path / "1"), wanted)


def test_a_rank_of_another_checkpoint_is_found_by_what_all_ranks_hold(tmp_path):
    write_ranks(tmp_path / "ranks")
    last = tmp_path / "ranks" / "expert=1,tensor=1.npz"
    arrays = dict(np.load(last))
    np.savez(last, w1=arrays["w1"], norm=arrays["norm"] + 1)
    leaves = RankFiles(tmp_path / "ranks").leaves()
    with pytest.raises(InputError, match=r"norm.*expert=0, tensor=0 and .*expert=1, tensor=1"):
        convert(leaves, Destination(tmp_path, 1), identity="", budget_bytes=100_000)
    assert not (tmp_path / "1").exists()


SCRIPT = """
import sys
from pathlib import Path
from jaxscale.checkpoint.conversion import Destination, convert
from jaxscale.checkpoint.rank_files import RankFiles
leaves = RankFiles(Path(sys.argv[1])).leaves()
print("ready", flush=True)
convert(leaves, Destination(Path(sys.argv[2]), 1), identity="", budget_bytes=40_000)
"""


def kill_while_converting(source, directory, delay_s):
    """Kills a conversion `delay_s` after it began; says whether it had ended."""
    command = [sys.executable, "-c", SCRIPT, str(source), str(directory)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
    return process.returncode == 0


@pytest.mark.long
@pytest.mark.processes
def test_a_conversion_that_is_killed_goes_on_and_is_whole(tmp_path):
    wanted = write_ranks(tmp_path / "ranks")
    draw = np.random.default_rng(0)
    num_pieces = []
    for _ in range(5):
        kill_while_converting(tmp_path / "ranks", tmp_path, draw.uniform(0, 0.15))
        # A conversion that has ended on a fast machine has its pieces in the step's folder.
        num_pieces.append(len(list(tmp_path.glob("1*/state/w1/[0-9]*"))))
    assert num_pieces == sorted(num_pieces) and num_pieces[-1] > 0
    if not (tmp_path / "1").exists():
        leaves = RankFiles(tmp_path / "ranks").leaves()
        convert(leaves, Destination(tmp_path, 1), identity="", budget_bytes=40_000)
    assert_equal(read(tmp_path / "1"), wanted)


# What per-rank files may hold


def test_arrays_are_read_in_part_and_bfloat16_survives(tmp_path):
    whole = np.arange(12).reshape(3, 4).astype(ml_dtypes.bfloat16)
    columns = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    np.savez(
        tmp_path / "all.npz",
        whole=whole,
        columns=columns,
        scalar=np.float64(2.5),
        empty=np.zeros((0, 2)),
    )
    arrays = npz_arrays(tmp_path / "all.npz")
    np.testing.assert_array_equal(arrays["whole"][1:, :2], whole[1:, :2])
    np.testing.assert_array_equal(arrays["columns"][:, 1:], columns[:, 1:])
    assert arrays["whole"].dtype == ml_dtypes.bfloat16
    assert arrays["scalar"][()] == 2.5 and arrays["empty"][:].shape == (0, 2)


def python_objects(folder):
    np.savez(folder / "all.npz", w=np.array([{"a": 1}], dtype=object))


def texts(folder):
    np.savez(folder / "all.npz", w=np.array(["a", "b"]))


def big_endian(folder):
    np.savez(folder / "all.npz", w=np.arange(3, dtype=">f4"))


def two_ranks_of_one_axis(folder):
    np.savez(folder / "tensor=0,tensor=1.npz", w=np.zeros(2))


def compressed(folder):
    np.savez_compressed(folder / "all.npz", w=np.zeros(100))


def cut_short(folder):
    np.savez(folder / "all.npz", w=np.zeros(100))
    os.truncate(folder / "all.npz", 600)


def no_array(folder):
    with zipfile.ZipFile(folder / "all.npz", "w") as archive:
        archive.writestr("w.npy", b"no array at all")


def an_array_twice(folder):
    with zipfile.ZipFile(folder / "all.npz", "w") as archive:
        for name in ("w", "w.npy"):
            with archive.open(name, "w") as member:
                np.save(member, np.zeros(2))


def a_header_without_end(folder):
    np.savez(folder / "all.npz", w=np.zeros(2))
    content = (folder / "all.npz").read_bytes()
    (folder / "all.npz").write_bytes(content.replace(b"(2,), }", b"(2,),  "))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (an_array_twice, "one array of that name"),
        (a_header_without_end, "an array"),
        (python_objects, "object.*an array of little-endian numbers"),
        (texts, "an array of little-endian numbers"),
        (big_endian, "w: given '>f4', expected an array of little-endian numbers"),
        (two_ranks_of_one_axis, "one rank of tensor"),
        (compressed, "an uncompressed member"),
        (cut_short, "a sound zip archive"),
        (no_array, "an array"),
    ],
)
def test_a_file_that_cannot_be_read_in_part_is_refused(tmp_path, write, message):
    write(tmp_path)
    with pytest.raises(InputError, match=message):
        RankFiles(tmp_path).leaves()
