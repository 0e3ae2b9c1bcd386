"""`checkpoint`: looks at checkpoints of any system, checks, compares and converts them."""

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxscale import tree
from jaxscale.checkpoint import conversion, native
from jaxscale.checkpoint.boxes import boxes
from jaxscale.checkpoint.difference import difference, piece_of
from jaxscale.checkpoint.exports import KINDS, export
from jaxscale.checkpoint.matching import check_leaves
from jaxscale.checkpoint.opening import Opened, open_checkpoint, place_of, steps_in
from jaxscale.checkpoint.patterns import load_rules
from jaxscale.checkpoint.remote import RemotePath
from jaxscale.checkpoint.safetensors import INDEX, SINGLE
from jaxscale.checkpoint.source import LazyArray
from jaxscale.convert.families import BY_MODEL_TYPE
from jaxscale.convert.weights import family_leaves
from jaxscale.models.config.facts import checkpoint_facts
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.run.run import Run, load_run
from jaxscale.train.state import TrainState, run_key
from jaxscale.types import InputError, RunError, check_choice

MOMENTS = {"exp_avg": "mu", "exp_avg_sq": "nu"}  # of other systems, as optax calls them
WEIGHTS = "fp32"
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def ls(path: str) -> None:
    """Prints the checkpoints in a folder: step, kind, arrays and bytes.

    Args:
        path: of a folder of steps, or of one checkpoint; "s3://BUCKET/PATH" is one in a store.
    Raises:
        InputError: there is none.
        RunError: some step cannot be read; the others are printed all the same.
    """
    folder = place_of(path)
    numbers = steps_in(folder)
    if not numbers:
        print(_line(folder))
    num_damaged = 0
    for found in (folder / str(number) for number in numbers):
        try:
            print(_line(found))
        except InputError as error:
            print(f"{found}  {error}")
            num_damaged += 1
    if num_damaged:
        raise RunError(f"{num_damaged} of {len(numbers)} steps cannot be read")


def _line(path: Path | RemotePath) -> str:
    """What `ls` says of one checkpoint."""
    opened = open_checkpoint(path)
    leaves = opened.source.leaves()
    size = sum(map(_num_bytes, leaves.values()))
    return f"{path}  {opened.kind}  {len(leaves)} arrays  {_bytes(size)}"


def show(path: str, rules: str | None = None) -> None:
    """Prints each array of a checkpoint with its type, shape and bytes; reads none of them.

    Args:
        path: of the checkpoint.
        rules: TOML file of rules, see `checkpoint.patterns`.
    Raises:
        InputError: there is none, or its ranks do not make up whole parameters.
    """
    opened = _open(path, rules)
    leaves = opened.source.leaves()
    print(f"{opened.path}: {opened.kind}")
    width = max((len(name) for name in leaves), default=0)
    for name, array in leaves.items():
        shape = ", ".join(map(str, array.shape))
        print(f"  {name:<{width}}  {array.dtype}[{shape}]  {_bytes(_num_bytes(array))}")
    print(f"{len(leaves)} arrays, {_bytes(sum(map(_num_bytes, leaves.values())))}")


def verify(path: str, rules: str | None = None) -> None:
    """Checks a checkpoint whole: checksums where it has them, else that all of it can be read.

    Args:
        path: of the checkpoint.
        rules: as `show`.
    Raises:
        InputError: it is damaged; names the file, or copies that should be equal.
    """
    opened = _open(path, rules)
    opened.check()
    leaves = opened.source.leaves()
    with _bar("verify", leaves) as bar:
        for array in leaves.values():
            for box in boxes(array.shape, piece_of(array)):
                bar.update(array[box].nbytes)
    print(f"{opened.path}: {len(leaves)} arrays are sound")


