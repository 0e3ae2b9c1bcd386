"""Ray Serve as the distributed engine, where Ray is installed."""

import importlib.util
import json
import os
import socket
import urllib.request
from pathlib import Path

import pytest

from tests.run.test_model import loaded, run  # noqa: F401

ray = pytest.importorskip("ray", reason="ray[serve] is not installed")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_replica_answers_behind_rays_proxy(run):  # noqa: F811
    from ray import serve

    path = ROOT / "experiments" / "serving_ray.py"
    spec = importlib.util.spec_from_file_location("serving_ray", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [run.directory, "--replicas=1", "--gpus=0", "--num-blocks=16", f"--port={port}"]
    options = script.parse(words)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": environment})
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(script.deployment(options), name="jaxscale")
        body = dict(model=Path(run.directory).name, prompt="def f", max_tokens=4, temperature=0)
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps(body | {"stream": True}).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            assert response.read().endswith(b"data: [DONE]\n\n")
    finally:
        serve.shutdown()
        ray.shutdown()
