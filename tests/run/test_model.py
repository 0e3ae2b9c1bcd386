"""A trained model in three lines, and text that continues prompts, from a run or its directory."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx

from jaxscale.checkpoint.manager import CheckpointConfig, Checkpoints
from jaxscale.data.loader import DataConfig
from jaxscale.data.sources import TextSource
from jaxscale.data.tokenizer import ByteTokenizer, TokenizerConfig
from jaxscale.launch.runtime import RuntimeConfig
from jaxscale.models.config.facts import checkpoint_facts, from_flat
from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.parameters import abstract_params, parameter_table
from jaxscale.ops.precision import Policy
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.run.generate import generate
from jaxscale.run.model import LanguageModel, load
from jaxscale.run.run import Run
from jaxscale.serve.decoding import generate_tokens
from jaxscale.serve.sampling import SamplingConfig
from jaxscale.train.config import TrainConfig
from jaxscale.train.optim import OptimizerConfig
from jaxscale.types import InputError

SHAPE = dict(
    vocab_size=258,
    num_layers=1,
    model_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=32,
    max_length=32,
)
MODEL = from_flat(**SHAPE)
EXECUTION = ExecutionConfig(is_scanned=False, remat="none", num_loss_chunks=1)
POLICY = Policy(compute="float32")
NEW = 7
# As a run of this model writes it.
CONFIG = """
from __gin__ import dynamic_registration
from jaxscale import run
run.Run.directory = {directory!r}
run.ModelConfig.vocab_size = 258
run.ModelConfig.num_layers = 1
run.ModelConfig.model_dim = 16
run.ModelConfig.max_length = 32
run.ModelConfig.pattern = (@run.LayerConfig(),)
run.AttentionConfig.num_heads = 4
run.AttentionConfig.num_kv_heads = 2
run.AttentionConfig.head_dim = 8
run.FeedForwardConfig.dim = 32
run.DataConfig.sources = (@run.TextSource(),)
run.TextSource.paths = ("absent.txt",)
run.DataConfig.sequence_length = 32
run.DataConfig.batch_size = 1
run.OptimizerConfig.learning_rate = 0.01
run.OptimizerConfig.warmup_steps = 0
run.TrainConfig.steps = 1
run.CheckpointConfig.directory = 'checkpoints'
run.CheckpointConfig.save_every = 1
run.CheckpointConfig.keep_last = 1
run.Policy.compute = 'float32'
run.ExecutionConfig.is_scanned = False
run.ExecutionConfig.remat = 'none'
run.ExecutionConfig.num_loss_chunks = 1
"""


@functools.cache
def params():
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jax.device_put((rng.normal(size=leaf.shape) * 0.3).astype(leaf.dtype)),
        abstract_params(parameter_table(MODEL), "float32"),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's directory with its configuration and a checkpoint of a byte model."""
    directory = tmp_path_factory.mktemp("run")
    (directory / "config.gin").write_text(CONFIG.format(directory=str(directory)))
    made = Run(
        directory=str(directory),
        model=MODEL,
        mesh=MeshConfig(),
        data=DataConfig(sources=(TextSource(("absent.txt",)),), sequence_length=32, batch_size=1),
        optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=0),
        train=TrainConfig(steps=1),
        checkpoint=CheckpointConfig("checkpoints", save_every=1, keep_last=1),
        policy=POLICY,
        execution=EXECUTION,
    )
    checkpoints = Checkpoints(made.checkpoint.within(made.path), **checkpoint_facts(MODEL))
    loader = {"depends_on": {"tokenizer": ByteTokenizer.fingerprint}}
    checkpoints.save(1, {"params": params()}, loader)
    checkpoints.close()
    return made


@functools.cache
def plain_logits():
    decoder = Decoder(MODEL, policy=POLICY, execution=EXECUTION)
    return jax.jit(lambda params, batch: decoder.logits(params, batch)[0])


def batch_of(tokens):
    return {"tokens": tokens, "positions": jnp.broadcast_to(jnp.arange(16), tokens.shape)}


@pytest.fixture(scope="module")
def loaded(run):
    return load(run.directory)


@pytest.fixture(scope="module")
def texts(loaded):
    """What the model continues two texts with."""
    return loaded.generate(["def f", "x"], max_new_tokens=NEW)


def test_from_a_directory_to_logits_and_a_sample(loaded, texts):
    run = nnx.jit(lambda model, tokens: model(tokens))  # op by op it would compile each of them
    logits = run(loaded, loaded.encode("def f(x, y): ret"))
    tokens = jnp.asarray([list(b"def f(x, y): ret")])
    wanted = plain_logits()(params(), batch_of(tokens))
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
    outputs = generate_tokens(
        loaded.decoder,
        params(),
        [list(b"def f"), list(b"x")],
        sampling=SamplingConfig(),
        max_new_tokens=NEW,
        eos_id=256,
        num_tokens=257,
    )
    assert texts == [ByteTokenizer().decode(tokens) for tokens in outputs]


