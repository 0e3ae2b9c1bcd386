"""Writing to pages against numpy; the GPU kernel is interpreted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.kernels.page_write.api import BACKENDS, page_write, refusal
from tests.kernels.interpretation import INTERPRET, lower_for_gpu

IS_NEW = jax.__version_info__ >= (0, 11)
PAGES, SIZE, K, H = 5, 64, 2, 64


def draw(num_tokens, dtype):
    """(pages, new keys and values, slots): some other pages, and two tokens side by side."""
    rng = np.random.default_rng(0)
    pages = [rng.normal(size=(PAGES, SIZE, K, H)) for _ in range(2)]
    new = [rng.normal(size=(num_tokens, K, H)) for _ in range(2)]
    slots = rng.permutation(PAGES * SIZE)[:num_tokens]
    slots[:2] = 130, 131
    pages, new = (tuple(jnp.asarray(each, dtype) for each in both) for both in (pages, new))
    return pages, new, jnp.asarray(slots, jnp.int32)


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize(("num_tokens", "dtype"), [(24, "bfloat16"), (2, "float8_e4m3fn")])
def test_new_keys_and_values_are_in_their_slots_and_nowhere_else(implementation, num_tokens, dtype):
    if implementation == "mosaic" and not IS_NEW:
        pytest.skip("the kernel needs jax 0.11")
    pages, new, slots = draw(num_tokens, dtype)
    interpret = INTERPRET if implementation == "mosaic" else False
    found = page_write(pages, new, slots, implementation=implementation, interpret=interpret)
    for before, x, after in zip(pages, new, found, strict=True):
        wanted = np.array(before).reshape(-1, K, H)
        wanted[np.asarray(slots)] = np.asarray(x)
        np.testing.assert_array_equal(np.asarray(after).reshape(-1, K, H), wanted)


def test_what_the_kernel_cannot_do_is_said():
    (k_pages, v_pages), new, slots = draw(4, "bfloat16")
    assert "16 bytes" in refusal("mosaic", k_pages[..., :4])
    with pytest.raises(ValueError, match="one type"):
        page_write((k_pages, v_pages.astype("float32")), new, slots, implementation="reference")
    with pytest.raises(ValueError, match=r"\[T, K, H\]"):
        page_write((k_pages, v_pages), new, slots[:3], implementation="reference")


@pytest.mark.skipif(not IS_NEW, reason="the kernel needs jax 0.11")
def test_it_lowers_for_a_gpu_and_writes_in_place():
    def run(pages, new, slots):
        return page_write(pages, new, slots, implementation="mosaic")

    text = lower_for_gpu(run, *draw(8, "bfloat16"))
    assert "mosaic_gpu" in text
    assert "output_operand_alias" in text
