"""A run's figures: their history on disk, throughput and the use of experts."""

import contextlib
import dataclasses
import json
import math
import time
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxscale.types import InputError

# Dense bf16 peak per device in FLOP/s by JAX's name of the device, from the vendors' data sheets,
# without sparsity. A TPU v5 lite is a v5e, a TPU v5 a v5p and a TPU v6 lite a v6e.
PEAK_FLOPS = {
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


HISTORY = "metrics.jsonl"  # in a run's directory


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises InputError where the block could not write to `path`, such as on a full disk."""
    try:
        yield
    except OSError as error:
        raise InputError(
            "directory", str(path), f"a place that can be written ({error.strerror})"
        ) from error


class History:
    """One JSON object a line, such as `{"step": 7, "loss": 3.1}`; floats read back bit-identical.

    A number that is not finite is null.

    Args:
        path: the file; lines of steps after `step` are dropped, for those steps will run again.
        step: finished steps of the state the run starts from.
    """

    def __init__(self, path: Path, step: int):
        self._path = path
        kept = [line for line in history_lines(path) if _step(line) <= step]
        with writing(path):
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(f"{line}\n" for line in kept))
            temporary.replace(path)
            self._file = path.open("a")

    def report(self, step: int, figures: Mapping[str, Any]) -> None:
        """Appends a line; evaluations of a step are a line of their own."""
        line = json.dumps(json_value({"step": step, **figures}), allow_nan=False)
        with writing(self._path):
            self._file.write(line + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        with writing(self._path):
            self._file.close()


def json_value(value: Any) -> Any:
    """The value as JSON has it: arrays as lists, and null for a number that is not finite."""
    if isinstance(value, Mapping):
        return {name: json_value(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (str, int, types.NoneType)):
        return value
    return json_value(np.asarray(value).tolist())


def read_history(path: Path) -> list[dict[str, Any]]:
    """The lines of a history in order, none if there is no file.

    A last line that a kill cut short is left out.

    Raises:
        InputError: the file is no text.
    """
    return [json.loads(line) for line in history_lines(path) if _step(line) < np.inf]


def history_lines(path: Path) -> list[str]:
    """The lines of a history as they are; Raises as `read_history`."""
    if not path.exists():
        return []
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        expected = f"a history of figures, as text in UTF-8 ({error.reason})"
        raise InputError("directory", str(path), expected) from error


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):  # cut short, or not a line of ours
        return np.inf


def expert_use(load: np.ndarray) -> dict[str, float]:
    """How evenly the experts of each layer are used, in the least even layer.

    Args:
        load: [layers, E] choices of a step.
    Returns:
        `expert_max_share`, of the layer's choices on one expert: 1 / E to 1. `expert_entropy`, of
        the shares, as a fraction of log E: 1 where all are used alike, 0 where one gets all.
    """
    share = load / np.maximum(load.sum(-1, keepdims=True), 1)
    logarithm = np.log(np.where(share > 0, share, 1))
    largest = max(np.log(load.shape[-1]), 1e-9)  # a single expert has none
    entropy = -(share * logarithm).sum(-1) / largest
    return {"expert_max_share": float(share.max()), "expert_entropy": float(entropy.min())}


@dataclasses.dataclass
class Speed:
    """Turns the time between steps into throughput.

    Args:
        tokens_per_step: positions in the global batch, padding included.
        flops_per_token: 6 N_active plus causal attention at half; recompute is not counted.
    """

    tokens_per_step: int
    flops_per_token: float
    _last: float = dataclasses.field(default_factory=time.perf_counter)

    def figures(self) -> dict[str, float]:
        """Seconds since the last call, tokens/s, TFLOP/s and MFU a device, peak memory in bytes."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        flops = self.flops_per_token * self.tokens_per_step / seconds / jax.device_count()
        figures = {
            "seconds": seconds,
            "tokens_per_second": self.tokens_per_step / seconds,
            "tflops_per_device": flops / 1e12,
        }
        if peak := peak_flops():
            figures["mfu"] = flops / peak
        memory = jax.local_devices()[0].memory_stats()
        if memory:
            figures["peak_memory_bytes"] = memory["peak_bytes_in_use"]
        return figures


def peak_flops() -> float | None:
    """Dense bf16 peak of one device in FLOP/s; None where it is not known, such as a CPU."""
    return PEAK_FLOPS.get(jax.local_devices()[0].device_kind)
