"""Files of block sizes that were measured on a device, and what they are used for."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from jaxscale.kernels import device, tuning
from jaxscale.kernels.triton_call import Blocks, operations, package_blocks, use_blocks
from jaxscale.types import InputError, RunError

logger = logging.getLogger(__name__)
_used: tuple[str, str] | None = None  # the file, and the device that it was measured on


def tune(path: str) -> None:
    """Measures block sizes of every Triton kernel on this process's GPU; writes and prints them.

    The file is written after each operation, and one that exists is gone on with.

    Raises:
        InputError: the file cannot be written, or it is not of `tune` on such a device.
        RunError: no block sizes of a kernel run here.
    """
    found = _begun(path)
    _write(path, found)
    num = len(operations())
    if found:
        print(f"{path} has {len(found)} of {num} operations, which are not measured again")
    for problem in tuning.problems():
        if problem.operation in found:
            continue
        try:
            times = tuning.times(problem)
        except RuntimeError as error:
            raise RunError(str(error)) from error
        found[problem.operation] = fastest = min(times, key=times.get)
        _write(path, found)
        package = times.get(package_blocks(problem.operation))
        if package is None:
            beside = "the package's do not run here"
        else:
            beside = f"by the package's {package:8.3f}"
        took = f"{times[fastest]:8.3f} ms, {beside}"
        row = f"{problem.operation:<36} {took}  {dataclasses.asdict(fastest)}"
        print(f"{len(found):>2} of {num}: {row}", flush=True)


def _begun(path: str) -> dict[str, Blocks]:
    """What an earlier run measured on this device; nothing without a file."""
    if not Path(path).expanduser().exists():
        return {}
    here = device.device_kind()
    name, found = _read(path, "output")
    if name != here:
        raise InputError("output", path, f"a new file, or one of {here}, but it is of {name}")
    return found


def _write(path: str, found: dict[str, Blocks]) -> None:
    """In one step, so that a run that is cut leaves a whole file."""
    blocks = {operation: dataclasses.asdict(each) for operation, each in found.items()}
    text = json.dumps({"device": device.device_kind(), "blocks": blocks}, indent=1)
    whole = Path(path).expanduser()
    part = whole.with_name(f"{whole.name}.part")
    try:
        part.write_text(text + "\n")
        part.replace(whole)
    except OSError as error:
        raise InputError("output", path, f"a file that can be written: {error.strerror}") from error


def use_tuned(path: str | None) -> None:
    """Has this process take a file's block sizes; None for the package's own.

    Raises:
        InputError: the file is missing, or is not one that `tune` wrote.
    """
    global _used
    use_blocks({})
    _used = None
    if path is None:
        return
    name, blocks = _read(path, "RuntimeConfig.block_sizes")
    use_blocks(blocks)
    _used = path, name


def log_tuned() -> None:
    """Says which file's block sizes are in use, once they are known to fit the device."""
    if _used is not None:
        logger.info("block sizes: %s, measured on %s", *_used)


def check_tuned() -> None:
    """Raises InputError if a file of another device is in use."""
    here = device.device_kind()
    if _used is not None and _used[1] != here:
        path, name = _used
        expected = f"a file of this device, {here}, but it is of {name}: jaxscale tune writes one"
        raise InputError("RuntimeConfig.block_sizes", path, expected)


def _read(path: str, parameter: str) -> tuple[str, dict[str, Blocks]]:
    """(device, blocks by operation)."""

    def refuse(expected: str) -> InputError:
        return InputError(parameter, path, f"a file of jaxscale tune, {expected}")

    try:
        content = json.loads(Path(path).expanduser().read_text())
    except OSError as error:
        raise refuse(f"but it cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise refuse(f"but it is no JSON: {error}") from error
    is_told = isinstance(content, dict) and content.keys() == {"device", "blocks"}
    if not (is_told and isinstance(content["blocks"], dict)):
        raise refuse("with a device and its blocks")
    for operation, fields in content["blocks"].items():
        if operation not in operations() or not _is_blocks(fields):
            raise refuse(f"but its entry {operation!r} is none")
    blocks = {name: Blocks(**fields) for name, fields in content["blocks"].items()}
    return content["device"], blocks


def _is_blocks(fields: Any) -> bool:
    names = {field.name for field in dataclasses.fields(Blocks)}
    is_named = isinstance(fields, dict) and fields.keys() == names
    return is_named and all(type(size) is int and size >= 0 for size in fields.values())
