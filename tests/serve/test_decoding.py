"""Generation with a cache against the full forward, whatever the batch, the padding and the model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from jaxscale.checkpoint.manager import CheckpointConfig, Checkpoints
from jaxscale.data.tokenizer import ByteTokenizer, TokenizerConfig
from jaxscale.models.config import ModelConfig, checkpoint_facts
from jaxscale.models.parameters import abstract_params
from jaxscale.models.transformer import forward
from jaxscale.ops.precision import Policy
from jaxscale.serve.generate import PADDING, advance, empty_caches, generate, generate_tokens
from jaxscale.serve.sampling import SamplingConfig, sample, token_keys
from jaxscale.types import InputError

FLOAT32 = Policy(compute="float32")
TOLERANCE = 2e-5  # float32 rounding of logits of size 1, summed in another order
GREEDY = SamplingConfig(temperature=0)
SMALL = dict(
    vocab_size=61,
    num_layers=2,
    model_dim=16,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    ffn_dim=32,
    max_length=32,
)
MODELS = {
    "dense": ModelConfig(**SMALL),
    "grouped queries, window, qk norm": ModelConfig(
        **SMALL
        | dict(
            num_kv_heads=2,
            windows=(None, 3),
            use_qk_norm=True,
            logit_softcap=5.0,
            attention_softcap=9.0,
        )
    ),
    "learned positions, layernorm": ModelConfig(
        **SMALL
        | dict(
            positions="learned", norm="layernorm", use_bias=True, activation="gelu", is_tied=True
        )
    ),
    "experts with prefix": ModelConfig(
        **SMALL
        | dict(
            num_layers=5,
            num_dense_prefix=1,
            moe_pattern=(False, True),
            num_experts=4,
            expert_dim=16,
            num_kv_heads=1,
        )
    ),
}
PROMPTS = [[7, 3, 9, 60, 1], [5], [2, 2, 8]]


@functools.cache
def params_of(config):
    """Normal draws by numpy: to compile `init_params` takes longer than all else here."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, leaf.dtype),
        abstract_params(config, "float32"),
    )


@functools.partial(jax.jit, static_argnames="config")
def full_forward(params, tokens, *, config):
    batch = {"tokens": tokens, "positions": jnp.arange(tokens.shape[1])[None]}
    return forward(params, batch, config=config, policy=FLOAT32)[0]


def full_logits(params, tokens, config):
    """Logits [T, V] of one sequence by the full forward; zeros on the right, which no token sees, fill its row."""
    row = np.zeros((1, config.max_length), np.int32)
    row[0, : len(tokens)] = tokens
    return full_forward(params, row, config=config)[0, : len(tokens)]


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
def test_cached_logits_equal_full_forward_logits(config):
    """Ragged prompts padded on the left, then four single tokens a row."""
    params, width, steps = params_of(config), max(map(len, PROMPTS)) + 2, 4
    rows = [
        [*prompt, *np.random.default_rng(len(prompt)).integers(0, 61, steps).tolist()]
        for prompt in PROMPTS
    ]
    pads = [width - len(prompt) for prompt in PROMPTS]
    tokens = np.asarray([[0] * pad + row for pad, row in zip(pads, rows, strict=True)])
    positions = np.asarray(
        [[PADDING] * pad + list(range(len(row))) for pad, row in zip(pads, rows, strict=True)]
    )
    run = functools.partial(
        jax.jit(functools.partial(advance, config=config, policy=FLOAT32)), params
    )
    logits, caches = run(
        tokens[:, :width], positions[:, :width], empty_caches(config, 3, width + steps, "float32")
    )
    cached = [logits]
    for i in range(width, width + steps):
        logits, caches = run(tokens[:, i : i + 1], positions[:, i : i + 1], caches)
        cached.append(logits)
    for row, got in zip(rows, np.stack(cached, 1), strict=True):
        wanted = full_logits(params, row, config)[-steps - 1 :]
        np.testing.assert_allclose(got, wanted, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["dense", "experts with prefix"])
def test_greedy_is_the_arg_max_of_the_full_forward(name):
    config = MODELS[name]
    params = params_of(config)
    got = generate_tokens(
        params, PROMPTS, config=config, sampling=GREEDY, max_new_tokens=6, policy=FLOAT32
    )
    for prompt, new in zip(PROMPTS, got, strict=True):
        logits = full_logits(params, [*prompt, *new], config)
        assert new == jnp.argmax(logits[len(prompt) - 1 : -1], -1).tolist()


def sampled(prompts, *, max_new_tokens=8, **settings):
    config = MODELS["dense"]
    settings = dict(sampling=SamplingConfig(seed=5), policy=FLOAT32) | settings
    return generate_tokens(
        params_of(config), prompts, config=config, max_new_tokens=max_new_tokens, **settings
    )


