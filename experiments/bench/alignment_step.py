"""Time a step of DPO, GRPO or PPO of a gin file on random tokens; print one line of JSON.

DPO learns from rows of two random texts, of which the second half is the answer. GRPO and PPO write
answers to random prompts, none of which ends early; an answer's reward is the share of its tokens
that are even. Each part is timed alone; `step_ms` is of steps in which a part waits only for what
it needs, as in a run. The first steps compile and are not counted. `loss` is that of the first step
of DPO, log 2, and of the last one of the others.

python experiments/bench/alignment_step.py experiments/configs/runs/llama_1b_grpo.gin

MFU is that of the update: 2 N_active and attention at half for each forward, as much for a backward
to the inputs, and again for the gradients of what is trained; recompute not counted. The policy's
matrices beneath its adapters have no gradients.
"""

import dataclasses
import itertools
import json
import statistics
import time

import jax
import numpy as np
from gin_run import devices, make_parser, start_run, synthetic_batch
from train_step import compiled_step, peak_gib, profile_steps, time_steps

from jaxscale.data.prompts import Prompt
from jaxscale.models.config.model import training_flops_per_token
from jaxscale.models.lora import without_adapters
from jaxscale.models.parameters import count_parameters, parameter_table
from jaxscale.rlhf.rollouts import Rollouts
from jaxscale.run.rollouts import experience_of
from jaxscale.serve.hybrid_engine import HybridEngine
from jaxscale.train.metrics import peak_flops
from jaxscale.train.setup import epochs_of


@dataclasses.dataclass(frozen=True)
class RandomTokenizer:
    """Knows all tokens of a model; its end is none of them, so that no answer ends early."""

    vocab_size: int

    @property
    def eos_id(self):
        """The end."""
        return self.vocab_size

    def decode(self, ids):
        """No text."""
        return ""


def even_share(prompts, answers):
    """The reward of each answer."""
    return [float(np.mean([token % 2 == 0 for token in answer.tokens])) for answer in answers]


def forward_flops(model, length):
    """FLOPs a token of a forward, without adapters."""
    base = without_adapters(model)
    _, active = count_parameters(parameter_table(base))
    return training_flops_per_token(base, active, length) / 3


def adapted_flops(model, length):
    """FLOPs a token of forward and backward of a model whose adapters are trained, if it has any.

    A matrix beneath an adapter has no gradient, which is one of three products with it.
    """
    _, active = count_parameters(parameter_table(model))
    _, frozen = count_parameters(parameter_table(without_adapters(model)))
    of_base = 3 * forward_flops(model, length)
    return of_base if model.lora is None else of_base - 2 * frozen + 6 * (active - frozen)


def update_flops(run, loss_fn):
    """FLOPs of learning from one batch, with the reference's forward where the loss has it."""
    length, critic = run.data.sequence_length, run.critic
    longest = length if run.rollouts else length // 2
    flops = adapted_flops(run.model, longest)
    if critic is not None:
        flops += 3 * forward_flops(critic.model, longest)
    if getattr(loss_fn, "beta", 0):
        flops += forward_flops(run.model, longest)
    return flops * run.data.batch_size * length * epochs_of(loss_fn)


