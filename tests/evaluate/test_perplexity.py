"""Held-out figures against a loop over the documents, on several meshes.

Every held-out token counts once.
"""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.checkpoint.manager import CheckpointConfig, Checkpoints
from jaxscale.data.loader import DataConfig
from jaxscale.data.sources import TextSource
from jaxscale.data.split import hash_text, is_held_out
from jaxscale.data.tokenizer import TokenizerConfig, load_tokenizer, train_tokenizer
from jaxscale.evaluate.perplexity import BitsPerByte
from jaxscale.models.config.facts import checkpoint_facts, from_flat
from jaxscale.models.decoder import Decoder
from jaxscale.models.evaluation import EvaluationContext, check_evaluators
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.parameters import init_params, parameter_table
from jaxscale.models.quantised import QuantisedConfig, dequantised, quantised
from jaxscale.ops.precision import Policy
from jaxscale.parallel.mesh import MeshConfig, make_mesh
from jaxscale.run.evaluate import evaluate
from jaxscale.run.run import Run
from jaxscale.train.config import TrainConfig
from jaxscale.train.optim import OptimizerConfig
from jaxscale.types import InputError

FLOAT32 = Policy(compute="float32")
LENGTH = 32
FIELDS = dict(
    vocab_size=258,
    num_layers=2,
    model_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=32,
    max_length=LENGTH,
    moe_pattern=(False, True),
    num_experts=4,
    expert_dim=16,
    init_std=0.2,
)
MODEL = from_flat(**FIELDS)


DATA_STATE = {"depends_on": {"tokenizer": "byte", "held_out_fraction": 0.6, "held_out_by": "text"}}