def test_each_draw_is_of_the_full_forwards_logits_with_the_key_of_its_position():
    config, numbers = MODELS["dense"], [3, 9, 1]
    for prompt, number, new in zip(
        PROMPTS, numbers, sampled(PROMPTS, sequences=numbers), strict=True
    ):
        logits = full_logits(params_of(config), [*prompt, *new], config)[len(prompt) - 1 : -1]
        positions = jnp.arange(len(prompt), len(prompt) + len(new))
        keys = token_keys(jax.random.key(5), jnp.full(len(new), number), positions)
        assert new == sample(logits, keys, SamplingConfig()).tolist()


def test_tokens_that_the_tokenizer_does_not_know_are_not_drawn():
    assert max(map(max, sampled(PROMPTS))) >= 20
    drawn = sampled(PROMPTS, num_tokens=20)
    assert max(map(max, drawn)) < 20 and len({token for row in drawn for token in row}) > 5


def test_seeds_reproduce_and_differ():
    assert sampled(PROMPTS) == sampled(PROMPTS)
    assert sampled(PROMPTS) != sampled(PROMPTS, sampling=SamplingConfig(seed=6))
    same = sampled([[1, 2]] * 2)
    assert same[0] != same[1], "two sequences with one prompt draw apart"


def test_a_sequence_samples_the_same_alone_and_in_a_batch():
    together = sampled(PROMPTS)
    assert [sampled([prompt], sequences=[i])[0] for i, prompt in enumerate(PROMPTS)] == together
    assert sampled(PROMPTS[::-1], sequences=[2, 1, 0]) == together[::-1]
    assert [row[:3] for row in together] == sampled(PROMPTS, max_new_tokens=3)


def test_the_end_token_ends_its_row_only():
    free = sampled(PROMPTS)
    eos_id = free[1][2]
    stopped = sampled(PROMPTS, eos_id=eos_id)
    assert stopped == [row[: row.index(eos_id) + 1] if eos_id in row else row for row in free]
    assert len(stopped[1]) <= 3 < max(map(len, stopped))


@pytest.mark.parametrize(
    ("prompts", "max_new_tokens", "message"),
    [
        ([], 4, r"prompts: given \[\], expected at least one prompt"),
        ([[1], []], 4, r"prompts\[1\]: given \[\], expected at least one token"),
        (
            [[1], [61]],
            4,
            r"prompts\[1\]: given 61, expected tokens with 0 <= token < vocab_size = 61",
        ),
        ([[-1]], 4, r"prompts\[0\]: given -1"),
        ([[1] * 29], 4, r"<= model.max_length = 32, here 29 \+ 4 = 33"),
        ([[1]], 0, "max_new_tokens: given 0"),
    ],
)
def test_bad_prompts_are_named(prompts, max_new_tokens, message):
    with pytest.raises(InputError, match=message):
        sampled(prompts, max_new_tokens=max_new_tokens)


@pytest.fixture
def run(tmp_path):
    """Arguments of `generate` for a run's directory with a checkpoint of a byte model."""
    model = dataclasses.replace(MODELS["dense"], vocab_size=257)
    config = CheckpointConfig(directory="checkpoints", save_every=1, keep_last=1)
    checkpoints = Checkpoints(
        dataclasses.replace(config, directory=str(tmp_path / "checkpoints")),
        **checkpoint_facts(model),
    )
    checkpoints.save(
        1, {"params": params_of(model)}, {"depends_on": {"tokenizer": ByteTokenizer.fingerprint}}
    )
    checkpoints.close()
    return dict(
        directory=str(tmp_path),
        model=model,
        tokenizer=TokenizerConfig(),
        checkpoint=config,
        policy=FLOAT32,
        max_new_tokens=7,
    )


def test_generate_continues_text_from_a_checkpoint(run, capsys):
    texts = generate(**run, prompts=("def f", "x"))
    wanted = generate_tokens(
        params_of(run["model"]),
        [list(b"def f"), list(b"x")],
        config=run["model"],
        sampling=SamplingConfig(),
        max_new_tokens=7,
        eos_id=256,
        policy=FLOAT32,
    )
    assert texts == [ByteTokenizer().decode(tokens) for tokens in wanted]
    assert capsys.readouterr().out == f"def f{texts[0]}\n\nx{texts[1]}\n\n"
    assert generate(**run, prompts="def f") == texts[:1], "a single text is one prompt"


def test_generate_refuses_another_tokenizer_than_the_models(run, tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "<|endoftext|>": 1}, []))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        InputError, match="the tokenizer that the model was trained with, of fingerprint byte"
    ):
        generate(**run | {"tokenizer": TokenizerConfig("huggingface", str(tmp_path))}, prompts="a")


def test_generate_refuses_what_does_not_fit(run):
    with pytest.raises(InputError, match=r"prompts\[0\]: given \[\]"):
        generate(**run, prompts="")
    with pytest.raises(InputError, match=r"model\.vocab_size"):
        generate(**run | {"model": MODELS["dense"]}, prompts="a")
    with pytest.raises(InputError, match="num_layers"):
        generate(**run | {"model": dataclasses.replace(run["model"], num_layers=3)}, prompts="a")
    with pytest.raises(InputError, match=r"checkpoint.*there is none"):
        generate(**run | {"directory": run["directory"] + "/absent"}, prompts="a")