def convert(
    path: str,
    destination: str,
    *,
    to: str = "jaxscale",
    rules: str | None = None,
    run: str | None = None,
    family: str | None = None,
    step: int | None = None,
    learning_rate: float | None = None,
    budget: str = "4GiB",
) -> None:
    """Writes a checkpoint of any system as one of ours or of another; ours goes on after a kill.

    Args:
        path: of the checkpoint.
        destination: folder of checkpoints.
        to: "jaxscale"; "deepspeed", a universal folder; "safetensors", of which one whole tensor is
            in memory, under the names that the arrays have (`export` writes those of a family of
            Hugging Face); "npz", one uncompressed file.
        rules: as `show`.
        run: gin file of the run that is to start from it; its state says which arrays there must
            be. Without one the arrays are written under the names that they have.
        family: `model_type` of Hugging Face, such as "llama", by whose names the arrays are called;
            with `run`, whose model it must be.
        step: number of the new checkpoint; None: that of one of ours, else 0, which no moments of
            an optimizer are from.
        learning_rate: of the next step, for "deepspeed": a schedule sets it only after that step.
        budget: bytes of host memory, such as 512MiB.
    Raises:
        InputError: it is damaged, does not fit the run, or the step exists.
    """
    check_choice("to", to, ("jaxscale", *KINDS))
    if "://" in destination:
        raise InputError("destination", destination, "a folder of this machine")
    budget_bytes = _parsed(budget)
    opened = _open(path, rules)
    opened.check()
    leaves = opened.source.leaves()
    directory = Path(destination).expanduser()
    for name in (SINGLE, INDEX):
        if to == "safetensors" and (directory / name).exists():
            raise InputError("destination", str(directory / name), "no weights there yet")
    if step is None:
        is_ours = isinstance(opened.source, native.NativeCheckpoint)
        step = int(opened.path.name) if is_ours and opened.path.name.isdecimal() else 0
    if family is not None:
        leaves = _of_family(leaves, family, run, str(opened.path))
    if to == "jaxscale":
        identity = f"{opened.identity()} {_asked(rules, run, family)}"
        _to_ours(opened, leaves, directory, step, run, budget_bytes, identity)
    elif run is not None:
        raise InputError("run", run, f"none with to={to!r}")
    else:
        export(
            leaves,
            directory,
            kind=to,
            step=step,
            budget_bytes=budget_bytes,
            learning_rate=learning_rate,
        )
    print(f"{directory}: {len(leaves)} arrays")


def diff(path: str, other: str, rules: str | None = None) -> None:
    """Compares two checkpoints of any kinds array by array, and prints those that differ.

    Args:
        path: of one.
        other: of the other.
        rules: as `show`, for those that are not ours.
    Raises:
        RunError: they differ.
    """
    one, two = (_compared(each, rules) for each in (path, other))
    num_differing = 0
    for name in sorted({*one, *two}):
        line = difference(one.get(name), two.get(name))
        if line:
            num_differing += 1
            print(f"{name}: {line}")
    if num_differing:
        raise RunError(f"{num_differing} of {len({*one, *two})} arrays differ")
    print(f"{len(one)} arrays are equal")


def _open(path: str, rules: str | None) -> Opened:
    given = None if rules is None else load_rules(Path(rules).expanduser())
    return open_checkpoint(place_of(path), given)


def _compared(path: str, rules: str | None) -> Mapping[str, LazyArray]:
    opened = _open(path, None)
    if rules is not None and not isinstance(opened.source, native.NativeCheckpoint):
        opened = _open(path, rules)
    opened.check()
    return opened.source.leaves()


def _to_ours(
    opened: Opened,
    leaves: Mapping[str, LazyArray],
    directory: Path,
    step: int,
    run: str | None,
    budget_bytes: int,
    identity: str,
) -> None:
    target = conversion.Destination(directory, step)
    if isinstance(opened.source, native.NativeCheckpoint):
        source = opened.source
        target = conversion.Destination(
            directory,
            step,
            fingerprint=source.record("meta").get("fingerprint", {}),
            data_state=source.record("data"),
            form=source.form,
        )
    if run is not None:
        leaves = of_run(leaves, run, step)
        target = _described(target, leaves, run)
    with _bar("convert", leaves) as bar:
        conversion.convert(
            leaves,
            target,
            identity=identity,
            budget_bytes=budget_bytes,
            progress=lambda done, total: bar.update(done - bar.n),
        )


def _asked(rules: str | None, run: str | None, family: str | None) -> str:
    """Changes when arrays would be made otherwise of the same files: half of each is neither."""
    text = Path(rules).expanduser().read_text() if rules else ""
    given = load_run([run]) if run else None
    of_run = (given.model, given.train.seed) if given else None
    return hashlib.sha256(repr((text, of_run, family)).encode()).hexdigest()


