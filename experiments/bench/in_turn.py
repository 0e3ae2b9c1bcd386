"""Run the commands of lists, as many at once as there are GPUs for, and print one table at the end.

python experiments/bench/in_turn.py experiments/bench/one_gpu_open.txt --output runs/one_gpu

A line of a list is NAME | NEEDS | COMMAND, run by bash; NEEDS is "1 GPU, 90 s, at most 150 s": what
it takes, its foretold seconds, and those after which it is killed with all that it has started. A
line without NEEDS takes all GPUs and as long as there is time. Lines begin in their order, each as
soon as enough GPUs are free; one whose foretold seconds are no longer there is left out.

A GPU runs one command at a time, compilation included: XLA chooses matmul algorithms by timing them
on it, and beside another program it chooses slow ones. But where there are two GPUs, commands for
one run beside each other, each on its GPU and its share of the host's cores; they share the host's
memory, disk and PCIe, and the machine may have other users whom this program cannot see. A page of
results says which lines ran beside others: the table marks them. A line that takes all GPUs has
nothing of this list beside it.

Of each command `--output` keeps NAME.txt, which it printed, and NAME/, which it finds as $FILES;
results.jsonl grows as commands end. What is done by it is not run again: a call goes on where one
before it ended.
"""

import argparse
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import time
import uuid
from pathlib import Path

NEEDS = r"(?P<gpus>\d+) GPUs?, (?P<foretold>\d+) s(?:, at most (?P<most>\d+) s)?"
LINE = re.compile(rf"(?P<name>[^|]+?) *\| *(?:{NEEDS} *\| *)?(?P<command>.+)")
MARK = "IN_TURN_COMMAND"  # a variable by which a command's processes are known, also torchrun's
TABLE_CHARACTERS = 9000
POLL_S = 0.1


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a list; no GPUs means all."""

    name: str
    command: str
    gpus: int | None = None
    foretold_s: float = 0
    most_s: float = float("inf")

    @property
    def file_name(self):
        """The name in letters, digits, dashes and underscores."""
        return re.sub(r"[^\w-]+", "_", self.name)


@dataclasses.dataclass
class Running:
    """A command that has begun on some GPUs."""

    line: Line
    gpus: tuple[int, ...]
    process: subprocess.Popen
    mark: str
    log: Path
    began: float
    is_beside: bool = False

    def ending(self, now, ends):
        """How it ended; None while it runs. What has no time left is killed."""
        code = self.process.poll()
        if code is not None:
            return "done" if code == 0 else f"failed, {code}"
        if now < min(self.began + self.line.most_s, ends):
            return None
        return "killed"


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("lists", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="*", help="names to run; all by default")
    parser.add_argument("--limit-s", type=float, default=3600, help="for all")
    return parser.parse_args()


def read_lines(path, only=None):
    """The lines of a list, or those whose names are given."""
    lines = []
    for text in path.read_text().splitlines():
        if not text.strip() or text.startswith("#"):
            continue
        found = LINE.fullmatch(text.strip())
        if found is None or found["command"][0].isdigit():
            raise SystemExit(f"{path}: expected NAME | 1 GPU, 90 s | COMMAND, given {text!r}")
        gpus, most = found["gpus"], float(found["most"] or "inf")
        needs = gpus and int(gpus), float(found["foretold"] or 0), most
        lines.append(Line(found["name"], found["command"], *needs))
    return [line for line in lines if not only or line.name in only]


def count_gpus():
    """As many as `nvidia-smi` lists; 1 where it is not there, so that a list can be tried."""
    if shutil.which("nvidia-smi") is None:
        return 1
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    print(listed.stdout, end="", flush=True)
    return len(listed.stdout.splitlines())


def start(line, gpus, num_gpus, output):
    """Start a command on some of the GPUs, with as large a share of the cores."""
    log, mark = output / f"{line.file_name}.txt", uuid.uuid4().hex
    files = output / line.file_name
    files.mkdir(exist_ok=True)
    environment = {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path.cwd()), os.getenv("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
        "JAX_COMPILATION_CACHE_DIR": str(output.absolute() / "cache"),
        "FILES": str(files.absolute()),
        MARK: mark,
    }
    if len(gpus) < num_gpus or line.gpus == 1:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    cores = sorted(os.sched_getaffinity(0))
    share = max(len(cores) // num_gpus, 1)
    own = [core for gpu in gpus for core in cores[gpu * share : (gpu + 1) * share]] or cores
    with log.open("w") as file:
        process = subprocess.Popen(
            ["bash", "-c", line.command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            process_group=0,
            preexec_fn=lambda: os.sched_setaffinity(0, own),
        )
    return Running(line, gpus, process, mark, log, time.monotonic())


def processes_with(mark):
    """The processes that have inherited a command's variable, whatever group they are in."""
    wanted = f"{MARK}={mark}\0".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted in path.read_bytes():
                yield int(path.parent.name)
        except OSError:  # it has ended, or is another user's
            continue


