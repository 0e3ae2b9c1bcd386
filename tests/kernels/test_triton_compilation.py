"""Every Triton kernel is compiled for GPUs that are not here, and fits their shared memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxscale.kernels.triton_call import missing

# Bytes that one block may have: CUDA C++ Programming Guide, technical specifications by capability.
SHARED = {"8.0": 163, "8.6": 99, "8.9": 99, "9.0": 227, "10.0": 227, "12.0": 99}


@pytest.mark.long
@pytest.mark.processes
@pytest.mark.skipif(missing() is not None, reason="jax-triton is not installed")
@pytest.mark.parametrize("capability", SHARED)
def test_every_kernel_compiles_and_fits(capability):
    """In a process of its own: where Triton interprets, it does not compile."""
    script = Path(__file__).with_name("compile_triton.py")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(script), capability]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    shared = dict(line.rsplit(": ", 1) for line in done.stdout.splitlines())
    assert len(shared) == 34
    too_much = {name: each for name, each in shared.items() if int(each) > SHARED[capability] << 10}
    assert not too_much
