"""A model that learns from rewards of what it writes: rows, draws, whole runs by gin files."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale import cli
from jaxscale.data.prompt_loader import PromptLoader
from jaxscale.data.prompts import Prompt
from jaxscale.data.tokenizer_kinds import ByteTokenizer
from jaxscale.launch import memory
from jaxscale.launch.memory import bytes_on_one_device
from jaxscale.models.config import LongRopeScaling, RotaryConfig
from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.parameters import init_params, parameter_table
from jaxscale.rlhf import rollouts
from jaxscale.rlhf.policy import PolicyLoss
from jaxscale.rlhf.rewards import ExactMatch
from jaxscale.rlhf.rollouts import Answer, HeldOutRewards, RolloutConfig, Rollouts, advantages
from jaxscale.run.rollouts import make_answering, prompt_loader
from jaxscale.run.run import load_run
from jaxscale.serve.hybrid_engine import HybridEngine
from jaxscale.train.metrics import read_history
from jaxscale.types import InputError
from tests.data.chat_tokenizer import as_messages
from tests.parallel.comparison import dense, make_params
from tests.rlhf.counting import digits
from tests.rlhf.rewarded import write_run
from tests.serve.engines import FLOAT32, one_device


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewarded")
    write_run(path)
    return path


def trained(folder, name, *words):
    """The history of a run of its own directory, by step."""
    directory = folder / name
    words = [str(folder / "run.gin"), f"--set=directory={directory}", *words]
    assert cli.main(["pretrain", *words]) == 0
    return {line["step"]: line for line in read_history(directory / "metrics.jsonl")[::-1]}


def test_what_is_rewarded_is_written_more_often_also_to_prompts_that_were_held_out(folder):
    steps = trained(folder, "rising")
    assert steps[1]["reward"] < 0.1 and steps[1]["reward_deviation"] > 0
    assert steps[39]["reward"] > 0.9 and steps[39]["entropy"] < steps[1]["entropy"]
    words = [str(folder / "run.gin"), f"--set=directory={folder / 'rising'}", "--set=evaluators={}"]
    assert cli.main(["evaluate", *words]) == 0
    figures = json.loads((folder / "rising" / "evaluation_40.json").read_text())
    assert figures["held_out/reward"] > 0.9


SHORT = ["--set=evaluators={}", "--set=checkpoint.save_every=3", "--set=train.steps=6"]


@pytest.fixture(scope="module")
def base(folder):
    """The history of a run of six steps."""
    return trained(folder, "base", *SHORT)


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(folder, base):
    shutil.copytree(folder / "base", folder / "stopped")
    shutil.rmtree(folder / "stopped" / "checkpoints" / "6")
    stopped = trained(folder, "stopped", *SHORT)
    for step in (4, 5, 6):
        for figure in ("reward", "loss", "answer_tokens", "gradient_norm"):
            assert stopped[step][figure] == base[step][figure], (step, figure)


@pytest.mark.parametrize("tensor", [1, pytest.param(4, marks=pytest.mark.long)])
def test_on_a_mesh_the_same_answers_are_written_and_learned_from(folder, base, tensor):
    words = ["--set=mesh.data=4", "--set=mesh.tensor=2", f"--set=rollouts.tensor={tensor}"]
    meshed = trained(folder, f"meshed_{tensor}", *SHORT, *words)
    for step in (1, 2):
        assert meshed[step]["reward"] == base[step]["reward"]
        assert meshed[step]["gradient_norm"] == pytest.approx(base[step]["gradient_norm"], rel=1e-4)


ADAPTED = """
from __gin__ import dynamic_registration
from jaxscale import run
include '{folder}/adapted/config.gin'
run.policy_loss.beta = {beta}
run.TrainConfig.steps = 30
run.OptimizerConfig.learning_rate = 0.03
"""


@pytest.mark.long
def test_a_price_keeps_adapters_near_the_reference(folder, base):
    words = [str(folder / "base"), str(folder / "adapted"), "--set=lora.rank=2"]
    assert cli.main(["adapt", *words, "--admit=tests.rlhf"]) == 0
    means = {}
    for beta in (0.01, 3.0):
        (folder / "adapted.gin").write_text(ADAPTED.format(folder=folder, beta=beta))
        directory = folder / f"adapted_{beta}"
        words = [f"--set=directory={directory}", "--admit=tests.rlhf"]
        assert cli.main(["pretrain", str(folder / "adapted.gin"), *words]) == 0
        history = read_history(directory / "metrics.jsonl")
        first, *others = [line["kl"] for line in history if "kl" in line]
        assert first == pytest.approx(0, abs=1e-7)
        means[beta] = np.mean(others[10:])
    assert 0 < means[3.0] < means[0.01] / 2


def test_inspect_says_what_a_copy_that_writes_takes(folder, capsys):
    sizes = []
    for tensor in (1, 2):
        words = [str(folder / "run.gin"), f"--set=rollouts.tensor={tensor}"]
        assert cli.main(["inspect", *words]) == 0
        shown = capsys.readouterr().out
        sizes.append(float(re.search(r"^writing +([\d.]+) KiB per device", shown, re.M)[1]))
    assert 0.5 <= sizes[1] / sizes[0] < 0.7  # norms are not spread


@pytest.mark.parametrize("zero", [0, 2])
def test_a_copy_that_does_not_fit_beside_the_state_is_refused(folder, monkeypatch, zero):
    """While answers are written no gradient is left: without ZeRO the copy is as large as they."""
    run = load_run([folder / "run.gin"], [f"mesh.zero={zero}"])
    setup, loader = run.setup(), prompt_loader(run)
    engine = HybridEngine(run.model, run.policy, setup.region, 1, "RolloutConfig.tensor")
    sizes = {name: bytes_on_one_device(part) for name, part in setup.resting().items()}
    step = sum(sizes.values())
    writing = step - sizes["gradients"] + bytes_on_one_device(engine.abstract)
    assert (writing > step) == (zero == 2)

    def answer(limit):
        monkeypatch.setattr(memory, "_bytes_of", lambda device: limit)
        make_answering(run, setup, loader, engine)

    answer(max(step, writing))
    with pytest.raises(InputError, match="model: given"):
        answer(step - 1)
    if zero:
        with pytest.raises(InputError, match=r"RolloutConfig\.tensor: given .* a copy that writes"):
            answer(writing - 1)


PROMPTS = [Prompt(name, list(name.encode()), {}) for name in ("one", "a longer one")]


SCALING = LongRopeScaling((1.0, 1.1, 1.2, 1.3), 1.1, (2.0, 3.0, 4.0, 5.0), 1.3, 12)
EXECUTION = ExecutionConfig(num_loss_chunks=1)


def make_rollouts(num_answers=4, max_new_tokens=5, reward=digits, rotary=RotaryConfig()):
    config = RolloutConfig({"it": reward}, num_answers, max_new_tokens)
    model = dense(vocab_size=264, max_length=32, num_layers=1)
    (layer,) = model.pattern
    attention = dataclasses.replace(layer.attention, rotary=rotary)
    layer = dataclasses.replace(layer, attention=attention)
    model = dataclasses.replace(model, pattern=(layer,))
    made = Rollouts(config, one_device(model), ByteTokenizer(), length=24, seed=3)
    return made, jax.tree.map(np.float32, make_params(model))


def test_rows_hold_each_prompt_with_its_answer_which_alone_has_weight():
    texts = []

    def read(prompts, answers):
        texts.extend(answer.text for answer in answers)
        return [len(answer.text) for answer in answers]

    made, params = make_rollouts(num_answers=128, reward=read)
    batch, _, figures = made(params, PROMPTS, np.array([6, 9]))
    assert {array.shape for array in batch.values()} == {(256, 24)}
    answers = []
    for row in range(256):
        prompt = PROMPTS[row // 128].tokens
        places = np.flatnonzero(batch["weights"][row])
        assert places[0] == len(prompt) - 1
        np.testing.assert_array_equal(places, places[0] + np.arange(len(places)))
        assert batch["tokens"][row, : len(prompt)].tolist() == prompt
        size = len(prompt) - 1 + len(places)
        np.testing.assert_array_equal(
            batch["tokens"][row, 1:size], batch["labels"][row, : size - 1]
        )
        assert (batch["tokens"][row, size:] == 0).all()
        answers.append(batch["labels"][row, places].tolist())
    assert len(set(map(tuple, answers))) > 250  # each is drawn for itself
    end = made.tokenizer.eos_id
    ended = [answer for answer in answers if end in answer]
    assert ended and all(answer.index(end) == len(answer) - 1 for answer in ended)
    assert all(len(answer) == 5 for answer in answers if end not in answer)
    assert texts == [made.tokenizer.decode([t for t in answer if t != end]) for answer in answers]
    assert figures["answer_tokens"] == batch["weights"].sum() / 256
    assert figures["cut_off"] == 1 - len(ended) / 256
    again, *_ = made(params, PROMPTS[:1] * 2, np.array([7, 6]))
    np.testing.assert_array_equal(again["labels"][128:], batch["labels"][:128])
    assert len(np.unique(again["labels"], axis=0)) > 250  # another number is another draw


def test_answers_are_drawn_with_the_probability_that_the_loss_takes():
    """The mean of -log p of what is drawn is the entropy, within four standard errors."""
    made, params = make_rollouts(num_answers=2048, max_new_tokens=1)
    batch, *_ = made(params, PROMPTS[:1], np.array([0]))
    place = len(PROMPTS[0].tokens) - 1
    row = {name: batch[name][:1] for name in ("tokens", "positions")}
    logits, _ = jax.jit(Decoder(made.engine.decoder.config, policy=FLOAT32).logits)(params, row)
    log_p = np.asarray(jax.nn.log_softmax(logits[0, place, : made.tokenizer.vocab_size]), float)
    drawn = -log_p[batch["labels"][:, place]]
    entropy = -(np.exp(log_p) * log_p).sum()
    assert abs(drawn.mean() - entropy) < 4 * drawn.std() / np.sqrt(len(drawn))
    assert drawn.std() > 0.1


def test_a_short_answer_in_a_long_row_is_learned_with_the_positions_it_was_written_with():
    """LongRoPE's, which the length of the text decides, and not that of its row."""
    made, params = make_rollouts(rotary=RotaryConfig(scaling=SCALING))
    batch, *_ = made(params, PROMPTS[:1], np.array([0]))
    batch["advantages"] = np.zeros_like(batch["weights"])
    loss = PolicyLoss(made.engine.decoder.config, FLOAT32, EXECUTION, beta=0.0)
    _, weight, figures = jax.jit(loss)(params, batch, None)
    size = len(PROMPTS[0].tokens) + 4
    assert size <= SCALING.original_length < made.length and weight == 20
    texts = {name: batch[name][:, :size] for name in ("tokens", "positions")}
    logits, _ = jax.jit(Decoder(made.engine.decoder.config, policy=FLOAT32).logits)(params, texts)
    log_p = np.take_along_axis(jax.nn.log_softmax(logits), batch["labels"][:, :size, None], -1)
    wanted = -(log_p[..., 0] * batch["weights"][:, :size]).sum()
    np.testing.assert_allclose(figures["entropy"], wanted, rtol=1e-5)


