"""Folders of safetensors: as the format's own library reads and writes them, and damaged ones."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxscale.checkpoint.safetensors import INDEX, NewTensor, SafetensorsSource, write_safetensors
from jaxscale.types import InputError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def arrays():
    rng = np.random.default_rng(0)
    return {
        "a": rng.normal(size=(3, 4)).astype(np.float32),
        "b": rng.integers(-9, 9, (2, 5, 1)),
        "c": rng.normal(size=7).astype(BFLOAT16),
        "empty": np.zeros((0, 3), np.float16),
        "scalar": np.float64(3.5) * np.ones(()),
    }


def write(folder, max_shard_bytes=10**6):
    tensors = [
        NewTensor(name, array.shape, array.dtype, lambda array=array: array)
        for name, array in arrays().items()
    ]
    write_safetensors(folder, tensors, max_shard_bytes=max_shard_bytes)


def assert_equal(leaves):
    assert set(leaves) == set(arrays())
    for name, array in arrays().items():
        got = leaves[name][()]
        assert (got.dtype, got.shape) == (array.dtype, array.shape)
        assert got.tobytes() == array.tobytes(), name


def test_the_formats_own_library_reads_what_is_written_and_writes_what_is_read(tmp_path):
    write(tmp_path)
    read = load_file(tmp_path / "model.safetensors")
    assert_equal(read)
    save_file(read, tmp_path / "model.safetensors")
    assert_equal(SafetensorsSource(tmp_path).leaves())


def test_shards_have_an_index_and_boxes_are_read(tmp_path):
    write(tmp_path, max_shard_bytes=60)
    places = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    assert len(set(places.values())) == 3 and not (tmp_path / "model.safetensors").exists()
    leaves = SafetensorsSource(tmp_path).leaves()
    assert_equal(leaves)
    np.testing.assert_array_equal(leaves["a"][1:, 2:3], arrays()["a"][1:, 2:3])


def header_of(file):
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def damage(change):
    """Writes the file again with another header."""

    def damaged(folder):
        file = folder / "model.safetensors"
        header, rest = header_of(file)
        text = json.dumps(change(header) or header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + rest)

    return damaged


def cut(num_bytes):
    def damaged(folder):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:num_bytes])

    return damaged


def twice(folder):
    file = folder / "model.safetensors"
    text = b'{"a": 1, "a": 2}'
    file.write_bytes(len(text).to_bytes(8, "little") + text)


DAMAGES = {
    "truncated": (cut(-3), r"safetensors: scalar: .*truncated to"),
    "in the header": (cut(50), "a header that fits"),
    "too short": (cut(3), "a header that fits"),
    "longer": (damage(lambda h: h.pop("scalar") and None), "as its header says"),
    "overlap": (damage(lambda h: h["b"].update(data_offsets=[40, 120])), "where the tensor before"),
    "outside": (damage(lambda h: h["a"].update(data_offsets=[-8, 40])), "first and last"),
    "shape": (damage(lambda h: h["a"].update(shape=[3, 5])), r"a: given '48 bytes'"),
    "huge": (damage(lambda h: h["a"].update(shape=[2**62, 2**62])), r"a: given '48 bytes'"),
    "dtype": (damage(lambda h: h["a"].update(dtype="F4")), "a: dtype: given 'F4'"),
    "entry": (damage(lambda h: h.update(a=3)), "a: given 3, expected a type"),
    "list": (damage(lambda h: [1]), "a JSON object"),
    "twice": (twice, "a name stands twice"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_refused_by_name(tmp_path, name):
    change, message = DAMAGES[name]
    write(tmp_path)
    change(tmp_path)
    with pytest.raises(InputError, match=message):
        SafetensorsSource(tmp_path)


def index(change):
    def damaged(folder):
        values = json.loads((folder / INDEX).read_text())
        change(values["weight_map"])
        (folder / INDEX).write_text(json.dumps(values))

    return damaged


def remove_shard(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()


SHARD_DAMAGES = {
    "missing shard": (remove_shard, r"b: given 'model-00002.*the shard is missing"),
    "escape": (index(lambda m: m.update(a="../a.safetensors")), "a file in the same folder"),
    "absent tensor": (index(lambda m: m.update(z=m["a"])), "z: given None"),
    "extra tensor": (index(lambda m: m.pop("scalar")), "scalar: given"),
}


@pytest.mark.parametrize("name", SHARD_DAMAGES)
def test_shards_that_contradict_their_index_are_refused(tmp_path, name):
    change, message = SHARD_DAMAGES[name]
    write(tmp_path, max_shard_bytes=60)
    change(tmp_path)
    with pytest.raises(InputError, match=message):
        SafetensorsSource(tmp_path)


def test_a_file_that_becomes_shorter_is_refused(tmp_path):
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    new = NewTensor("a", values.shape, values.dtype, lambda: values)
    write_safetensors(tmp_path, [new], max_shard_bytes=1000)
    leaf = SafetensorsSource(tmp_path).leaves()["a"]
    np.testing.assert_array_equal(leaf[()], values)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(InputError, match="become shorter', expected 48 bytes"):
        leaf[()]


def test_pickled_weights_are_no_source(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="no other form of weights is read"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize("sizes", [(16, 1000), (1000, 16)])
def test_other_weights_in_the_same_folder_are_gone(tmp_path, sizes):
    """An index, or one file beside it, is read first by some reader."""
    for value, max_shard_bytes in enumerate(sizes):
        values = np.full(4, value, np.float32)
        tensors = [NewTensor(name, (4,), values.dtype, lambda v=values: v) for name in "ab"]
        write_safetensors(tmp_path, tensors, max_shard_bytes=max_shard_bytes)
    assert SafetensorsSource(tmp_path).leaves()["a"][:].tolist() == [1, 1, 1, 1]
    assert (tmp_path / INDEX).exists() != (tmp_path / "model.safetensors").exists()


def test_shards_of_two_models_are_never_one(tmp_path):
    """Where a process is killed between them the index that was there would name both."""

    def model(value, make_last):
        first = NewTensor("a", (4,), np.dtype("f4"), lambda: np.full(4, value, np.float32))
        return [first, NewTensor("b", (4,), np.dtype("f4"), make_last)]

    def interrupt():
        raise KeyboardInterrupt

    write_safetensors(tmp_path, model(0, lambda: np.zeros(4)), max_shard_bytes=16)
    with pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path, model(1, interrupt), max_shard_bytes=16)
    with pytest.raises(InputError, match=r"a folder with model\.safetensors or"):
        SafetensorsSource(tmp_path)
