"""A run as the planner sees it: what is trained, and how it is spread."""

from jaxscale.parallel.pipeline.loss import StagedLoss
from jaxscale.planner.job import Job, Layout
from jaxscale.run.run import Run


def job_of(run: Run) -> Job:
    """What of a run does not depend on its mesh."""
    return Job(
        model=run.model,
        batch_size=run.data.batch_size,
        length=run.data.sequence_length,
        policy=run.policy,
        optimizer=run.optimizer,
        execution=run.execution,
        train=run.train,
        is_staged=isinstance(run.loss(run), StagedLoss),
    )


def layout_of(run: Run) -> Layout:
    """How a run is spread now."""
    execution = run.execution
    num_microbatches = run.train.num_microbatches
    return Layout(run.mesh, num_microbatches, execution.remat, execution.is_scanned)
