"""PPO's advantages, losses and gradients on one device and on meshes, beside their equations."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale import tree
from jaxscale.models.config import LoraConfig
from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.lora import TRAINABLE, base, without_adapters
from jaxscale.models.parameters import parameter_table
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.rlhf.critic import CRITIC, CriticConfig
from jaxscale.rlhf.experience import advantages, make_experience
from jaxscale.rlhf.ppo import PpoLoss
from jaxscale.train.config import TrainConfig
from jaxscale.train.setup import make_region
from jaxscale.types import InputError
from tests.parallel.comparison import KEY, dense, make_params, relative_errors
from tests.rlhf.rewarded import MESHES
from tests.rlhf.test_policy import LENGTH, MODEL, POLICY, SIZES, log_p
from tests.rlhf.test_policy import make_batch as make_answers

# Of another depth and width than the policy, with adapters of its own.
CRITIC_MODEL = dataclasses.replace(
    dense(max_length=32, num_layers=1, model_dim=24, use_qk_norm=False),
    use_value_head=True,
    lora=LoraConfig(rank=3, alpha=2.0),
)
LOSS = PpoLoss(
    model=MODEL,
    policy=POLICY,
    execution=ExecutionConfig(num_loss_chunks=2),
    critic=CRITIC_MODEL,
    gamma=0.9,
    gae_lambda=0.8,
    kl_penalty=0.3,
    score_clip=1.5,
)
TRAINED = rf"{TRAINABLE}|{CRITIC}/.*"
REWARDS = np.array([[0.4, -9, 1.2, 7], [0, -0.3, 0.8, 1]])


def make_all():
    return make_params(MODEL) | {CRITIC: make_params(CRITIC_MODEL)}


def values_of(params):
    """Those of every token, by the head's matrix."""
    batch = {name: make_answers()[name] for name in ("tokens", "positions")}
    critic = Decoder(CRITIC_MODEL, policy=POLICY)
    x, *_ = critic.run_layers(params, critic.embed(params, batch), critic.tokens(batch))
    return critic.hidden(params, x) @ params["value_head"]["weights"][0]


@functools.cache
def said():
    """(log p, that of the reference, values) of every token, as numpy."""
    with jax.enable_x64(True):

        def of(params):
            reference = log_p(without_adapters(MODEL), base(params))
            return log_p(MODEL, params), reference, values_of(params[CRITIC])

        return [np.asarray(each) for each in jax.jit(of)(make_all())]


@functools.cache
def make_batch():
    """Answers with what was said of them before, which is near to what is said now."""
    rng, shape = np.random.default_rng(0), (len(SIZES), LENGTH)
    now, _, values = said()
    batch = {name: array for name, array in make_answers().items() if name != "advantages"}
    return batch | {
        "log_p": now + 0.3 * rng.normal(size=shape),
        "values": values + 0.3 * rng.normal(size=shape),
        "advantages": rng.normal(size=shape),
    }


def by_equation(params, batch):
    """(sum of losses, {figure: sum}); a clipped ratio or value has no gradient of its own."""
    p, values = log_p(MODEL, params), values_of(params[CRITIC])
    ratio, advantage = jnp.exp(p) / jnp.exp(batch["log_p"]), batch["advantages"]
    is_beyond = jnp.where(advantage > 0, ratio > 1.2, ratio < 0.8)
    bound = jnp.where(advantage > 0, 1.2, 0.8)
    gain = advantage * jnp.where(is_beyond, bound, ratio)
    wanted, old = batch["values"] + advantage, batch["values"]
    far = jnp.abs(values - old) > 0.2
    near = old + 0.2 * jnp.sign(values - old)
    is_near_worse = far & (jnp.abs(near - wanted) > jnp.abs(values - wanted))
    error = jnp.where(is_near_worse, near, values) - wanted
    sums = {
        "policy_loss": -gain,
        "value_loss": error**2 / 2,
        "entropy": -p,
        "clipped": (ratio < 0.8) | (ratio > 1.2),
    }
    sums = {name: (each * batch["weights"]).sum() for name, each in sums.items()}
    return sums["policy_loss"] + sums["value_loss"], sums