def _of_family(
    leaves: Mapping[str, LazyArray],
    family: str,
    file: str | None,
    where: str,
) -> dict[str, LazyArray]:
    """A source's arrays under our names, each state of the optimizer too."""
    check_choice("family", family, tuple(BY_MODEL_TYPE))
    if file is None:
        raise InputError("family", family, "a run, whose model the arrays are of")
    states: dict[str, dict[str, LazyArray]] = {}
    for name, array in leaves.items():
        state, separator, tensor = name.rpartition("/")
        states.setdefault(state + separator, {})[tensor] = array
    model, layout = load_run([file]).model, BY_MODEL_TYPE[family].layout
    renamed: dict[str, LazyArray] = {}
    for start, tensors in states.items():
        found = family_leaves(model, layout, tensors, where=f"{where}: {start}")
        renamed |= {f"{start}params/{path}": array for path, array in found.items()}
    return renamed


def of_run(leaves: Mapping[str, LazyArray], file: str, step: int) -> dict[str, LazyArray]:
    """A source's arrays under the paths of a run's state.

    Arrays are called "params/..." or, of another system, "fp32/params/..." with moments of Adam
    under "exp_avg/params/..." and "exp_avg_sq/params/...". Where there are moments, the rest of the
    state comes with them: finished steps, which count the moments' updates too, and the run's key.

    Raises:
        InputError: an array is neither.
    """
    renamed: dict[str, LazyArray] = {}
    run, state = _state_of(file)
    wanted = tree.flatten(state)
    for name, array in leaves.items():
        first, _, path = name.partition("/")
        if first in MOMENTS:
            new = _moment_path(wanted, MOMENTS[first], path)
        else:
            new = path if first == WEIGHTS else name
        if new in renamed:
            raise InputError("checkpoint", name, f"one array that becomes {new}")
        renamed[new] = array
    if any(name.partition("/")[0] in MOMENTS for name in leaves):
        if step < 1:
            raise InputError("step", step, "finished steps of at least 1, as there are moments")
        renamed |= _counters(run, wanted, step)
    return renamed


def _moment_path(wanted: Mapping[str, Any], moment: str, path: str) -> str:
    """The path of a parameter's moment in a run's optimizer state."""
    end = f"/{moment}/{path.removeprefix('params/')}"
    found = [name for name in wanted if name.startswith("opt_state/") and name.endswith(end)]
    if len(found) != 1:
        expected = f"an optimizer with one state {moment!r} of each parameter, such as adamw"
        raise InputError("run", path, expected)
    return found[0]


def _counters(run: Run, wanted: Mapping[str, Any], step: int) -> dict[str, np.ndarray]:
    """What a state has beside parameters and moments, after so many steps."""
    found = {}
    for path, leaf in wanted.items():
        if path == "key":
            found[path] = np.asarray(jax.random.key_data(run_key(run.train.seed)))
        elif path == "is_finite":
            found[path] = np.array(True)
        elif not leaf.shape and np.issubdtype(leaf.dtype, np.integer):
            found[path] = np.array(step, leaf.dtype)
    return found


def _state_of(file: str) -> tuple[Run, TrainState]:
    """A run on one device, and its state as shapes."""
    run = dataclasses.replace(load_run([file]), mesh=MeshConfig())
    return run, run.setup(jax.devices()[:1]).canonical_state


def _described(
    target: conversion.Destination,
    leaves: Mapping[str, LazyArray],
    file: str,
) -> conversion.Destination:
    """The destination as a checkpoint of a run: with the facts and the form of its state.

    Raises:
        InputError: the arrays are neither the run's whole state nor its parameters.
    """
    run, state = _state_of(file)
    wanted: Any = state
    if all(name.startswith("params/") for name in leaves):
        wanted = {"params": state.params}
    check_leaves(dict(leaves), tree.flatten(wanted), file, is_cast_allowed=True)
    return dataclasses.replace(
        target,
        fingerprint=checkpoint_facts(run.model)["fingerprint"],
        form=native.TreeForm.of(wanted),
    )


def _bar(verb: str, leaves: Mapping[str, LazyArray]) -> tqdm:
    total = sum(map(_num_bytes, leaves.values()))
    return tqdm(total=total, desc=verb, unit="B", unit_scale=True)


def _num_bytes(array: LazyArray) -> int:
    return math.prod(array.shape) * array.dtype.itemsize


def _bytes(size: int) -> str:
    for unit, factor in reversed(UNITS.items()):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size} bytes"


def _parsed(budget: str) -> int:
    """Bytes from text such as 512MiB or 1000000."""
    for unit, factor in UNITS.items():
        number = budget.removesuffix(unit)
        if number != budget and number.isdecimal():
            return int(number) * factor
    if not budget.isdecimal():
        raise InputError("budget", budget, f"bytes, or a number of {', '.join(UNITS)}")
    return int(budget)
