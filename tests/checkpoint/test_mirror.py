"""Steps in an object store: a small server of the S3 protocol stands in for one.

experiments/checkpoints/mirror.py does the same against any S3 server, such as moto's.
"""

import contextlib
import http.server
import shutil
import threading
import urllib.parse

import numpy as np
import pytest

from jaxscale import cli
from jaxscale.checkpoint.mirror import MARKER, MirrorConfig
from jaxscale.checkpoint.native import NativeCheckpoint
from jaxscale.types import InputError
from tests.checkpoint.states import abstract, assert_same, committed, make_state, mesh_of, open_at

LISTING = "<ListBucketResult><IsTruncated>false</IsTruncated>{}</ListBucketResult>"


class Bucket(http.server.BaseHTTPRequestHandler):
    """One bucket in memory: objects are read, written, deleted and listed."""

    protocol_version = "HTTP/1.1"

    @property
    def key(self):
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        return path.removeprefix("/bucket/")

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.log.append(self.key)
        if self.server.is_full:
            self.answer(403, b"")
            return
        self.server.objects[self.key] = body
        self.answer(200, b"")

    def do_GET(self):
        query = urllib.parse.parse_qs(urllib.parse.urlparse(self.path).query)
        if "list-type" in query:
            prefix = query.get("prefix", [""])[0]
            keys = sorted(key for key in self.server.objects if key.startswith(prefix))
            contents = "".join(f"<Contents><Key>{key}</Key></Contents>" for key in keys)
            self.answer(200, LISTING.format(contents).encode())
        elif self.key in self.server.objects:
            self.answer(200, self.server.objects[self.key])
        else:
            self.answer(404, b"")

    def do_HEAD(self):
        self.answer(200, b"")

    def do_DELETE(self):
        self.server.log.append(f"-{self.key}")
        self.server.objects.pop(self.key, None)
        self.answer(204, b"")

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", str(len(body)))
        self.send_header("x-amz-bucket-region", "here")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    server.objects, server.log, server.is_full = {}, [], False
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def mirror_of(server):
    endpoint = f"http://127.0.0.1:{server.server_port}"
    return MirrorConfig("s3://bucket/runs/main", endpoint=endpoint, region="here")


def save(directory, server, *steps, **settings):
    """Saves a state of another seed at each step; returns them."""
    states = {}
    with contextlib.closing(
        open_at(directory, mirror=mirror_of(server), **settings)
    ) as checkpoints:
        for step in steps:
            states[step] = make_state(mesh_of(1, 1), seed=step)
            checkpoints.save(step, states[step], {"position": step})
    return states


def test_a_step_comes_back_after_its_directory_is_lost(tmp_path, server):
    states = save(tmp_path / "lost", server, 1, 2)
    shutil.rmtree(tmp_path / "lost")
    with contextlib.closing(open_at(tmp_path / "new", mirror=mirror_of(server))) as checkpoints:
        assert checkpoints.latest_step() is None
        checkpoints.fetch()
        assert checkpoints.latest_step() == 2
        restored, position = checkpoints.restore(abstract(states[2], mesh_of(2, 2)))
    assert_same(restored, states[2])
    assert position == {"position": 2}


def test_a_step_is_there_once_its_marker_is_and_gone_before_its_files_are(tmp_path, server):
    save(tmp_path, server, 1, 2, keep_last=1)
    assert committed(tmp_path) == [2]
    assert {key.split("/")[2] for key in server.objects} == {"2"}
    written = [key for key in server.log if key.startswith("runs/main/1/")]
    assert written[-1] == f"runs/main/1/{MARKER}"
    deleted = [key for key in server.log if key.startswith("-")]
    assert deleted[0] == f"-runs/main/1/{MARKER}"


def test_a_step_without_a_marker_does_not_exist(tmp_path, server):
    save(tmp_path / "first", server, 1, 2)
    del server.objects[f"runs/main/2/{MARKER}"]
    with contextlib.closing(open_at(tmp_path / "new", mirror=mirror_of(server))) as checkpoints:
        checkpoints.fetch()
    assert committed(tmp_path / "new") == [1]


def test_a_directory_that_is_as_new_is_left_alone(tmp_path, server):
    save(tmp_path, server, 1, 2)
    names = sorted(path.name for path in tmp_path.iterdir())
    with contextlib.closing(open_at(tmp_path, mirror=mirror_of(server))) as checkpoints:
        checkpoints.fetch()
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_damaged_object_is_named(tmp_path, server):
    save(tmp_path / "first", server, 1)
    key = "runs/main/1/state/params.embed/0.0"
    server.objects[key] = server.objects[key][:-1] + b"?"
    checkpoints = open_at(tmp_path / "new", mirror=mirror_of(server))
    with pytest.raises(InputError, match=r"a sound step 1; .*params.embed/0.0"):
        checkpoints.fetch()
    assert committed(tmp_path / "new") == []
    checkpoints.save(2, make_state(mesh_of(1, 1)), {})
    checkpoints.close()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["2"]


def test_a_store_that_refuses_is_named_and_the_local_step_is_kept(tmp_path, server):
    server.is_full = True
    checkpoints = open_at(tmp_path, mirror=mirror_of(server))
    checkpoints.save(1, make_state(mesh_of(1, 1)), {})
    with pytest.raises(InputError, match=r"s3://bucket/runs/main.*a store that can be read and"):
        checkpoints.wait()
    checkpoints.close()
    assert committed(tmp_path) == [1]


def test_the_command_reads_steps_in_a_store(tmp_path, server, monkeypatch, capsys):
    states = save(tmp_path / "run", server, 1, 2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", mirror_of(server).endpoint)
    monkeypatch.setenv("AWS_REGION", "here")
    url = "s3://bucket/runs/main"
    assert cli.main(["checkpoint", "ls", url]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == [f"{url}/1", f"{url}/2"]
    assert cli.main(["checkpoint", "show", f"{url}/1"]) == 0
    assert "params/embed " in capsys.readouterr().out
    assert cli.main(["checkpoint", "verify", url]) == 0
    assert cli.main(["checkpoint", "diff", f"{url}/2", str(tmp_path / "run" / "2")]) == 0
    assert cli.main(["checkpoint", "convert", url, str(tmp_path / "converted")]) == 0
    leaves = NativeCheckpoint(tmp_path / "converted" / "2").leaves()
    want = np.asarray(states[2]["params"]["embed"])
    np.testing.assert_array_equal(leaves["params/embed"][:], want)

    key = "runs/main/2/state/params.embed/0.0"
    server.objects[key] = server.objects[key][:-1] + b"?"
    assert cli.main(["checkpoint", "verify", url]) == 2
    assert "leaf params/embed: state/params.embed/0.0 has" in capsys.readouterr().err
    del server.objects[f"runs/main/2/{MARKER}"]
    assert cli.main(["checkpoint", "show", f"{url}/2"]) == 2
    assert "a step of jaxscale that is whole" in capsys.readouterr().err
    assert cli.main(["checkpoint", "convert", f"{url}/1", "s3://bucket/other"]) == 2


@pytest.mark.parametrize("url", ["bucket/path", "ftp://bucket/path", "s3://", "s3:///"])
def test_an_url_of_no_store_is_refused(url):
    with pytest.raises(InputError, match="s3://BUCKET/PATH or gs://BUCKET/PATH"):
        MirrorConfig(url)