def test_advantages_compare_the_answers_to_one_prompt():
    rewards = np.array([[1.0, 0, 0, 1], [5, 5, 5, 5], [0, 0, 0, 4]])
    found = advantages(rewards)
    np.testing.assert_allclose(found[0], [1, -1, -1, 1])
    np.testing.assert_array_equal(found[1], 0)
    np.testing.assert_allclose(found[2], np.array([-1, -1, -1, 3]) / np.sqrt(3))
    np.testing.assert_allclose(advantages(10 + 3 * rewards), found, atol=1e-12)


def test_a_reward_that_is_no_number_is_refused_with_its_answer():
    made, params = make_rollouts(reward=lambda prompts, answers: [jnp.nan] * len(answers))
    with pytest.raises(InputError, match=r"given \"nan for .* an answer to one"):
        made(params, PROMPTS, np.array([0, 1]))


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (1.0, r"shape \(\)', expected a number for each of 8 answers"),
        (["good"] * 8, "given 'list', expected numbers"),
        (iter([1.0] * 8), "given 'list_iterator', expected numbers"),
    ],
)
def test_rewards_that_are_no_number_an_answer_are_refused(rewards, message):
    made, params = make_rollouts(reward=lambda prompts, answers: rewards)
    with pytest.raises(InputError, match=message):
        made(params, PROMPTS, np.array([0, 1]))


