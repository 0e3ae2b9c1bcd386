"""Files of torch.save without torch: tensors of every form, what is hostile, and what we write."""

import os
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxscale.checkpoint.file_array import FileArray
from jaxscale.checkpoint.pickled import Named
from jaxscale.checkpoint.torch_distributed import DistributedCheckpoint
from jaxscale.checkpoint.torch_file import load_torch
from jaxscale.checkpoint.torch_writer import save_torch
from jaxscale.types import InputError

FIXTURES = Path(__file__).with_name("fixtures") / "torch"


def test_tensors_of_every_form_are_those_of_torch():
    content = load_torch(FIXTURES / "tensors.pt")
    wanted = dict(np.load(FIXTURES / "tensors.npz"))
    assert content["step"] == 3 and content["names"] == ["a", ("b", None)]
    assert content["tensors"].keys() == wanted.keys()
    for name, tensor in content["tensors"].items():
        got = tensor[:] if tensor.shape else tensor[()]
        np.testing.assert_array_equal(got.astype(wanted[name].dtype), wanted[name], err_msg=name)
    assert content["tensors"]["half"].dtype == ml_dtypes.bfloat16
    permuted, whole = content["tensors"]["permuted"], wanted["whole"]
    np.testing.assert_array_equal(permuted[1:, :2, 1:3], whole[1:, :2, 1:3])


def test_chunks_of_fsdp_over_tensor_parallelism_make_up_the_tensors():
    leaves = DistributedCheckpoint(FIXTURES / "distributed").leaves()
    wanted = dict(np.load(FIXTURES / "distributed.npz"))
    assert leaves.keys() == wanted.keys()
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(leaf[:], wanted[name], err_msg=name)


