"""A file or an override with an old name is refused, and the error gives the new one."""

import dataclasses
import sys
import types

import pytest

from jaxscale import config, renamed
from jaxscale.types import InputError

MODEL_FIELDS = {
    "activation": "FeedForwardConfig.activation",
    "attention_softcap": "AttentionConfig.softcap",
    "balance_loss": "ExpertsConfig.balance_loss",
    "expert_dim": "ExpertsConfig.dim",
    "expert_dropout": "ExpertsConfig.dropout",
    "ffn_dim": "FeedForwardConfig.dim",
    "head_dim": "AttentionConfig.head_dim",
    "moe_pattern": "ModelConfig.pattern",
    "norm": "NormConfig.kind",
    "norm_epsilon": "NormConfig.epsilon",
    "num_active_experts": "ExpertsConfig.num_active",
    "num_dense_prefix": "ModelConfig.prefix",
    "num_experts": "ExpertsConfig.num_experts",
    "num_heads": "AttentionConfig.num_heads",
    "num_kv_heads": "AttentionConfig.num_kv_heads",
    "positions": "ModelConfig.use_learned_positions",
    "rope_theta": "RotaryConfig.theta",
    "router": "@TopKRouter() or @SparseMixerRouter()",
    "router_expert_gradient": "ExpertsConfig.router",
    "router_mask": "ExpertsConfig.router",
    "router_threshold": "ExpertsConfig.router",
    "router_z_loss": "ExpertsConfig.z_loss",
    "use_bias": "AttentionConfig.biases, FeedForwardConfig.use_bias and NormConfig.use_bias",
    "use_qk_norm": "AttentionConfig.qk_norm",
    "windows": "AttentionConfig.window",
}
RUN_FIELDS = {
    "checkpoint": "checkpoint",
    "data": "data",
    "directory": "directory",
    "evaluators": "evaluators",
    "make_loss": "loss",
    "mesh": "mesh",
    "model": "model",
    "optimizer": "optimizer",
    "policy": "policy",
    "runtime": "runtime",
    "stack": "execution",
    "train": "train",
}
MODULES = {
    "jaxscale.parallel.processes": "jaxscale.launch.processes",
    "jaxscale.parallel.runtime": "jaxscale.launch.runtime",
    "jaxscale.serve.generate": "jaxscale.run.generate",
    "jaxscale.train.compile": "jaxscale.run.compile",
    "jaxscale.train.evaluation": "jaxscale.models.evaluation",
    "jaxscale.train.inspect": "jaxscale.run.inspect",
    "jaxscale.train.losses": "jaxscale.models.losses",
    "jaxscale.train.pretrain": "jaxscale.run.pretrain",
}
CLASSES = {
    "jaxscale.evaluate.perplexity.evaluate": "jaxscale.run.evaluate.evaluate",
    "jaxscale.models.transformer.StackConfig": "jaxscale.models.execution.ExecutionConfig",
    "jaxscale.train.plan.TrainConfig": "jaxscale.train.config.TrainConfig",
}
DYNAMIC = "from __gin__ import dynamic_registration\n"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """As our own one will be, without the old fields."""

    size: int = 1


@dataclasses.dataclass(frozen=True)
class Run:
    model: ModelConfig


def pretrain(*, run: Run):
    return run


@pytest.fixture
def refusal(tmp_path, monkeypatch):
    """The message that a file and overrides get from the verbs of a new module of ours."""
    module = types.ModuleType("jaxscale.new")
    for target in (ModelConfig, Run, pretrain):
        monkeypatch.setattr(target, "__module__", "jaxscale.new")
        setattr(module, target.__name__, target)
    for name in ("generate", "evaluate"):
        verb = types.FunctionType(pretrain.__code__, globals(), name, pretrain.__defaults__)
        verb.__annotations__ = pretrain.__annotations__
        verb.__module__ = "jaxscale.new"
        setattr(module, name, verb)
    monkeypatch.setitem(sys.modules, "jaxscale.new", module)

    def refusal(line: str, *overrides: str) -> str:
        path = tmp_path / "a.gin"
        path.write_text(f"{DYNAMIC}from jaxscale import new\n{line}\n")
        with pytest.raises(InputError) as caught:
            config.load(pretrain, [path], overrides)
        return str(caught.value)

    return refusal


