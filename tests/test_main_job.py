"""The script behind `make train`."""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_an_earlier_run_is_kept_beside_the_new_one(tmp_path, capsys):
    set_aside = runpy.run_path(str(ROOT / "experiments" / "main_job.py"))["set_aside"]
    run = tmp_path / "main_job"
    set_aside(run)
    for number in (1, 2):
        run.mkdir()
        (run / "metrics.jsonl").write_text(str(number))
        set_aside(run)
        assert f"{run} is now {run}.{number}" in capsys.readouterr().out
    assert {path.name: (path / "metrics.jsonl").read_text() for path in tmp_path.iterdir()} == {
        "main_job.1": "1",
        "main_job.2": "2",
    }