@pytest.fixture
def texts(tmp_path):
    """40 documents of 1 to 70 characters, some longer than a row.

    One of them not of ASCII alone.
    """
    rng = np.random.default_rng(0)
    texts = {
        f"{i}.txt": "".join(map(chr, rng.integers(97, 123, 1 + i * 70 // 40))) + "é" * (i == 7)
        for i in range(40)
    }
    (tmp_path / "texts").mkdir()
    for name, text in texts.items():
        (tmp_path / "texts" / name).write_text(text, encoding="utf-8")
    return texts


@pytest.fixture
def data(tmp_path, texts):
    source = TextSource(paths=(str(tmp_path / "texts"),))
    return DataConfig(
        sources=(source,),
        sequence_length=LENGTH,
        batch_size=8,
        held_out_fraction=0.6,
        cache_directory=str(tmp_path / "cache"),
    )


def held_out(texts, data):
    return [
        text.encode()
        for text in texts.values()
        if is_held_out([hash_text(text)], data.held_out_fraction)[0]
    ]


def num_scored_bytes(documents):
    """A token is a byte, and the first one of a document is given."""
    return sum(len(document) - 1 for document in documents)


def naive_figures(params, documents):
    """Each document in pieces of a row, alone, without padding, in float64 sums."""
    nll, count = 0.0, 0
    for document in documents:
        tokens = np.array([*document, 256])
        for start in range(0, len(tokens), LENGTH):
            labels = tokens[start + 1 : start + LENGTH + 1]
            row = np.zeros((1, LENGTH), np.int32)
            row[0, : len(tokens[start : start + LENGTH])] = tokens[start : start + LENGTH]
            batch = {"tokens": row, "positions": np.arange(LENGTH)[None]}
            logits = np.asarray(FORWARD(params, batch))[0, : len(labels)].astype(np.float64)
            probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            nll -= np.log(probabilities[np.arange(len(labels)), labels]).sum()
            count += len(labels)
    return {
        "held_out/loss": nll / count,
        "held_out/perplexity": np.exp(nll / count),
        "held_out/bits_per_byte": nll / np.log(2) / num_scored_bytes(documents),
    }


FORWARD = jax.jit(lambda params, batch: Decoder(MODEL, policy=FLOAT32).logits(params, batch)[0])


@pytest.fixture
def run(tmp_path, data):
    """A run whose directory has two checkpoints."""
    config = CheckpointConfig(directory="checkpoints", save_every=1, keep_last=2)
    checkpoints = Checkpoints(
        dataclasses.replace(config, directory=str(tmp_path / "checkpoints")),
        **checkpoint_facts(MODEL),
    )
    for step in (1, 2):
        checkpoints.save(
            step,
            {"params": init_params(parameter_table(MODEL), jax.random.key(step), "float32")},
            DATA_STATE,
        )
    checkpoints.close()
    return Run(
        directory=str(tmp_path),
        model=MODEL,
        mesh=MeshConfig(data=8),
        data=data,
        optimizer=OptimizerConfig(),
        train=TrainConfig(steps=1),
        checkpoint=config,
        policy=FLOAT32,
        execution=ExecutionConfig(num_loss_chunks=2),
    )


def measure(run, step=None, **changes):
    return evaluate(run=dataclasses.replace(run, **changes), step=step)


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(data=8, zero=3), MeshConfig(data=2, expert=2, tensor=2)],
    ids=["data", "data expert tensor"],
)
def test_figures_are_the_naive_ones_on_any_mesh(run, mesh, texts, capsys, tmp_path):
    figures = measure(run, mesh=mesh)
    wanted = naive_figures(
        init_params(parameter_table(MODEL), jax.random.key(2), "float32"), held_out(texts, run.data)
    )
    assert figures.keys() == wanted.keys()
    printed = capsys.readouterr().out
    for name, value in wanted.items():
        assert math.isclose(figures[name], value, rel_tol=2e-5), (
            name
        )  # float32 rounding of the forward
        assert f"{figures[name]:.6g}" in printed
    assert json.loads((tmp_path / "evaluation_2.json").read_text()) == {"step": 2, **figures}


def test_documents_that_may_have_been_trained_on_are_warned_of(run, data, caplog):
    evaluators = {"nothing": lambda context: {}}
    measure(run, evaluators=evaluators)
    assert not caplog.text
    more = dataclasses.replace(data, held_out_fraction=0.7)
    measure(run, evaluators=evaluators, data=more)
    assert "0.7 is above the 0.6 of the training" in caplog.text


def test_evaluators_are_named_by_the_caller_and_see_the_wanted_step(run):
    def seen(context):
        wanted = init_params(parameter_table(MODEL), jax.random.key(1), "float32")
        same = jax.tree.map(lambda a, b: bool((a == b).all()), context.params, wanted)
        return {"step": context.step, "same": all(jax.tree.leaves(same))}

    figures = measure(run, step=1, evaluators={"seen": seen})
    assert figures == {"seen/step": 1, "seen/same": True}


@pytest.mark.long
def test_the_model_that_is_measured_may_have_rounded_weights(run, tmp_path):
    few = QuantisedConfig(4, embedding_bits=8)

    def seen(context):
        params = init_params(parameter_table(MODEL), jax.random.key(2), "float32")
        rounded = quantised(params, parameter_table(MODEL), few)
        wanted = dequantised(rounded, "float32")
        same = jax.tree.map(lambda a, b: bool((a == b).all()), context.params, wanted)
        return {"same": all(jax.tree.leaves(same))}

    run = dataclasses.replace(run, evaluators={"seen": seen})
    assert evaluate(run=run, quantisation=few) == {"seen/same": True}
    (path,) = tmp_path.glob("evaluation_*")
    assert path.name == "evaluation_2_bits_4_embedding_bits_8.json"


def counted(evaluator):
    """What an evaluator returns for a model that loses 2 nats on each token.

    And the labels it was asked for.
    """
    labels = []
    return evaluator(counting_context(labels)), labels


def counting_context(labels):
    def sums(params, batch, key):
        labels.extend(batch["labels"][batch["weights"] > 0].tolist())
        weight = jnp.asarray(batch["weights"]).sum()
        return 9 * weight, weight, {"nll": 2 * weight}

    mesh = make_mesh(MeshConfig(data=jax.device_count()))
    return EvaluationContext(
        params=None,
        step=0,
        model=MODEL,
        mesh=mesh,
        sums=sums,
        place=lambda batch: batch,
        engine=lambda parameter, tensor: None,
        check_data=lambda name, data: None,
    )


def test_every_held_out_token_counts_once(data, texts):
    documents = held_out(texts, data)
    figures, labels = counted(BitsPerByte(data))
    assert sorted(labels) == sorted(
        token for document in documents for token in [*document[1:], 256]
    )
    assert figures["loss"] == 2
    assert math.isclose(
        figures["bits_per_byte"], 2 / math.log(2) * len(labels) / num_scored_bytes(documents)
    )
    assert counted(BitsPerByte(data))[1] == labels
    evaluator = BitsPerByte(data)
    assert counted(evaluator) == counted(evaluator), "a second pass is as the first"


@pytest.mark.parametrize("kind", ["byte", "huggingface", "sentencepiece"])
def test_models_with_different_tokenizers_can_be_compared(tmp_path, kind):
    """One that pays 2 bits for each byte it predicts has 2 bits a byte, however short the texts."""
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 103, 4))) for _ in range(30)]
    (tmp_path / "texts").mkdir()
    for number in range(300):
        text = " ".join(rng.choice(words, 2))[:8]
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    sources, config = (TextSource((str(tmp_path / "texts"),)),), TokenizerConfig()
    if kind != "byte":
        trained = "bpe" if kind == "huggingface" else kind
        train_tokenizer(sources=sources, output=str(tmp_path), vocab_size=290, kind=trained)
        config = TokenizerConfig(kind, str(tmp_path))
    tokenizer = load_tokenizer(config)

    def sums(params, batch, key):
        predicted = batch["labels"][batch["weights"] > 0]
        num_bytes = sum(len(tokenizer.decode([token]).encode()) for token in predicted.tolist())
        return 0, batch["weights"].sum(), {"nll": 2 * math.log(2) * num_bytes}

    data = DataConfig(
        sources, 16, 8, tokenizer=config, held_out_fraction=0.5, cache_directory=str(tmp_path)
    )
    figures = BitsPerByte(data)(dataclasses.replace(counting_context([]), sums=sums))
    assert math.isclose(figures["bits_per_byte"], 2, rel_tol=1e-6)