class Waiting(np.ndarray):
    """A leaf that the step before has not written yet."""

    is_over = False

    def block_until_ready(self):
        self.is_over = True
        return self


def test_the_seconds_of_answers_begin_when_the_step_before_is_over(monkeypatch):
    made, params = make_rollouts()
    leaf = params["final_norm"]["scale"] = params["final_norm"]["scale"].view(Waiting)
    seen = []
    clock = SimpleNamespace(perf_counter=lambda: seen.append(leaf.is_over) or 0.0)
    monkeypatch.setattr(rollouts, "time", clock)
    made(params, PROMPTS, np.array([6, 9]))
    assert seen[0]


def test_an_exact_match_is_worth_one():
    prompt = Prompt("here", [1], {"answer": " 42\n"})
    answers = [Answer([], text) for text in ("42 ", "42.", "\n42")]
    assert ExactMatch()([prompt] * 3, answers) == [1, 0, 1]
    with pytest.raises(InputError, match="here: given None, expected a field 'solution'"):
        ExactMatch("solution").check(ByteTokenizer(), [prompt], 1)


def test_every_prompt_is_answered_once_an_epoch_and_draws_never_repeat(folder):
    run = load_run([folder / "run.gin"])
    data = dataclasses.replace(run.data, batch_size=40)
    loader, held_out = (PromptLoader(data, 8, 8, split) for split in ("train", "held_out"))
    num = len(loader.prompts)
    assert num + len(held_out.prompts) == 40 and num == 40 - loader.num_others
    assert len(held_out.prompts) > 0
    batches = [next(loader) for _ in range(num)]  # five epochs
    numbers = np.concatenate([batch["prompts"] for batch in batches]).reshape(5, num)
    np.testing.assert_array_equal(np.sort(numbers, 1), np.tile(np.arange(num), (5, 1)))
    assert (numbers[0] != numbers[1]).any()
    draws = np.concatenate([batch["draws"] for batch in batches])
    np.testing.assert_array_equal(draws, np.arange(5 * num))


