"""SIGKILL at random moments of saves and of conversions; nothing committed may be lost.

PYTHONPATH=. python experiments/checkpoints/kills.py --kills 50 /tmp/kills
"""

import argparse
import time
from pathlib import Path

import numpy as np

from jaxscale.checkpoint.conversion import Destination, convert
from jaxscale.checkpoint.rank_files import RankFiles
from tests.checkpoint.test_conversion import (
    assert_equal,
    kill_while_converting,
    read,
    write_ranks,
)
from tests.checkpoint.test_kill import run_kills


def kill_conversions(folder: Path, num_kills: int) -> tuple[int, int]:
    """(processes that SIGKILL ended, conversions that were whole in the end)."""
    wanted = write_ranks(folder / "ranks")
    draw, num_killed, num_whole = np.random.default_rng(0), 0, 0
    for number in range(num_kills):
        directory = folder / str(num_whole)
        num_killed += not kill_while_converting(folder / "ranks", directory, draw.uniform(0, 0.2))
        if (directory / "1").exists() or number + 1 == num_kills:
            if not (directory / "1").exists():
                leaves = RankFiles(folder / "ranks").leaves()
                convert(leaves, Destination(directory, 1), identity="", budget_bytes=40_000)
            assert_equal(read(directory / "1"), wanted)
            num_whole += 1
    return num_killed, num_whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    began = time.perf_counter()
    num_killed, num_whole = kill_conversions(options.folder, options.kills)
    print(f"convert: {num_killed} of {options.kills} killed, {num_whole} whole", flush=True)
    saves = options.folder / "saves"
    saves.mkdir()
    run_kills(saves, options.kills)
    print(f"save: {options.kills} kills, each newest step sound")
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
