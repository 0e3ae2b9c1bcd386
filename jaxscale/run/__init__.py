"""A run as one value, and the verbs that take it; a gin file can name all parts of a run here."""

from jaxscale.checkpoint.changes import Changes
from jaxscale.checkpoint.manager import CheckpointConfig
from jaxscale.checkpoint.mirror import MirrorConfig
from jaxscale.data.chats import ChatSource
from jaxscale.data.filtered_chunks import CorpusPart
from jaxscale.data.filters import (
    Alphanumeric,
    Compression,
    Japanese,
    KanaLines,
    Keys,
    Keywords,
    Length,
    LineLengths,
    MaskedAddresses,
    NoEmptyBrackets,
    Normalised,
    ScriptShare,
    SentenceLength,
    UntilReferences,
)
from jaxscale.data.loader import DataConfig
from jaxscale.data.minhash import MinHash
from jaxscale.data.preferences import PreferenceSource
from jaxscale.data.prompts import PromptSource
from jaxscale.data.repetition import Repetition
from jaxscale.data.sources import (
    HuggingFaceSource,
    JsonLinesSource,
    ParquetSource,
    StandardLibrary,
    TextSource,
)
from jaxscale.data.tokenizer import TokenizerConfig
from jaxscale.evaluate.few_shot import FewShotTasks
from jaxscale.evaluate.perplexity import BitsPerByte
from jaxscale.evaluate.samples import Samples
from jaxscale.evaluate.tasks import TaskPrompt
from jaxscale.launch.processes import ProcessesConfig
from jaxscale.launch.runtime import RuntimeConfig
from jaxscale.models.config import (
    AttentionConfig,
    DenseMixerRouter,
    ExpertsConfig,
    FeedForwardConfig,
    LayerConfig,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    LoraConfig,
    MaskedSamplingRouter,
    ModelConfig,
    NormConfig,
    RotaryConfig,
    SparseMixerRouter,
    TopKRouter,
    YarnScaling,
)
from jaxscale.models.execution import BatchInvariant, ByChunk, ExecutionConfig, Whole
from jaxscale.models.quantised import QuantisedConfig
from jaxscale.ops.precision import Policy
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.parallel.sequence.fpdt.strategy import FullyPipelined
from jaxscale.parallel.sequence.head_chunks import HeadChunks
from jaxscale.rlhf.accuracy import PreferenceAccuracy
from jaxscale.rlhf.critic import CriticConfig
from jaxscale.rlhf.rewards import ExactMatch
from jaxscale.rlhf.rollouts import HeldOutRewards, RolloutConfig
from jaxscale.run.huggingface import huggingface_model
from jaxscale.run.planned import PlannedMesh
from jaxscale.run.ppo import ppo_loss
from jaxscale.run.reward import RewardModel, reward_loss
from jaxscale.run.run import Run, dpo_loss, masked_token_loss, next_token_loss, policy_loss
from jaxscale.serve.config import EngineConfig
from jaxscale.serve.sampling import SamplingConfig
from jaxscale.train.config import TrainConfig
from jaxscale.train.optim import OptimizerConfig
from jaxscale.train.reporters import TensorBoard, Wandb

__all__ = [
    "Alphanumeric",
    "AttentionConfig",
    "BatchInvariant",
    "BitsPerByte",
    "ByChunk",
    "Changes",
    "ChatSource",
    "CheckpointConfig",
    "Compression",
    "CorpusPart",
    "CriticConfig",
    "DataConfig",
    "DenseMixerRouter",
    "EngineConfig",
    "ExactMatch",
    "ExecutionConfig",
    "ExpertsConfig",
    "FeedForwardConfig",
    "FewShotTasks",
    "FullyPipelined",
    "HeadChunks",
    "HeldOutRewards",
    "HuggingFaceSource",
    "Japanese",
    "JsonLinesSource",
    "KanaLines",
    "Keys",
    "Keywords",
    "LayerConfig",
    "Length",
    "LineLengths",
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "LoraConfig",
    "MaskedAddresses",
    "MaskedSamplingRouter",
    "MeshConfig",
    "MinHash",
    "MirrorConfig",
    "ModelConfig",
    "NoEmptyBrackets",
    "NormConfig",
    "Normalised",
    "OptimizerConfig",
    "ParquetSource",
    "PlannedMesh",
    "Policy",
    "PreferenceAccuracy",
    "PreferenceSource",
    "ProcessesConfig",
    "PromptSource",
    "QuantisedConfig",
    "Repetition",
    "RewardModel",
    "RolloutConfig",
    "RotaryConfig",
    "Run",
    "RuntimeConfig",
    "Samples",
    "SamplingConfig",
    "ScriptShare",
    "SentenceLength",
    "SparseMixerRouter",
    "StandardLibrary",
    "TaskPrompt",
    "TensorBoard",
    "TextSource",
    "TokenizerConfig",
    "TopKRouter",
    "TrainConfig",
    "UntilReferences",
    "Wandb",
    "Whole",
    "YarnScaling",
    "dpo_loss",
    "huggingface_model",
    "masked_token_loss",
    "next_token_loss",
    "policy_loss",
    "ppo_loss",
    "reward_loss",
]