def pairs_batch(run, mesh):
    """Rows of one pair; the second half of each text is the answer."""
    batch = synthetic_batch(run, mesh, num_documents=2)
    each = run.data.sequence_length // 2
    place = batch["positions"]
    is_answer = (place >= each // 2 - 1) & (place < each - 1)
    return batch | {"weights": batch["weights"] * is_answer}


def time_pairs(run, setup, options):
    """Figures of a step of DPO, the mean of the rounds."""
    batch, state = pairs_batch(run, setup.mesh), setup.init(run.train.seed)
    step, figures = compiled_step(setup, state, batch)
    state, metrics = step(state, batch)
    first = float(metrics["loss"])
    ms, state = time_steps(step, state, batch, options.rounds)
    if options.profile:
        profile_steps(step, state, batch, options.profile)
    return figures | {"loss": first, "update_ms": ms, "step_ms": ms}


class Answering:
    """Writes, judges and learns, and has the state of the training."""

    def __init__(self, run, setup):
        length, num_new = run.data.sequence_length, run.rollouts.max_new_tokens
        self.num = run.data.batch_size // run.rollouts.num_answers
        size = self.num, length - num_new
        texts = np.random.default_rng(0).integers(0, run.model.vocab_size, size)
        self.prompts = [Prompt("random", tokens, {}) for tokens in texts.tolist()]
        self.write = Rollouts(
            dataclasses.replace(run.rollouts, rewards={"is_even": even_share}),
            HybridEngine(run.model, run.policy, setup.region, run.rollouts.tensor, "tensor"),
            tokenizer=RandomTokenizer(run.model.vocab_size),
            length=length,
            seed=run.train.seed,
        )
        self.judge = experience_of(run, setup)
        self.state, self.count = setup.init(run.train.seed), itertools.count()
        batch, _ = self.ready()
        self.step, self.compiled = compiled_step(setup, self.state, batch)

    def ready(self):
        """(A batch to learn from, what the writing says of itself and the clock around it)."""
        draws = next(self.count) * self.num + np.arange(self.num)
        began = time.perf_counter()
        rows, rewards, written = self.write(self.state.params, self.prompts, draws)
        has_written = time.perf_counter()
        batch, _ = self.judge(self.state.params, rows, rewards)
        return batch, written | {"began": began, "has_written": has_written}

    def learn(self, batch):
        """The metrics of an update."""
        self.state, metrics = self.step(self.state, batch)
        return metrics

    def apart(self):
        """The milliseconds of each part of a step, and its figures."""
        batch, written = jax.block_until_ready(self.ready())
        has_judged = time.perf_counter()
        metrics = jax.block_until_ready(self.learn(batch))
        has_learned = time.perf_counter()
        seconds = {
            "spread_ms": written["spread_s"],
            "write_ms": written["rollout_s"],
            "judge_ms": has_judged - written["has_written"],
            "update_ms": has_learned - has_judged,
        }
        found = {"loss": metrics["loss"], "entropy": metrics["entropy"]}
        found |= {name: written[name] for name in ("answer_tokens", "reward")}
        return {name: 1e3 * s for name, s in seconds.items()}, jax.tree.map(float, found)


def time_answers(run, setup, options):
    """Figures of a step of GRPO or PPO; of its parts the medians of the rounds."""
    answering = Answering(run, setup)
    answering.apart()
    rounds = [answering.apart() for _ in range(options.rounds)]
    names, figures = rounds[-1]
    figures |= {name: statistics.median(parts[name] for parts, _ in rounds) for name in names}
    began = time.perf_counter()
    for _ in range(options.rounds):
        answering.learn(answering.ready()[0])
    jax.block_until_ready(answering.state)
    figures["step_ms"] = (time.perf_counter() - began) / options.rounds * 1e3
    if options.profile:
        with jax.profiler.trace(options.profile):
            jax.block_until_ready(answering.learn(answering.ready()[0]))
    written = run.data.batch_size * figures["answer_tokens"]
    figures["written_per_second"] = written / figures["write_ms"] * 1e3
    return answering.compiled | figures


def main():
    """Time the run's loss and print the line."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", help="directory for a profile of one or two more steps")
    options = parser.parse_args()
    run = start_run(options.file, options.set)
    setup = run.setup()
    figures = (time_answers if run.rollouts else time_pairs)(run, setup, options)
    num_tokens = run.data.batch_size * run.data.sequence_length
    peak = (peak_flops() or np.inf) * jax.device_count()
    flops = update_flops(run, setup.loss_fn)
    figures["trained_per_second"] = num_tokens / figures["update_ms"] * 1e3
    figures["update_tflops"] = flops / figures["update_ms"] / 1e9
    figures["update_mfu"] = flops / figures["update_ms"] * 1e3 / peak
    figures["peak_gib"] = peak_gib()
    rounded = {name: round(value, 4) for name, value in figures.items()}
    head = {"file": options.file, "overrides": options.set} | devices()
    print(json.dumps(head | rounded), flush=True)


if __name__ == "__main__":
    main()
