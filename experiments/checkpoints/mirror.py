"""Saves to an S3 server, loses the directory, comes back and looks; moto's server is enough:

    pip install 'moto[server]' && moto_server -H 127.0.0.1 -p 5777
    AWS_ACCESS_KEY_ID=x AWS_SECRET_ACCESS_KEY=y PYTHONPATH=. \\
        python experiments/checkpoints/mirror.py http://127.0.0.1:5777
"""

import contextlib
import os
import sys
import tempfile
import urllib.request
from pathlib import Path

from jaxscale import cli
from jaxscale.checkpoint.mirror import MirrorConfig
from tests.checkpoint.states import abstract, assert_same, make_state, mesh_of, open_at


def main() -> None:
    endpoint = sys.argv[1]
    request = urllib.request.Request(f"{endpoint}/bucket", method="PUT")
    urllib.request.urlopen(request).close()
    mirror = MirrorConfig("s3://bucket/runs/main", endpoint=endpoint, region="us-east-1")
    folder = Path(tempfile.mkdtemp())
    states = {step: make_state(mesh_of(1, 1), seed=step) for step in range(1, 5)}
    with contextlib.closing(open_at(folder / "lost", mirror=mirror, keep_last=2)) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state, {"position": step})
    with contextlib.closing(open_at(folder / "new", mirror=mirror)) as checkpoints:
        checkpoints.fetch()
        restored, position = checkpoints.restore(abstract(states[4], mesh_of(1, 1)))
    assert_same(restored, states[4])
    print(f"step {position['position']} came back bit by bit")
    os.environ |= {"AWS_ENDPOINT_URL": endpoint, "AWS_REGION": "us-east-1"}
    for words in (["ls"], ["verify"], ["diff", str(folder / "lost")]):
        assert cli.main(["checkpoint", words[0], mirror.url, *words[1:]]) == 0


if __name__ == "__main__":
    main()
