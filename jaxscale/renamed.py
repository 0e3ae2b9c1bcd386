"""Old names in gin files and `--set`: they are refused, and the error gives the new name."""

from collections.abc import Callable

# Modules, and functions and classes in them.
OBJECTS = {
    "jaxscale.evaluate.perplexity.evaluate": "jaxscale.run.evaluate.evaluate",
    "jaxscale.models.transformer.StackConfig": "jaxscale.models.execution.ExecutionConfig",
    "jaxscale.parallel.processes": "jaxscale.launch.processes",
    "jaxscale.parallel.runtime": "jaxscale.launch.runtime",
    "jaxscale.serve.generate": "jaxscale.run.generate",
    "jaxscale.train.compile": "jaxscale.run.compile",
    "jaxscale.train.evaluation": "jaxscale.models.evaluation",
    "jaxscale.train.inspect": "jaxscale.run.inspect",
    "jaxscale.train.losses": "jaxscale.models.losses",
    "jaxscale.train.plan.TrainConfig": "jaxscale.train.config.TrainConfig",
    "jaxscale.train.pretrain": "jaxscale.run.pretrain",
}

# Parameters that verbs had, and the field of a run that each became.
_RUN = {
    "checkpoint": "jaxscale.run.Run.checkpoint",
    "data": "jaxscale.run.Run.data",
    "directory": "jaxscale.run.Run.directory",
    "evaluators": "jaxscale.run.Run.evaluators",
    "make_loss": "jaxscale.run.Run.loss",
    "mesh": "jaxscale.run.Run.mesh",
    "model": "jaxscale.run.Run.model",
    "optimizer": "jaxscale.run.Run.optimizer",
    "policy": "jaxscale.run.Run.policy",
    "runtime": "jaxscale.run.Run.runtime",
    "stack": "jaxscale.run.Run.execution",
    "tokenizer": "jaxscale.data.loader.DataConfig.tokenizer",
    "train": "jaxscale.run.Run.train",
}
_OWNERS = ("Run", "compile_step", "evaluate", "generate", "inspect", "pretrain")

_PATTERN = "with one LayerConfig for each position of ModelConfig.pattern"
_ROUTER = "ExpertsConfig.router, such as @TopKRouter() or @SparseMixerRouter(), {}"

# Fields of our classes and parameters of our functions, whichever module these are in.
FIELDS = {
    "HeldOutRewards.policy": "Run.policy",
    "Samples.policy": "Run.policy",
    "ModelConfig.activation": "FeedForwardConfig.activation",
    "ModelConfig.attention_softcap": "AttentionConfig.softcap",
    "ModelConfig.balance_loss": "ExpertsConfig.balance_loss",
    "ModelConfig.expert_dim": "ExpertsConfig.dim",
    "ModelConfig.expert_dropout": "ExpertsConfig.dropout",
    "ModelConfig.ffn_dim": "FeedForwardConfig.dim",
    "ModelConfig.head_dim": "AttentionConfig.head_dim",
    "ModelConfig.moe_pattern": "ModelConfig.pattern",
    "ModelConfig.norm": "NormConfig.kind",
    "ModelConfig.norm_epsilon": "NormConfig.epsilon",
    "ModelConfig.num_active_experts": "ExpertsConfig.num_active",
    "ModelConfig.num_dense_prefix": "ModelConfig.prefix",
    "ModelConfig.num_experts": "ExpertsConfig.num_experts",
    "ModelConfig.num_heads": "AttentionConfig.num_heads",
    "ModelConfig.num_kv_heads": "AttentionConfig.num_kv_heads",
    "ModelConfig.positions": (
        "AttentionConfig.rotary (None without rotary positions)"
        " and ModelConfig.use_learned_positions"
    ),
    "ModelConfig.rope_theta": "RotaryConfig.theta",
    "ModelConfig.router": _ROUTER.format("with fields of their own"),
    "ModelConfig.router_expert_gradient": _ROUTER.format("and a field of it"),
    "ModelConfig.router_mask": _ROUTER.format("and a field of it"),
    "ModelConfig.router_threshold": _ROUTER.format("and a field of it"),
    "ModelConfig.router_z_loss": "ExpertsConfig.z_loss",
    "ModelConfig.use_bias": (
        "AttentionConfig.biases, FeedForwardConfig.use_bias and NormConfig.use_bias"
    ),
    "ModelConfig.use_qk_norm": "AttentionConfig.qk_norm",
    "ModelConfig.windows": f"AttentionConfig.window, {_PATTERN}",
    **{f"{owner}.{name}": new for owner in _OWNERS for name, new in _RUN.items()},
}

# The first names of `--set NAME.FIELD=VALUE`.
PATHS = {
    "make_loss": "loss",
    "stack": "execution",
    "tokenizer": "data.tokenizer",
}


def new_object(name: str) -> str:
    """What to expect instead of an old module, function or class; empty if it was not renamed.

    Args:
        name: full dotted name. Of a module whose content went elsewhere, all of that is named; what
            is in a renamed module is found by the module's name.
    """
    for old, new in OBJECTS.items():
        if name == old or name.startswith(f"{old}."):
            return f"its new name, {new}{name.removeprefix(old)}"
    moved = [f"{old} is now {new}" for old, new in OBJECTS.items() if old.startswith(f"{name}.")]
    return f"the new names of what it held: {', '.join(moved)}" if moved else ""


def new_field(target: Callable, name: str) -> str:
    """What to expect instead of an old field of one of our classes; empty if it was not renamed."""
    is_ours = target.__module__.split(".")[0] == __name__.split(".")[0]
    new = FIELDS.get(f"{target.__name__}.{name}")
    return f"its new name, {new}" if new and is_ours else ""


def new_path(name: str) -> str:
    """What to expect instead of an old first name of `--set`; empty if it was not renamed."""
    return f"its new name, {PATHS[name]}" if name in PATHS else ""
