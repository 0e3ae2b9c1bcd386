"""Replicas behind nginx, with the configuration that users are given."""

import contextlib
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

httpx = pytest.importorskip("httpx", reason="the extra `test`")
pytest.importorskip("uvicorn", reason="the extra `serve`")
from tests.serve.test_server import complete, continued, events, running  # noqa: E402

NGINX = shutil.which("nginx")
CONFIGURATION = Path(__file__).resolve().parents[2] / "experiments" / "serving_nginx.conf"


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def configured(folder, ports):
    """The configuration with other ports: of nginx, and of two replicas."""
    text = CONFIGURATION.read_text()
    changes = {f"127.0.0.1:{8000 + i}": f"127.0.0.1:{port}" for i, port in enumerate(ports)}
    changes["/tmp/jaxscale-nginx.pid"] = str(folder / "nginx.pid")
    for old, new in changes.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    path = folder / "nginx.conf"
    path.write_text(text)
    return path


def drawn(engines):
    return [engine.figures().num_new_tokens for engine in engines]


@pytest.mark.long
@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
def test_prefixes_keep_their_replica_and_another_takes_over_for_one_that_ends(tmp_path):
    with running() as (first, one), contextlib.ExitStack() as stack:
        second, other = stack.enter_context(running())
        replicas = [int(address.rsplit(":", 1)[1]) for address in (first, second)]
        port = free_port()
        path = configured(tmp_path, [port, *replicas])
        with (
            subprocess.Popen([NGINX, "-c", path, "-p", tmp_path]) as nginx,
            httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
        ):
            try:
                wait_until_it_answers(client)
                check_replicas(client, (one, other))
                stack.close()  # the second one ends
                for number in range(12):
                    client.headers["x-prefix"] = str(number)
                    assert complete(client).json()["choices"][0]["text"] == continued("def f", 9)[0]
            finally:
                nginx.terminate()


def wait_until_it_answers(client):
    for _ in range(100):
        try:
            assert client.get("/health").status_code == 200
        except httpx.ConnectError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError("nginx does not answer")


def check_replicas(client, engines):
    """Requests of one prefix reach one replica, those of many both; streams pass."""
    found = set()
    for number in range(12):
        client.headers["x-prefix"] = str(number)
        shares = []
        for _ in range(2):
            before = drawn(engines)
            assert complete(client).json()["choices"][0]["text"] == continued("def f", 9)[0]
            shares.append([a > b for a, b in zip(drawn(engines), before, strict=True)])
        assert shares[0] == shares[1]
        found.add(tuple(shares[0]))
    assert found == {(True, False), (False, True)}
    streamed = events(complete(client, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == continued("def f", 9)[0]