def test_a_run_goes_on_with_the_next_prompt_also_in_batches_of_another_size(folder):
    data = load_run([folder / "run.gin"]).data
    whole, begun = PromptLoader(data, 8, 8), PromptLoader(data, 8, 8)
    wanted = [next(whole) for _ in range(4)]
    next(begun), next(begun)
    resumed = PromptLoader(dataclasses.replace(data, batch_size=128), 8, 8)
    resumed.restore(begun.state())
    found = next(resumed)
    for name in ("prompts", "draws"):
        np.testing.assert_array_equal(found[name], np.concatenate([b[name] for b in wanted[2:]]))
    with pytest.raises(InputError, match=r"RolloutConfig\.num_answers: given 4, expected 8"):
        PromptLoader(data, 4, 8).restore(begun.state())


def test_every_evaluation_answers_the_prompts_that_were_there_when_the_run_began(folder, tmp_path):
    run = load_run([folder / "run.gin"])
    file = shutil.copy(folder / "prompts.jsonl", tmp_path)
    source = dataclasses.replace(run.data.sources[0], paths=(str(file),))
    data = dataclasses.replace(run.data, sources=(source,))
    asked = []

    def read(prompts, answers):
        asked.extend(tuple(prompt.tokens) for prompt in prompts)
        return [len(answer.tokens) for answer in answers]

    config = RolloutConfig({"length": read}, num_answers=2, max_new_tokens=1)
    evaluator = HeldOutRewards(data, config)
    trained_on = {tuple(prompt.tokens) for prompt in PromptLoader(data, 2, 1).prompts}
    engine = one_device(run.model)
    context = SimpleNamespace(model=run.model, params=None, engine=lambda *_: engine)
    evaluator.check(context)
    Path(file).write_text("")
    context.params = init_params(parameter_table(run.model), jax.random.key(0), "float32")
    assert evaluator(context)["reward"] == 1
    assert len(set(asked)) == len(asked) / 2 == 40 - len(trained_on) and not trained_on & set(asked)