def kill(running):
    """Kill a command with all that it has started."""
    while found := list(processes_with(running.mark)):
        for process in found:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(POLL_S)
        running.process.poll()


def parsed(text):
    """The object of a JSON line; None for other lines, and for one cut where it was killed."""
    try:
        value = json.loads(text) if text.startswith("{") else None
    except json.JSONDecodeError:
        return None
    return value


def collected(running, ending):
    """The result of a command that has ended: a JSON object for each JSON line, at least one."""
    seconds = round(time.monotonic() - running.began, 1)
    head = {"line": running.line.name, "ending": ending, "seconds": seconds}
    head |= {"gpus": running.gpus, "beside_others": running.is_beside}
    found = map(parsed, running.log.read_text(errors="replace").splitlines())
    print(f"{running.line.name}: {ending} after {seconds:.0f} s", flush=True)
    return [head | figures for figures in found if figures is not None] or [head]


def read_results(output):
    """What the calls before this one have collected."""
    path = output / "results.jsonl"
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def in_short(figures):
    """The numbers and short texts of a JSON line."""
    texts = []
    for name, value in figures.items():
        if isinstance(value, float):
            texts.append(f"{name} {value:.5g}")
        elif isinstance(value, int) or (isinstance(value, str) and len(value) < 40):
            texts.append(f"{name} {value}")
    return ", ".join(texts)


def last_texts(log, num_characters):
    """The last lines that were printed, figures in short, in at most so many characters."""
    texts = []
    for text in reversed(log.read_text(errors="replace").splitlines()):
        figures = parsed(text)
        text = (in_short(figures) if figures else text)[:200]
        num_characters -= len(text) + 5
        if num_characters < 0:
            break
        texts += [f"    {text}"] if text.strip() else []
    return texts[::-1]


def print_table(lines, results, output):
    """A row for each line, and beneath it as much of what it printed last as there is room for."""
    print("\nname | GPUs | seconds of foretold | ending | * ran beside others")
    room = TABLE_CHARACTERS // max(len(lines), 1)
    for line in lines:
        found = [each for each in results if each["line"] == line.name]
        if not found:
            print(f"{line.name[:60]} | left out, foretold {line.foretold_s:.0f} s")
            continue
        last = found[-1]
        gpus = ",".join(map(str, last["gpus"]))
        star = " *" if last["beside_others"] else ""
        row = f"{line.name[:60]} | {gpus} | {last['seconds']:.0f} of {line.foretold_s:.0f}"
        row = f"{row} | {last['ending']}{star}"
        texts = last_texts(output / f"{line.file_name}.txt", room - len(row))
        print("\n".join([row, *texts]), flush=True)


class Lanes:
    """The GPUs, what runs on them, and what has come of it."""

    def __init__(self, output, ends):
        self.output, self.ends = output, ends
        self.num_gpus = count_gpus()
        self.free, self.running = list(range(self.num_gpus)), []
        self.results = read_results(output)

    def begin(self, line):
        """Whether a line has begun; one that needs more GPUs than are free has not."""
        num = line.gpus or self.num_gpus
        if num > len(self.free):
            return False
        gpus, self.free = tuple(self.free[:num]), self.free[num:]
        self.running.append(start(line, gpus, self.num_gpus, self.output))
        for each in self.running:
            each.is_beside |= len(self.running) > 1
        return True

    def end(self, running, ending):
        """Kill what is left of a command, and keep its results."""
        kill(running)
        self.running.remove(running)
        self.free = sorted([*self.free, *running.gpus])
        found = collected(running, ending)
        self.results += found
        with (self.output / "results.jsonl").open("a") as file:
            file.writelines(json.dumps(each) + "\n" for each in found)

    def poll(self):
        """Wait a little, and end what has ended or has no time left."""
        time.sleep(POLL_S)
        for running in list(self.running):
            if ending := running.ending(time.monotonic(), self.ends):
                self.end(running, ending)

    def run(self, lines):
        """Run what is not done yet; lines that there is no time or GPU for are left out."""
        done = {each["line"] for each in self.results if each["ending"] == "done"}
        for line in lines:
            if line.name in done or (line.gpus or 0) > self.num_gpus:
                continue
            while time.monotonic() + line.foretold_s <= self.ends and not self.begin(line):
                self.poll()
        while self.running:
            self.poll()


def main():
    """Run all, and print the table; a signal to end kills what runs and leaves out the rest."""
    options = parse_arguments()
    lines = [line for path in options.lists for line in read_lines(path, options.only)]
    options.output.mkdir(parents=True, exist_ok=True)
    lanes = Lanes(options.output, time.monotonic() + options.limit_s)
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: setattr(lanes, "ends", 0))
    lanes.run(lines)
    print_table(lines, lanes.results, options.output)


if __name__ == "__main__":
    main()
