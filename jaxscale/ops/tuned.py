"""Files of block sizes that were measured on a device, and what they are used for."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from jaxscale.kernels import device, tuning
from jaxscale.kernels.triton_call import Blocks, operations, use_blocks
from jaxscale.types import InputError, RunError

logger = logging.getLogger(__name__)
_used: tuple[str, str] | None = None  # the file, and the device that it was measured on


def tune(path: str) -> None:
    """Measures block sizes of every Triton kernel on this process's GPU; writes and prints them.

    Raises:
        RunError: no block sizes of a kernel run here.
    """
    found = {}
    for problem in tuning.problems():
        try:
            blocks, ms = tuning.fastest(problem)
        except RuntimeError as error:
            raise RunError(str(error)) from error
        found[problem.operation] = dataclasses.asdict(blocks)
        print(f"{problem.operation:<32} {ms:8.3f} ms  {found[problem.operation]}", flush=True)
    text = json.dumps({"device": device.device_kind(), "blocks": found}, indent=1)
    Path(path).expanduser().write_text(text + "\n")


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
    name, blocks = _read(path)
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


def _read(path: str) -> tuple[str, dict[str, Blocks]]:
    """(device, blocks by operation)."""

    def refuse(expected: str) -> InputError:
        return InputError("RuntimeConfig.block_sizes", path, f"a file of jaxscale tune, {expected}")

    try:
        content = json.loads(Path(path).expanduser().read_text())
    except OSError as error:
        raise refuse(f"but it cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise refuse(f"but it is no JSON: {error}") from error
    if not isinstance(content, dict) or content.keys() != {"device", "blocks"}:
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