@functools.cache
def wanted():
    with jax.enable_x64(True):
        run = jax.jit(jax.value_and_grad(by_equation, has_aux=True))
        (loss, sums), gradient = run(make_all(), make_batch())
        return float(loss), jax.device_get(sums), tree.select(gradient, TRAINED)


def assert_are_wanted(sums, gradient):
    loss, wanted_sums, wanted_gradient = wanted()
    found, weight, figures = sums
    np.testing.assert_allclose(found, loss, rtol=1e-10)
    num_tokens = sum(answer for _, answer in SIZES)
    assert weight == num_tokens and 0 < figures["clipped"] < num_tokens
    assert figures.keys() == wanted_sums.keys()
    for name, value in wanted_sums.items():
        np.testing.assert_allclose(figures[name], value, rtol=1e-10, err_msg=name)
    errors = relative_errors(gradient, wanted_gradient)
    assert sum(path.startswith(CRITIC) for path in errors) > 20 and len(errors) > 40
    assert all(error < 1e-10 for error in errors.values()), errors


@pytest.mark.long
def test_loss_and_gradient_are_those_of_the_equation():
    batch = make_batch()
    with jax.enable_x64(True):

        def total(params):
            sums = LOSS(params, batch, None)
            return sums[0], sums

        gradient, sums = jax.jit(jax.grad(total, has_aux=True))(make_all())
        assert_are_wanted(sums, tree.select(gradient, TRAINED))


def by_sums(rewards, values, gamma, gae_lambda):
    """The advantages of one answer's tokens by equation 16, each its own sum."""
    after = np.append(values[1:], 0)
    errors = rewards + gamma * after - values
    return [
        sum((gamma * gae_lambda) ** k * error for k, error in enumerate(errors[first:]))
        for first in range(len(errors))
    ]


def wanted_advantages(rewards):
    """Of the answers [B, T], 0 elsewhere."""
    now, reference, values = said()
    found = np.zeros((len(SIZES), LENGTH))
    for row, (prompt, size) in enumerate(SIZES):
        if size:
            own = slice(prompt - 1, prompt + size - 1)
            of_tokens = -0.3 * (now - reference)[row, own]
            of_tokens[-1] += np.clip(rewards[row], -1.5, 1.5)
            found[row, own] = by_sums(of_tokens, values[row, own], 0.9, 0.8)
    return found


def region_of(sizes):
    mesh = MeshConfig(**sizes)
    return make_region(
        table=parameter_table(MODEL) | {CRITIC: CriticConfig(CRITIC_MODEL).table()},
        mesh=mesh,
        train=TrainConfig(steps=1, num_microbatches=2, trainable=TRAINED),
        policy=POLICY,
        devices=jax.devices()[: math.prod(mesh.sizes)],
    )


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_mesh_has_the_same_experience_loss_and_gradient(sizes):
    with jax.enable_x64(True):
        region = region_of(sizes)
        assert_are_wanted(*jax.jit(region.gradient(LOSS))(make_all(), make_batch(), KEY))
        rows = {name: each for name, each in make_answers().items() if name != "advantages"}
        ready, figures = make_experience(LOSS, region)(make_all(), rows, REWARDS)
        is_answer = rows["weights"] != 0
        now, reference, values = said()
        for name, wanted in (("log_p", now), ("values", values)):
            np.testing.assert_allclose(ready[name], wanted * is_answer, rtol=1e-9, err_msg=name)
        wanted = wanted_advantages(REWARDS.reshape(-1))
        np.testing.assert_allclose(ready["advantages"], wanted, rtol=1e-9, atol=1e-12)
        kl = np.exp(reference) / np.exp(now) - 1 - (reference - now)
        np.testing.assert_allclose(figures["kl"], kl[is_answer].mean(), rtol=1e-9)


