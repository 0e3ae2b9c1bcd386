"""How long and how to train."""

import dataclasses

from jaxscale import tree
from jaxscale.checkpoint.changes import Changes
from jaxscale.types import InputError, check_not_negative, check_positive, check_types

MAX_SEED = 2**32 - 1
MAX_STEPS = 2**31 - 1  # the state counts them in int32


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long and how to train.

    Args:
        steps: optimizer steps of the whole run.
        num_microbatches: M; the batch is cut in M parts whose gradients are summed. Only the
            load-balance loss depends on M, because experts' shares are counted in each part.
        seed: of the initial parameters and every draw.
        z_loss: weight of log^2 Z in the loss.
        embedding_noise: alpha of NEFTune (arXiv 2310.05914): embeddings get uniform noise of at
            most alpha / sqrt(T D), for fine-tuning; 0 for none.
        trainable: regular expression over whole parameter paths; what does not match stays as it is
            and has no optimizer state.
        evaluate_every: steps between evaluations.
        init_from: checkpoint directory of the same model whose parameters a new run starts from;
            None to draw them.
        init_changes: with it a new run goes on from the other run's whole state, optimizer, step
            and position in the data included, but for what the changes name. Where they draw
            `step`, the data begins anew, too. None for the parameters alone.
        profile_steps: the profiler records from the first number of finished steps to the second.
    """

    steps: int
    num_microbatches: int = 1
    seed: int = 0
    z_loss: float = 0.0
    embedding_noise: float = 0.0
    trainable: str = ".*"
    evaluate_every: int = 100
    init_from: str | None = None
    init_changes: Changes | None = None
    profile_steps: tuple[int, int] | None = None

    def __post_init__(self):
        check_types(self)
        for name in ("steps", "num_microbatches", "evaluate_every"):
            check_positive(f"TrainConfig.{name}", getattr(self, name))
        if self.steps > MAX_STEPS:
            raise InputError("TrainConfig.steps", self.steps, f"at most {MAX_STEPS}")
        if self.profile_steps:
            first, second = self.profile_steps
            if not 0 <= first < second <= self.steps:
                expected = f"0 <= first < second <= {self.steps}"
                raise InputError("TrainConfig.profile_steps", self.profile_steps, expected)
        if not 0 <= self.seed <= MAX_SEED:
            raise InputError("TrainConfig.seed", self.seed, f"0 <= seed <= {MAX_SEED}")
        if self.init_changes is not None and self.init_from is None:
            raise InputError("TrainConfig.init_from", None, "a directory, with init_changes")
        check_not_negative("TrainConfig.z_loss", self.z_loss)
        check_not_negative("TrainConfig.embedding_noise", self.embedding_noise)
        tree.compile_pattern("TrainConfig.trainable", self.trainable)