BAD = {
    "no rollouts": ("run.Run.rollouts = None", "Run.rollouts: given None"),
    "another loss": ("run.Run.loss = @run.next_token_loss", "policy_loss for prompts"),
    "texts": ("run.DataConfig.sources = (@run.StandardLibrary(),)", "PromptSource for policy_loss"),
    "texts for another loss": (
        "run.Run.loss = @run.next_token_loss\nrun.DataConfig.sources = (@run.StandardLibrary(),)",
        "PromptSource for Run.rollouts",
    ),
    "prompts held out by keys": ("run.DataConfig.held_out_by = 'key'", "held_out_by: given 'key'"),
    "no prompts held out": ("run.DataConfig.held_out_fraction = 0.0", "no prompt is held out"),
    "no such end of an evaluator": (
        "other/run.RolloutConfig.end = '<|stop|>'\n"
        "run.HeldOutRewards.rollouts = @other/run.RolloutConfig()",
        "RolloutConfig.end: given '<|stop|>'",
    ),
    "a pipeline": ("run.MeshConfig.pipeline = 2", "MeshConfig.pipeline: given 2, expected 1"),
    "no adapters": ("run.policy_loss.beta = 0.1", "ModelConfig.lora: given None"),
    "devices that write": (
        "run.RolloutConfig.tensor = 3",
        "RolloutConfig.tensor: given 3, expected devices % tensor == 0, here 8 devices",
    ),
    "more devices than heads": (
        "run.RolloutConfig.tensor = 8",
        "RolloutConfig.tensor: given 8, expected a number by which the model can be divided",
    ),
    "rows": (
        "run.RolloutConfig.num_answers = 7",
        "DataConfig.batch_size: given 64, expected batch_size % num_answers == 0, here 64 % 7 = 1",
    ),
    "one answer": ("run.RolloutConfig.num_answers = 1", "2 or more"),
    "no reward": ("run.RolloutConfig.rewards = {}", "at least one reward"),
    "no room": ("run.RolloutConfig.max_new_tokens = 32", "prompts of at most 1 tokens"),
    "no right answer": (
        "run.RolloutConfig.rewards = {'right': @run.ExactMatch()}\nrun.ExactMatch.field = 'right'",
        "expected a field 'right' with a text for ExactMatch",
    ),
    "no such end": ("run.RolloutConfig.end = '<|stop|>'", "RolloutConfig.end: given '<|stop|>'"),
    "weights": ("run.DataConfig.weights = (1.0,)", "DataConfig.weights: given (1.0,)"),
    "another source beside": (
        "run.DataConfig.sources = (@run.PromptSource(), @run.StandardLibrary())",
        "PromptSource alone, or none",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_go_with_rewards_is_refused_before_anything_is_written(folder, capsys, name):
    binding, message = BAD[name]
    file, directory = folder / "bad.gin", folder / name
    lines = [(folder / "run.gin").read_text(), f"run.Run.directory = '{directory}'", binding]
    file.write_text("\n".join(lines))
    assert cli.main(["pretrain", str(file)]) != 0
    assert message in capsys.readouterr().err
    assert not directory.exists()


def test_a_prompt_that_has_its_answer_already_is_refused(folder, capsys):
    chat = as_messages([("user", "So?"), ("assistant", "Four.")])
    (folder / "answered.jsonl").write_text(json.dumps({"messages": chat}))
    words = [str(folder / "run.gin"), f"--set=directory={folder}/bad"]
    words.append(f"--set=data.sources.0.paths=('{folder}/answered.jsonl',)")
    assert cli.main(["pretrain", *words]) != 0
    assert "waits for the assistant's answer" in capsys.readouterr().err
