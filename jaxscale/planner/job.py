"""What is to be planned: a decoder with its batch and types, and one way to spread it."""

import dataclasses
import functools
import math

import numpy as np

from jaxscale.models.config import LayerConfig, ModelConfig
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.parameters import Table, parameter_table
from jaxscale.ops.precision import Policy
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.parallel.pipeline.stages import StageLayout
from jaxscale.planner.decoder import LayerWork, layer_work
from jaxscale.train.config import TrainConfig
from jaxscale.train.optim import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Job:
    """The training of a decoder, whatever its mesh.

    Args:
        model: the decoder.
        batch_size: global rows a step.
        length: T, tokens a row.
        policy: dtypes.
        optimizer: whose moments are counted.
        execution: how layers run; a layout has its own `remat` and `is_scanned`.
        train: what is trained; a layout has its own number of micro-batches.
        is_staged: whether a pipeline can run the loss.
    """

    model: ModelConfig
    batch_size: int
    length: int
    policy: Policy
    optimizer: OptimizerConfig
    execution: ExecutionConfig
    train: TrainConfig
    is_staged: bool = True

    @functools.cached_property
    def table(self) -> Table:
        """The model's parameter table."""
        return parameter_table(self.model)

    @functools.cached_property
    def _work(self) -> dict[LayerConfig, LayerWork]:
        kinds = {*self.model.prefix, *self.model.pattern}
        return {kind: layer_work(self.model, kind, self.length) for kind in kinds}

    @functools.cached_property
    def period_work(self) -> tuple[LayerWork, ...]:
        """The layers of one period."""
        return tuple(self._work[layer] for layer in self.model.pattern)

    @functools.cached_property
    def prefix_work(self) -> tuple[LayerWork, ...]:
        """The layers before the first period."""
        return tuple(self._work[layer] for layer in self.model.prefix)

    def layer_of(self, work: LayerWork) -> LayerConfig:
        """A kind of layer that has this work."""
        return next(layer for layer, own in self._work.items() if own == work)

    def is_attention_kept(self, remat: str) -> bool:
        """Whether a backward that recomputes layers finds attention's output, on device or host."""
        execution = self.execution
        kept = (*execution.saved_names, *execution.offloaded_names)
        return remat == "names" and "attention" in kept

    @property
    def head_flops(self) -> float:
        """FLOPs of the unembedding's forward for one token."""
        return 2.0 * self.model.model_dim * self.model.vocab_size

    @functools.cached_property
    def width(self) -> int:
        """Bytes of an activation."""
        return np.dtype(self.policy.compute).itemsize

    @functools.cached_property
    def parameter_width(self) -> int:
        """Bytes of a stored parameter."""
        return np.dtype(self.policy.parameters).itemsize

    @functools.cached_property
    def reduction_width(self) -> int:
        """Bytes of a gradient where gradients add up."""
        return np.dtype(self.policy.reduction).itemsize


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way to spread a job: its mesh and what else of the run a plan decides.

    Args:
        mesh: axis sizes, ZeRO level, schedule.
        num_microbatches: M.
        remat: one of `ExecutionConfig.remat`.
        is_scanned: as in `ExecutionConfig`.
    """

    mesh: MeshConfig
    num_microbatches: int
    remat: str
    is_scanned: bool

    @property
    def family(self) -> tuple:
        """What a ranking shows once: axis sizes and how sequence and experts are spread."""
        return self.mesh.sizes, self.mesh.ring, self.mesh.expert_axis

    @property
    def num_devices(self) -> int:
        """Devices of the mesh."""
        return math.prod(self.mesh.sizes)

    def rows(self, job: Job) -> int:
        """Rows of a micro-batch on one device."""
        return job.batch_size // (self.mesh.num_batch_shards * self.num_microbatches)

    def tokens(self, job: Job) -> float:
        """Tokens of a micro-batch that one tensor group works on."""
        return self.rows(job) * job.length / self.mesh.sequence

    def stages(self, job: Job) -> StageLayout:
        """Which periods each pipeline stage has."""
        mesh = self.mesh
        return _stages(job.model.num_periods, mesh.pipeline, mesh.num_chunks, mesh.stage_periods)


_stages = functools.cache(StageLayout)