def test_a_model_over_two_devices_continues_a_single_text_as_on_one(run, texts):
    assert load(run, tensor=2).generate("def f", max_new_tokens=NEW) == texts[:1]


def test_a_model_over_two_devices_has_the_logits_of_one(run):
    model = load(run, tensor=2)
    tokens = model.encode("def f(x, y): ret")
    wanted = plain_logits()(params(), batch_of(tokens))
    np.testing.assert_allclose(model(tokens), wanted, atol=1e-5)


def test_a_run_s_directory_may_have_moved(run, texts, tmp_path):
    moved = shutil.copytree(run.directory, tmp_path / "moved")
    (moved / "config.gin").write_text(CONFIG.format(directory="/absent"))
    assert load(moved).generate("def f", max_new_tokens=NEW) == texts[:1]


@pytest.mark.parametrize(
    ("execution", "runtime"),
    [
        (ExecutionConfig(attention="cudnn"), RuntimeConfig()),  # no GPU is here
        (ExecutionConfig(attention="chunked"), RuntimeConfig()),  # not of a prompt's length
        (ExecutionConfig(), RuntimeConfig(is_deterministic=True)),
    ],
)
def test_training_s_attention_is_not_that_of_decoding(run, texts, execution, runtime):
    trained = dataclasses.replace(run, execution=execution, runtime=runtime)
    assert load(trained).generate("def f", max_new_tokens=NEW) == texts[:1]


def test_generate_prints_each_prompt_with_its_continuation(run, texts, capsys):
    assert generate(run=run, prompts=("def f", "x"), max_new_tokens=NEW) == texts
    assert capsys.readouterr().out == f"def f{texts[0]}\n\nx{texts[1]}\n\n"


def test_another_tokenizer_than_the_models_is_refused(run, tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "<|endoftext|>": 1}, []))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    other = TokenizerConfig("huggingface", str(tmp_path))
    data = dataclasses.replace(run.data, tokenizer=other)
    expected = "the tokenizer that the model was trained with, of fingerprint byte"
    with pytest.raises(InputError, match=expected):
        load(dataclasses.replace(run, data=data))


@pytest.mark.parametrize(
    ("change", "prompts", "message"),
    [
        ({}, "", r"prompts\[0\]: given \[\]"),
        ({}, "a" * 30, r"new_tokens - 1 <= model.max_length = 32, here 30 \+ 7 - 1 = 36"),
        ({"model": from_flat(**SHAPE | {"vocab_size": 61})}, "a", r"vocab_size"),
        ({"model": from_flat(**SHAPE | {"num_layers": 3})}, "a", "num_layers=1"),
        ({"model": from_flat(**SHAPE, windows=(4,))}, "a", r"pattern\.0\.attention\.window=None"),
        ({"directory": "/absent"}, "a", r"checkpoint.*there is none"),
        ({"model": dataclasses.replace(MODEL, is_causal=False)}, "a", "is_causal: given False"),
    ],
)
def test_what_does_not_fit_is_refused(run, change, prompts, message):
    with pytest.raises(InputError, match=message):
        generate(run=dataclasses.replace(run, **change), prompts=prompts, max_new_tokens=NEW)


def test_a_checkpoint_that_is_not_there_is_refused(run):
    with pytest.raises(InputError, match=r"step: given 5, expected one of the steps in .*\[1\]"):
        load(run, step=5)


# The model as a flax module


@pytest.fixture(scope="module")
def module():
    return LanguageModel(Decoder(MODEL, policy=POLICY, execution=EXECUTION), params())


def documents():
    """Tokens, positions and segments of two rows of two documents and padding."""
    tokens = (np.arange(32).reshape(2, 16) * 7 + 3) ** 2 % 47
    segments = np.tile(np.repeat([1, 2, 0], (6, 7, 3)), (2, 1))
    positions = np.tile(np.concatenate([np.arange(n) for n in (6, 7, 3)]), (2, 1))
    return tuple(jnp.asarray(array) for array in (tokens, positions, segments))


def test_the_module_equals_the_function(module):
    tokens, positions, segments = documents()
    batch = dict(tokens=tokens, positions=positions, segments=segments)
    wanted = plain_logits()(params(), batch)
    run = nnx.jit(lambda module, *arrays: module(*arrays))
    np.testing.assert_allclose(run(module, *documents()), wanted, atol=1e-6)
    graph, state = nnx.split(module)
    np.testing.assert_allclose(run(nnx.merge(graph, state), *documents()), wanted, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, module.pure_params(), params())


def test_the_module_differentiates(module):
    tokens = documents()[0]

    @nnx.jit
    @nnx.grad
    def gradient(module):
        return (module(tokens) ** 2).mean()

    @jax.jit
    @jax.grad
    def plain(params):
        return (plain_logits()(params, batch_of(tokens)) ** 2).mean()

    wanted = jax.tree.leaves(plain(params()))
    for got, want in zip(jax.tree.leaves(gradient(module)), wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)