@pytest.mark.parametrize(("old", "new"), MODEL_FIELDS.items())
def test_an_old_field_of_the_model(refusal, old, new):
    message = refusal(f"new.ModelConfig.{old} = 1")
    assert f"a.gin:3: ModelConfig.{old}: given '{old}', expected its new name, " in message
    assert message.endswith(new) or f"{new}, " in message
    message = refusal("", f"model.{old}=1")
    assert f"--set model.{old}=1: ModelConfig.{old}: " in message and new in message


@pytest.mark.parametrize("verb", ["pretrain", "generate", "evaluate"])
def test_an_old_parameter_of_a_verb(refusal, verb):
    for old, new in RUN_FIELDS.items():
        message = refusal(f"new.{verb}.{old} = 1")
        expected = f"expected its new name, jaxscale.run.Run.{new}"
        assert message.endswith(f"a.gin:3: {verb}.{old}: given '{old}', {expected}")
    message = refusal(f"new.{verb}.tokenizer = 1")
    assert message.endswith("its new name, jaxscale.data.loader.DataConfig.tokenizer")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("stack.remat", "execution"),
        ("make_loss", "loss"),
        ("tokenizer.kind", "data.tokenizer"),
    ],
)
def test_an_old_path(refusal, old, new):
    first = old.split(".")[0]
    message = refusal("", f"{old}=1")
    assert message == f"--set {old}=1: {first}: given '{first}', expected its new name, {new}"
    message = refusal("", f"run.{old}=1")
    assert f"Run.{first}: given '{first}', expected its new name, " in message
    assert message.endswith(f".{new.split('.')[-1]}")


@pytest.mark.parametrize(("old", "new"), MODULES.items())
def test_an_old_module(refusal, old, new):
    package, name = old.rsplit(".", 1)
    for line in (f"import {old}", f"from {package} import {name}", f"import {old} as other"):
        expected = f"a.gin:3: import: given '{old}', expected its new name, {new}"
        assert refusal(line).endswith(expected)
    message = refusal(f"import {package}\n{old}.RuntimeConfig.platform = 'cpu'")
    assert message.endswith(f"given '{name}', expected its new name, {new}.RuntimeConfig")


@pytest.mark.parametrize(("old", "new"), CLASSES.items())
def test_an_old_class(refusal, monkeypatch, old, new):
    """Whether its module has no such name, imports it from the new one, or is gone."""
    module, name = old.rsplit(".", 1)
    package, file = module.rsplit(".", 1)
    lines = f"from {package} import {file} as other\nother.{name}.x = 1"
    without = types.ModuleType(module)
    monkeypatch.setitem(sys.modules, module, without)
    expected = f"a.gin:4: other.{name}: given '{name}', expected its new name, {new}"
    assert refusal(lines).endswith(expected)
    monkeypatch.setattr(without, name, ModelConfig, raising=False)
    assert refusal(lines).endswith(expected)
    monkeypatch.setitem(sys.modules, module, None)  # so that importing it fails
    message = refusal(lines)
    expected = f"expected the new names of what it held: {old} is now {new}"
    assert message.endswith(f"a.gin:3: import: given '{module}', {expected}")


def test_what_is_not_ours_keeps_its_names(refusal, monkeypatch):
    monkeypatch.setattr(ModelConfig, "__module__", "elsewhere")
    message = refusal("new.ModelConfig.num_heads = 1")
    assert message.endswith("ModelConfig.num_heads: given 'num_heads', expected one of size")


def test_every_old_name_of_the_table_is_tested():
    runs = {*RUN_FIELDS, "tokenizer"}
    for old in renamed.FIELDS:
        owner, name = old.split(".")
        assert name in (MODEL_FIELDS if owner == "ModelConfig" else runs)
    assert renamed.OBJECTS == MODULES | CLASSES
    assert renamed.PATHS.keys() == {"stack", "make_loss", "tokenizer"}
