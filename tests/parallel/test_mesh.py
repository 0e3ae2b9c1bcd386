"""The mesh's configuration: each misfit is refused with the equation that fails."""

import jax
import numpy as np
import pytest

from jaxscale.models.config.facts import from_flat
from jaxscale.models.parameters import parameter_table
from jaxscale.parallel.mesh import AXES, MeshConfig, check_batch, make_mesh
from jaxscale.parallel.rules import make_specs
from jaxscale.types import InputError

MODEL = dict(
    vocab_size=64,
    num_layers=2,
    model_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=32,
    max_length=16,
)


def message_of(function, *arguments, **settings):
    with pytest.raises(InputError) as error:
        function(*arguments, **settings)
    return str(error.value)


@pytest.mark.parametrize(
    "sizes, message",
    [
        (
            dict(sequence=4, ring=3),
            "MeshConfig.ring: given 3, expected sequence % ring == 0, but 4 % 3 = 1; "
            "nearest: 2 or 4",
        ),
        (
            dict(schedule="2f2b"),
            "MeshConfig.schedule: given '2f2b', expected one of 'gpipe', '1f1b'",
        ),
        (
            dict(num_chunks=2),
            'MeshConfig.num_chunks: given 2, expected 1 unless schedule is "interleaved"',
        ),
        (
            dict(zero_axes=("tensor",)),
            "MeshConfig.zero_axes: given ('tensor',), expected one of ('data',)",
        ),
        (dict(data=0), "MeshConfig.data: given 0, expected a number above 0"),
        (dict(tensor=-2), "MeshConfig.tensor: given -2, expected a number above 0"),
        (dict(data=2.0), "MeshConfig.data: given 2.0, expected a value of type int"),
        (dict(zero=4), "MeshConfig.zero: given 4, expected 0, 1, 2 or 3"),
    ],
)
def test_a_wrong_axis_is_named(sizes, message):
    assert message in message_of(MeshConfig, **sizes)


@pytest.mark.parametrize(
    "sizes, product, nearest",
    [
        ((4, 1, 1), 4, "pipeline = 2 or data = 8 or expert = 2 or sequence = 2 or tensor = 2"),
        ((4, 2, 2), 16, "data = 2 or expert = 1 or tensor = 1"),
        ((3, 1, 3), 9, "data = 8 alone"),
    ],
)
def test_sizes_multiply_to_the_number_of_devices(sizes, product, nearest):
    data, expert, tensor = sizes
    message = message_of(make_mesh, MeshConfig(data=data, expert=expert, tensor=tensor))
    assert "pipeline * data * expert * sequence * tensor" in message
    equation = f"1 * {data} * {expert} * 1 * {tensor} = {product}"
    assert f"{equation} to equal the number of devices, 8; nearest: {nearest}" in message


def test_tensor_neighbours_are_neighbouring_devices():
    mesh = make_mesh(MeshConfig(data=2, expert=2, tensor=2))
    assert mesh.axis_names == AXES
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    np.testing.assert_array_equal(ids.reshape(4, 2), np.arange(8).reshape(4, 2))
    assert make_mesh(MeshConfig(data=2), jax.devices()[:2]).devices.size == 2


@pytest.mark.parametrize(
    "change, sizes, message",
    [
        ({"num_heads": 6, "num_kv_heads": 6}, dict(tensor=4), "but 6 % 4 = 2; nearest: 3 or 6"),
        (
            {"num_heads": 6, "num_kv_heads": 3},
            dict(tensor=2),
            "tensor == 0 for layers/0/attention/k, but 3 % 2 = 1; nearest: 1 or 3",
        ),
        (
            # More members than kv heads are equally many for each head, or do not fit.
            {"num_heads": 6, "num_kv_heads": 2, "ffn_dim": 30, "vocab_size": 63},
            dict(tensor=3),
            "tensor == 0 for layers/0/attention/k, but 2 % 3 = 2; nearest: 2",
        ),
        (
            {"ffn_dim": 31},
            dict(tensor=2),
            "ffn_dim % tensor == 0 for layers/0/ffn/down, but 31 % 2 = 1; nearest: 1",
        ),
        (
            {"vocab_size": 63},
            dict(tensor=2),
            "vocab_size % tensor == 0 for embedding/tokens, but 63 % 2 = 1",
        ),
        (
            {"moe_pattern": (True,), "num_experts": 6, "expert_dim": 8},
            dict(expert=4),
            "num_experts % expert == 0 for layers/0/moe/experts/down, but 6 % 4 = 2; "
            "nearest: 3 or 6",
        ),
    ],
)
def test_a_model_that_does_not_divide_is_refused(change, sizes, message):
    table = parameter_table(from_flat(**MODEL | change))
    text = message_of(make_specs, table, MeshConfig(**sizes))
    assert message in text
    assert text.startswith("MeshConfig.")


def test_a_batch_that_does_not_divide_is_refused():
    config = MeshConfig(data=2, expert=2, tensor=2)
    check_batch(config, batch_size=24, length=6, num_microbatches=3)
    message = message_of(check_batch, config, batch_size=20, length=6, num_microbatches=3)
    equation = "batch_size % (data * expert * num_microbatches) == 0"
    assert f"{equation}, here 20 % (2 * 2 * 3) = 8; nearest: 12 or 24" in message


@pytest.mark.parametrize(
    ("sizes", "length", "message"),
    [
        (dict(tensor=2), 7, "% (sequence * tensor) == 0, here 7 % (1 * 2) = 1; nearest: 6 or 8"),
        (
            dict(sequence=4, tensor=2),
            30,
            "% (sequence * tensor) == 0, here 30 % (4 * 2) = 6; nearest: 24 or 32",
        ),
        (
            dict(sequence=4, ring=4),
            12,
            "% (2 * ring) == 0, here 12 % (2 * 4) = 4; nearest: 8 or 16",
        ),
    ],
)
def test_a_length_that_does_not_divide_is_refused(sizes, length, message):
    config = MeshConfig(**sizes)
    text = message_of(check_batch, config, batch_size=8, length=length, num_microbatches=1)
    assert text.startswith("DataConfig.sequence_length")
    assert f"sequence_length {message}" in text
