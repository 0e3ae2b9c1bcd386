"""Meshes of the devices that are left; tests/run/test_elastic.py trains on one."""

import math

import pytest

from jaxscale.parallel.elastic import shrink
from jaxscale.parallel.mesh import MeshConfig, check_batch
from jaxscale.types import InputError

MESH = MeshConfig(pipeline=2, data=4, tensor=2, zero=2)


@pytest.mark.parametrize(
    ("num_devices", "data", "num_microbatches"),
    [(16, 4, 2), (20, 4, 2), (15, 2, 4), (12, 2, 4), (8, 2, 4), (7, 1, 8), (4, 1, 8)],
)
def test_data_shrinks_and_micro_batches_keep_the_rows(num_devices, data, num_microbatches):
    """Of 12 devices three data ranks would have room, but do not divide 16 rows."""
    got = shrink(MESH, num_devices, batch_size=16, num_microbatches=2)
    assert got.mesh == MeshConfig(pipeline=2, data=data, tensor=2, zero=2)
    assert got.num_microbatches == num_microbatches


def test_whatever_is_left_the_batch_fits_and_no_device_has_more_rows_at_a_time():
    for batch_size in (16, 24, 48):
        for num_devices in range(4, 17):
            got = shrink(MESH, num_devices, batch_size=batch_size, num_microbatches=2)
            assert math.prod(got.mesh.sizes) <= num_devices
            check_batch(
                got.mesh,
                batch_size=batch_size,
                length=8,
                num_microbatches=got.num_microbatches,
            )
            rows = batch_size / (got.mesh.data * got.num_microbatches)
            assert rows <= batch_size / (4 * 2)


def test_too_few_devices_for_the_model_are_refused_with_meshes_that_fit():
    message = r"= 4 devices or more .* with 3; nearest: pipeline = 1 with data = 1 or tensor = 1"
    with pytest.raises(InputError, match=message):
        shrink(MESH, 3, batch_size=16, num_microbatches=2)
    wide = MeshConfig(tensor=8)  # heads that 8 ranks divide are not divided by 7
    with pytest.raises(InputError, match=r"nearest: tensor = 4 with data = 1$"):
        shrink(wide, 7, batch_size=16, num_microbatches=2)