def test_a_missing_or_damaged_file_of_chunks_is_named(tmp_path):
    files = {path.name: path.read_bytes() for path in (FIXTURES / "distributed").iterdir()}
    for name in files:
        for content in (None, files[name][: len(files[name]) // 2]):
            folder = tmp_path / f"{name}{content is None}"
            folder.mkdir()
            for other, whole in files.items():
                if other != name:
                    (folder / other).write_bytes(whole)
                elif content is not None:
                    (folder / other).write_bytes(content)
            if name == ".metadata" and content is None:
                continue  # then it is no such checkpoint
            with pytest.raises(InputError, match=name):
                DistributedCheckpoint(folder).leaves()


# Hostile files


class Runs:
    """Calls a function where it is unpickled as usual."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def write_archive(path, pickled, members=()):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, content in members:
            archive.writestr(f"archive/{name}", content)


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_that_a_file_names_is_run(tmp_path, protocol):
    victim = tmp_path / "run"
    hostile = {"step": 1, "model": [Runs(os.system, f"touch {victim}"), Runs(exec, "1 / 0")]}
    write_archive(tmp_path / "hostile.pt", pickle.dumps(hostile, protocol))
    content = load_torch(tmp_path / "hostile.pt")
    assert not victim.exists()
    assert content["step"] == 1
    system = content["model"][0]
    assert isinstance(system, Named) and system.name == "posix.system"


def tensor_pickle(storage_size, offset, size, stride, key="0"):
    """A pickle of one tensor with any numbers, as torch would write it."""

    def tuple_of(*parts):
        return b"(" + b"".join(parts) + b"t"

    def number(n):
        return b"J" + n.to_bytes(4, "little", signed=True)

    def text(string):
        return b"X" + len(string).to_bytes(4, "little") + string.encode()

    storage = tuple_of(
        text("storage"), b"ctorch\nFloatStorage\n", text(key), text("cpu"), number(storage_size)
    )
    arguments = tuple_of(
        storage + b"Q",
        number(offset),
        tuple_of(*map(number, size)),
        tuple_of(*map(number, stride)),
        b"\x89",
        b"N",
    )
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R."


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((4, 0, (4,), (1,)), None),
        ((4, 2, (4,), (1,)), "elements 2 to 6 of 4"),
        ((4, -1, (2,), (1,)), "elements -1 to 1 of 4"),
        ((4, 0, (2, 2), (4, 1)), "has gaps"),
        ((4, 0, (4, 4), (0, 1)), "has gaps"),
        ((1 << 20, 0, (4,), (1,)), "cut short"),
        ((5, 0, (5,), (1,)), "16 bytes of 20"),
        ((4, 0, (4,), (1,), "../1"), "no storage '../1'"),
    ],
)
def test_a_tensor_cannot_reach_past_its_storage(tmp_path, numbers, message):
    padding = ("data/padding", bytes(64))
    write_archive(tmp_path / "a.pt", tensor_pickle(*numbers), [("data/0", bytes(16)), padding])
    if message is None:
        np.testing.assert_array_equal(load_torch(tmp_path / "a.pt")[:], np.zeros(4))
        return
    with pytest.raises(InputError, match=message):
        load_torch(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "pickled",
    [
        b"",
        b"\x80\x02}",
        b"\x80\x02.",
        b"\x80\x02(((((",
        b"\x80\x02u.",
        b"\x80\x02h\x05.",
        b"\x80\x02}]K\x01s.",  # a list as a key
        b"\x80\x02K\x01K\x02R.",  # a call of a number
        b"\x80\x02\x82\x01.",  # a class by number
        b"Ppersistent\n.",
        b"(iposix\nsystem\n.",
    ],
)
def test_a_damaged_pickle_is_refused(tmp_path, pickled):
    write_archive(tmp_path / "a.pt", pickled)
    with pytest.raises(InputError, match=r"a\.pt"):
        load_torch(tmp_path / "a.pt")


def test_a_key_nested_a_million_times_does_not_end_the_process(tmp_path):
    """Its hash would overflow the stack, which no exception tells of."""
    write_archive(tmp_path / "a.pt", b"\x80\x02})" + b"\x85" * 1_000_000 + b"Ns.")
    with pytest.raises(InputError, match="a key of too many parts"):
        load_torch(tmp_path / "a.pt")


def test_a_negated_tensor_is_not_taken_for_its_storage(tmp_path):
    plain = tensor_pickle(4, 0, (4,), (1,))
    negated = plain.removesuffix(b"tR.") + b"}X\x03\x00\x00\x00neg\x88stR."
    write_archive(tmp_path / "a.pt", negated, [("data/0", bytes(16))])
    with pytest.raises(InputError, match=r"but for \['neg'\]"):
        load_torch(tmp_path / "a.pt")


def test_two_members_of_one_name_are_refused(tmp_path):
    write_archive(tmp_path / "a.pt", pickle.dumps({}))
    with zipfile.ZipFile(tmp_path / "a.pt", "a") as archive:
        archive.writestr("other/data.pkl", pickle.dumps({"step": 1}))
    with pytest.raises(InputError, match=r"one member data\.pkl"):
        load_torch(tmp_path / "a.pt")


def test_a_part_does_not_reach_past_its_array(tmp_path):
    (tmp_path / "numbers").write_bytes(np.arange(8.0).tobytes())
    array = FileArray(tmp_path / "numbers", 8, (4,), np.dtype("f8"))
    np.testing.assert_array_equal(array.part(1, (3,))[:], [2, 3, 4])
    for first, number in ((1, 4), (-1, 2)):
        with pytest.raises(InputError, match="an array of 4 elements"):
            array.part(first, (number,))


def test_random_bytes_in_a_pickle_are_read_or_refused(tmp_path):
    sound = (FIXTURES / "distributed" / ".metadata").read_bytes()
    draw = np.random.default_rng(0)
    num_refused = 0
    for _ in range(100):
        damaged = bytearray(sound)
        for at in draw.integers(0, len(damaged), 3):
            damaged[at] = draw.integers(256)
        (tmp_path / ".metadata").write_bytes(damaged)
        try:
            DistributedCheckpoint(tmp_path).leaves()
        except InputError:
            num_refused += 1
    assert num_refused == 100  # its files are missing, too


def test_metadata_cannot_lead_out_of_its_folder(tmp_path):
    hostile = (FIXTURES / "distributed" / ".metadata").read_bytes()
    (tmp_path / "in").mkdir()
    name = b"__0_0.distcp"
    (tmp_path / "in" / ".metadata").write_bytes(hostile.replace(name, b"../../x/y.pt"))
    with pytest.raises(InputError, match="a file in the checkpoint's folder"):
        DistributedCheckpoint(tmp_path / "in").leaves()


# Written files


def test_a_written_file_reads_back_and_is_written_in_pieces(tmp_path):
    draw = np.random.default_rng(0)

    class Recorded:
        """An array that notes the largest piece that is read of it."""

        def __init__(self, whole):
            self.whole, self.shape, self.dtype = whole, whole.shape, whole.dtype
            self.largest = 0

        def __getitem__(self, index):
            piece = self.whole[index]
            self.largest = max(self.largest, piece.nbytes)
            return piece

    whole = Recorded(draw.normal(size=(5, 6, 7)).astype(ml_dtypes.bfloat16))
    values = ["text", (1, -300, 1 << 40, 2.5, None, True), {}]
    content = {"w": whole, "scalar": np.array(3.0), "values": values}
    save_torch(tmp_path / "w.pt", content, piece_bytes=100)
    got = load_torch(tmp_path / "w.pt")
    np.testing.assert_array_equal(got["w"][:], whole.whole)
    assert got["w"].dtype == ml_dtypes.bfloat16 and got["scalar"][()] == 3.0
    assert got["values"] == values
    assert 0 < whole.largest <= 100


def test_a_written_file_is_what_torch_reads(tmp_path):
    torch = pytest.importorskip("torch")
    save_torch(tmp_path / "w.pt", {"w": np.arange(6.0).reshape(2, 3)}, piece_bytes=8)
    read = torch.load(tmp_path / "w.pt", weights_only=True)
    np.testing.assert_array_equal(read["w"].numpy(), np.arange(6.0).reshape(2, 3))