def test_documents_of_single_tokens_are_refused(tmp_path):
    for character in "abcdefgh":
        (tmp_path / f"{character}.txt").write_text(character)
    sources = (TextSource((str(tmp_path),)),)
    data = DataConfig(sources, 8, 8, held_out_fraction=0.5, cache_directory=str(tmp_path / "c"))
    with pytest.raises(InputError, match="held-out documents with more than one token"):
        BitsPerByte(data).check(counting_context([]))


def test_a_bounded_pass_takes_some_batches(data):
    data = dataclasses.replace(data, batch_size=1)
    whole, labels = counted(BitsPerByte(data))
    bounded, some = counted(BitsPerByte(data, max_batches=3))
    assert 0 < len(some) <= 3 * LENGTH < len(labels)
    assert bounded == whole
    assert counted(BitsPerByte(data, max_batches=10**6))[1] == labels


def test_what_does_not_fit_is_refused(run, data, tmp_path):
    with pytest.raises(InputError, match=r"held_out_fraction: given 0, expected above 0"):
        BitsPerByte(dataclasses.replace(data, held_out_fraction=0.0))
    with pytest.raises(InputError, match=r"BitsPerByte.max_batches: given 0"):
        BitsPerByte(data, max_batches=0)
    with pytest.raises(InputError, match=r"model.vocab_size: given 256"):
        context = EvaluationContext(None, 0, from_flat(**FIELDS | {"vocab_size": 256}), *[None] * 5)
        check_evaluators({"held_out": BitsPerByte(data)}, context)
    with pytest.raises(InputError, match=r"leaves documents in the split 'held_out'"):
        BitsPerByte(dataclasses.replace(data, held_out_fraction=1e-9)).check(counting_context([]))
    for unbuilt in (BitsPerByte, functools.partial(BitsPerByte, data)):
        with pytest.raises(
            InputError,
            match=r"evaluators\['a'\]: given .*BitsPerByte.*@BitsPerByte\(\) with brackets",
        ):
            check_evaluators({"a": unbuilt}, context)
    with pytest.raises(InputError, match=r"sequence_length <= max_length = 16"):
        measure(run, model=from_flat(**FIELDS | {"max_length": 16}))
    with pytest.raises(InputError, match=r"number of devices, 8"):
        measure(run, mesh=MeshConfig(data=4))
    with pytest.raises(InputError, match=r"one of the steps .*\[1, 2\]"):
        measure(run, step=3)
    assert not list(tmp_path.glob("evaluation_*"))
    (tmp_path / "evaluation_2.json").mkdir()
    with pytest.raises(
        InputError, match=r"directory: given .*evaluation_2\.json', .* \(Is a directory\)"
    ):
        measure(run, evaluators={"nothing": lambda context: {}})
