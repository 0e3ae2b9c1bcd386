"""Devices by their data sheets, machines made of them, and how long their collectives take."""

import dataclasses
import math
import re

from jaxscale.parallel.mesh import AXES, MeshConfig
from jaxscale.types import InputError, one_of

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator. Peaks are of its data sheet, shares are what a train step reaches of them.

    Args:
        name: as in `DEVICES`.
        memory_bytes: as its driver reports them, before JAX takes its share.
        matmul_flops: dense FLOP/s of 16-bit matmuls.
        float32_flops: dense FLOP/s of float32 matmuls.
        memory_bandwidth: bytes/s.
        link_bandwidth: bytes/s to the other devices of its host, in one direction.
        network_bandwidth: bytes/s to devices of other hosts, a device's share of its host's.
        host_bandwidth: bytes/s to its host's memory, in one direction.
        matmul_share: of `matmul_flops`, in matmuls with weights.
        expert_share: of `matmul_flops`, in the grouped matmuls of experts.
        attention_share: of `matmul_flops`, over long rows.
        memory_share: of `memory_bandwidth`.
        link_share: of `link_bandwidth` and `network_bandwidth`.
    """

    name: str
    memory_bytes: int
    matmul_flops: float
    float32_flops: float
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    host_bandwidth: float
    matmul_share: float = 0.70
    expert_share: float = 0.62
    attention_share: float = 0.60
    memory_share: float = 0.80
    link_share: float = 0.50


# Shares of the H200 are those of experiments/results/2026-11-23_h200_train_step.md,
# 2026-11-27_two_h200_scaling.md and 2026-11-27_two_h200_long_sequences.md: matmuls 674 to 724 of
# 989 TFLOP/s, attention 461 to 511 (574 over rows of 32K), passes over memory 3.3 to 4.3 of 4.8
# TB/s, exchanges 170 to 235 of 450 GB/s. The others, which were not measured, have the same.
_H100 = Device(
    name="h100",  # SXM5; source: NVIDIA H100 data sheet; network of a DGX H100, 400 Gb/s a GPU
    memory_bytes=81_559 * 2**20,
    matmul_flops=989e12,
    float32_flops=67e12,
    memory_bandwidth=3350 * GB,
    link_bandwidth=450 * GB,
    network_bandwidth=50 * GB,
    host_bandwidth=55 * GB,
)
_H200 = dataclasses.replace(
    _H100,
    name="h200",  # source: NVIDIA H200 data sheet
    memory_bytes=150_109_880_320,
    memory_bandwidth=4800 * GB,
)
_A100 = Device(
    name="a100",  # SXM4, 80 GB; source: NVIDIA A100 data sheet; network of a DGX A100, 200 Gb/s
    memory_bytes=81_251 * 2**20,
    matmul_flops=312e12,
    float32_flops=19.5e12,
    memory_bandwidth=2039 * GB,
    link_bandwidth=300 * GB,
    network_bandwidth=25 * GB,
    host_bandwidth=25 * GB,
)
_V100 = Device(
    name="v100_32gb",  # SXM2; source: NVIDIA V100 data sheet; network of a DGX-1, 4 x 100 Gb/s
    memory_bytes=32_510 * 2**20,
    matmul_flops=125e12,
    float32_flops=15.7e12,
    memory_bandwidth=900 * GB,
    link_bandwidth=150 * GB,
    network_bandwidth=6.25 * GB,
    host_bandwidth=12 * GB,
)
DEVICES = {device.name: device for device in (_H200, _H100, _A100, _V100)}
LATENCY_S = 20e-6  # of one collective, with what its launch costs


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Hosts with equally many devices each, of which some may be gone.

    Args:
        device: what they have.
        num_hosts: how many.
        devices_per_host: each.
        num_gone: devices that are not there any more.
    """

    device: Device
    num_hosts: int
    devices_per_host: int
    num_gone: int = 0

    @classmethod
    def parse(cls, text: str) -> "Cluster":
        """From text such as "h200:2x8", or "h200:2x8-3" with three devices gone.

        Raises:
            InputError: another form, an unknown device, or nothing is left.
        """
        match = re.fullmatch(r"(\w+):([1-9]\d*)x([1-9]\d*)(?:-(\d+))?", text)
        if match is None:
            expected = "DEVICE:HOSTSxDEVICES_PER_HOST, such as h200:2x8, or h200:2x8-3 for 3 gone"
            raise InputError("devices", text, expected)
        if match[1] not in DEVICES:
            raise InputError("devices", match[1], one_of(match[1], DEVICES))
        found = cls(DEVICES[match[1]], int(match[2]), int(match[3]), int(match[4] or 0))
        if found.num_devices < 1:
            raise InputError("devices", text, "at least one device that is left")
        return found

    @property
    def num_devices(self) -> int:
        """Devices that are left."""
        return self.num_hosts * self.devices_per_host - self.num_gone

    @property
    def text(self) -> str:
        """What `parse` would read."""
        gone = f"-{self.num_gone}" if self.num_gone else ""
        return f"{self.device.name}:{self.num_hosts}x{self.devices_per_host}{gone}"


@dataclasses.dataclass(frozen=True)
class Group:
    """Devices that exchange with one another along some axes of a mesh.

    Args:
        size: members.
        bandwidth: bytes/s that leave a member while all exchange.
    """

    size: int
    bandwidth: float

    def all_gather_s(self, num_bytes: float) -> float:
        """Seconds until every member has all `num_bytes`, of which it had its share."""
        if self.size == 1:
            return 0.0
        away = (self.size - 1) / self.size
        return LATENCY_S + away * num_bytes / self.bandwidth

    def reduce_scatter_s(self, num_bytes: float) -> float:
        """Seconds until every member has its share of the sums of `num_bytes`."""
        return self.all_gather_s(num_bytes)

    def all_reduce_s(self, num_bytes: float) -> float:
        """Seconds until every member has all sums of `num_bytes`."""
        return 2 * self.all_gather_s(num_bytes)

    def all_to_all_s(self, num_bytes: float) -> float:
        """Seconds until each member has sent its `num_bytes` in equal parts to all members."""
        return self.all_gather_s(num_bytes)

    def permute_s(self, num_bytes: float) -> float:
        """Seconds until each member has sent `num_bytes` to a neighbour."""
        return LATENCY_S + num_bytes / self.bandwidth if self.size > 1 else 0.0


def group_of(cluster: Cluster, mesh: MeshConfig, axes: tuple[str, ...]) -> Group:
    """The group that each device forms along `axes`, with the slowest link between its members.

    Devices are numbered as the mesh has them, the last axis innermost, hosts one after the other.
    A group that has several members on a host uses the network of all of them.
    """
    size, members_per_host, stride = 1, 1, 1
    for axis in reversed(AXES):
        length = getattr(mesh, axis)
        if axis in axes:
            on_host = min(length, max(1, cluster.devices_per_host // stride))
            members_per_host *= math.gcd(length, on_host)
            size *= length
        stride *= length
    device = cluster.device
    bandwidth = device.link_bandwidth
    if size > members_per_host:
        bandwidth = min(bandwidth, device.network_bandwidth * members_per_host)
    return Group(size, bandwidth * device.link_share)
