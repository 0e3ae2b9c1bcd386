"""`plot`: draws the curves of one run, or of several in one picture."""

from pathlib import Path

from jaxscale.evaluate.curves import draw_runs, read_run
from jaxscale.types import InputError

NAME = "curves.png"


def plot(*, runs: tuple[str, ...], output: str | None = None) -> None:
    """Draws loss, held-out figures and learning rate of runs by step, and prints where.

    No device is needed; a run that is still training is drawn as far as it is.

    Args:
        runs: directories of runs.
        output: the picture, .png, .svg or .pdf; None for `curves.png`, in the directory of the run
            or, of several, in the current folder.
    Raises:
        InputError: a directory is no run's, or the picture cannot be written.
    """
    folders = [Path(run).expanduser() for run in runs]
    histories = [read_run(folder) for folder in folders]
    path = Path(output or (folders[0] / NAME if len(folders) == 1 else NAME)).expanduser()
    kinds = (".png", ".svg", ".pdf")
    if path.suffix not in kinds:
        raise InputError("output", str(path), f"a file whose name ends with {', '.join(kinds)}")
    draw_runs(histories, path)
    print(f"curves of {', '.join(map(str, folders))}: {path}")