def test_advantages_are_their_sums_in_float32_whatever_stands_beside_an_answer():
    rng = np.random.default_rng(1)
    sizes = ((0, 37), (5, 1), (36, 1), (11, 13), (3, 0))
    rewards, values = rng.normal(size=(2, len(sizes), 37)).astype(np.float32)
    weights, wanted = np.zeros_like(rewards), np.zeros(rewards.shape)
    for row, (first, size) in enumerate(sizes):
        own = slice(first, first + size)
        weights[row, own] = 1
        wide = (each[row, own].astype(float) for each in (rewards, values))
        wanted[row, own] = by_sums(*wide, 0.99, 0.95)
    rewards, values = (np.where(weights == 0, np.nan, each) for each in (rewards, values))
    found = jax.jit(functools.partial(advantages, gamma=0.99, gae_lambda=0.95))(
        rewards, values, weights
    )
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-6)


def test_advantages_and_losses_are_those_of_deepspeed_chat(monkeypatch):
    """Written by experiments/preferences/deepspeed_chat_fixture.py."""
    file = Path(__file__).parent / "fixtures" / "deepspeed_chat.json"
    for case in json.loads(file.read_text()):
        given = {name: np.array(each) for name, each in case["given"].items()}
        weights = np.zeros_like(given["log_p"])
        weights[:, case["start"] :] = 1
        rewards = 0.1 * (given["reference"] - given["log_p"])
        rewards[:, -1] += np.clip(case["scores"], -5, 5)
        with jax.enable_x64(True):
            settings = dict(gamma=0.97, gae_lambda=0.9)
            found = advantages(rewards, given["values"], weights, **settings)
            np.testing.assert_allclose(found[:, case["start"] :], case["advantages"], rtol=1e-12)
            batch = {name: given[name] for name in ("log_p", "values")}
            batch |= {"weights": weights, "advantages": found}
            new = {"log_probabilities": given["new_log_p"], "critic_values": given["new_values"]}
            for name, array in new.items():
                monkeypatch.setattr(f"jaxscale.rlhf.ppo.{name}", lambda *_, array=array: array)
            _, weight, figures = LOSS(None, batch, None)
            losses = [figures[name] / weight for name in ("policy_loss", "value_loss")]
        np.testing.assert_allclose(losses, case["losses"], rtol=1e-12)


NO_ADAPTERS = without_adapters(MODEL)
BAD = {
    "no adapters": (dict(model=NO_ADAPTERS), r"ModelConfig\.lora: given None"),
    "gamma": (dict(gamma=1.1), r"ppo_loss\.gamma: given 1\.1, expected from 0 to 1"),
    "lambda": (dict(gae_lambda=-0.1), r"ppo_loss\.gae_lambda: given -0\.1"),
    "price": (dict(kl_penalty=-1.0), r"ppo_loss\.kl_penalty: given -1\.0"),
    "no score": (dict(score_clip=0.0), r"ppo_loss\.score_clip: given 0\.0"),
    "values that stay": (dict(value_clip=0.0), r"ppo_loss\.value_clip: given 0\.0"),
    "ratio": (dict(ratio_clip=1.0), r"ppo_loss\.ratio_clip: given 1\.0"),
    "epochs": (dict(num_epochs=0), r"ppo_loss\.num_epochs: given 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_has_no_meaning_is_refused(name):
    fields, message = BAD[name]
    with pytest.raises(InputError, match=message):
        dataclasses.replace(LOSS, **fields)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (dataclasses.replace(CRITIC_MODEL, use_value_head=False), "use_value_head: given False"),
        (dataclasses.replace(CRITIC_MODEL, is_causal=False), "is_causal: given False"),
    ],
)
def test_a_critic_without_values_of_what_is_to_come_is_refused(model, message):
    with pytest.raises(InputError, match=message):
        CriticConfig(model)
