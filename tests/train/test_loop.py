"""The loop with stand-ins for everything it drives: what happens when, and in which order."""

import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxscale.launch.preemption import Preemption
from jaxscale.launch.watchdog import Watchdog
from jaxscale.train.loop import Loop, NonFiniteError, Outcome
from jaxscale.train.metrics import Speed
from jaxscale.train.profiler import Profiler
from jaxscale.train.state import TrainState


@dataclasses.dataclass
class World:
    """Every stand-in, writing what it was asked to do into one log."""

    bad_step: int = 0
    is_update_bad: bool = False
    position: int = 0
    log: list = dataclasses.field(default_factory=list)
    committed: dict = dataclasses.field(default_factory=dict)

    # the loader
    def __next__(self):
        self.position += 1
        return {"tokens": self.position}

    def state(self):
        return {"position": self.position}

    # the step
    def step(self, state, batch):
        number = int(state.step) + 1
        is_good = state.is_finite & (batch["tokens"] != self.bad_step)
        if self.is_update_bad:  # the step passes; the next one finds what its update did
            is_good = state.is_finite & jnp.isfinite(state.params["w"][0])
            broken = jnp.where(batch["tokens"] == self.bad_step, jnp.nan, state.params["w"])
            state = dataclasses.replace(state, params={"w": broken})
        self.log.append(f"step {number if is_good else 'refused'}")
        kept = dataclasses.replace(state, step=state.step + is_good, is_finite=is_good)
        loss = jnp.float32(1 / number if batch["tokens"] != self.bad_step else jnp.nan)
        return kept, {"loss": loss, "gradient_norm": loss, "is_finite": is_good}

    # checkpoints
    def save(self, step, state, data_state, *, force=False):
        self.log.append(f"save {step}{' forced' if force else ''}")
        if force or step % 4 == 0:
            self.committed[step] = (int(state.step), bool(state.is_finite), data_state)

    def wait(self):
        self.log.append("wait")

    # the reporter
    def report(self, step, figures):
        names = "evaluation" if "held_out" in figures else "figures"
        self.log.append(f"{names} of {step}")

    # the evaluator and the diagnosis
    def evaluate(self, params, step):
        self.log.append(f"evaluate {step}")
        return {"held_out": 1.0}

    def diagnose(self, state, batch):
        self.log.append("diagnosis")
        return f"tensor x of step {int(state.step) + 1}, batch {batch['tokens']}"


def make_state(step=0):
    return TrainState(jnp.int32(step), {"w": jnp.zeros(2)}, (), jax.random.key(0), jnp.bool_(True))


def make_loop(world, tmp_path, *, steps=5, evaluate_every=100, window=None, preemption=None):
    return Loop(
        step_fn=world.step,
        loader=world,
        prepare=lambda params, batch: (batch, {}),
        steps=steps,
        checkpoints=world,
        save_every=4,
        reporters=[world],
        speed=Speed(1, 1.0),
        evaluate=world.evaluate,
        evaluate_every=evaluate_every,
        norm=optax.tree.norm,
        diagnose=world.diagnose,
        preemption=preemption or Preemption(),
        profiler=Profiler(window, tmp_path),
        watchdog=Watchdog(None),
    )


def test_figures_come_one_step_late_and_before_what_is_saved(tmp_path):
    world = World()
    outcome = make_loop(world, tmp_path).run(make_state())
    assert world.log == [
        "step 1",
        "step 2",
        "figures of 1",
        "step 3",
        "figures of 2",
        "step 4",
        "figures of 3",
        "figures of 4",
        "save 4",
        "step 5",
        "figures of 5",
        "evaluate 5",
        "evaluation of 5",
        "save 5",
        "save 5 forced",
        "wait",
    ]
    assert world.committed == {n: (n, True, {"position": n}) for n in (4, 5)}
    assert outcome == Outcome(5, None) and outcome.exit_status == 0


def test_a_step_is_evaluated_before_it_is_committed(tmp_path):
    world = World()
    make_loop(world, tmp_path, steps=9, evaluate_every=2).run(make_state())
    assert [line for line in world.log if line.startswith("evaluate")] == [
        f"evaluate {n}" for n in (2, 4, 6, 8, 9)
    ]
    assert world.log.index("evaluation of 8") < world.log.index("save 8")


def test_a_resumed_run_does_the_rest(tmp_path):
    world = World(position=3)
    make_loop(world, tmp_path).run(make_state(3))
    assert [line for line in world.log if line.startswith("step")] == ["step 4", "step 5"]
    assert [line for line in world.log if line.startswith("figures")] == [
        "figures of 4",
        "figures of 5",
    ]


def test_a_finished_run_does_nothing(tmp_path):
    world = World(position=5)
    assert make_loop(world, tmp_path).run(make_state(5)).step == 5
    assert world.log == ["save 5 forced", "wait"]


def test_a_signal_stops_after_the_step_with_everything_reported_and_saved(tmp_path):
    world = World()

    def step(state, batch):
        if batch["tokens"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return world.step(state, batch)

    with Preemption() as preemption:
        loop = dataclasses.replace(
            make_loop(world, tmp_path, steps=9, preemption=preemption), step_fn=step
        )
        outcome = loop.run(make_state())
    assert world.log[-4:] == ["figures of 2", "figures of 3", "save 3 forced", "wait"]
    assert world.committed == {3: (3, True, {"position": 3})}
    assert outcome == Outcome(3, signal.SIGTERM) and outcome.exit_status == 143


def test_a_signal_during_the_last_step_leaves_nothing_to_do(tmp_path):
    world = World()

    def step(state, batch):
        if batch["tokens"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return world.step(state, batch)

    with Preemption() as preemption:
        outcome = dataclasses.replace(
            make_loop(world, tmp_path, preemption=preemption), step_fn=step
        ).run(make_state())
    assert outcome == Outcome(5, None) and outcome.exit_status == 0


@pytest.mark.parametrize("bad_step", [1, 3, 4, 5])
def test_a_bad_step_stops_the_run_with_the_state_before_it(tmp_path, bad_step):
    world = World(bad_step=bad_step)
    with pytest.raises(NonFiniteError) as error:
        make_loop(world, tmp_path, steps=9).run(make_state())
    message = str(error.value)
    assert (
        f"step {bad_step}: loss nan" in message
        and f"state after step {bad_step - 1} is saved" in message
    )
    assert f"tensor x of step {bad_step}, batch {bad_step}" in message
    # What is saved can go on: it is not marked as broken, and the bad batch comes next.
    before = bad_step - 1
    assert world.committed[before] == (before, True, {"position": before})
    assert max(world.committed) == before
    assert world.log[-3:] == [f"save {before} forced", "wait", "diagnosis"]


def test_a_diagnosis_that_fails_costs_no_state(tmp_path):
    def diagnose(state, batch):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nwhile allocating")

    world = World(bad_step=3)
    with pytest.raises(
        NonFiniteError,
        match=r"diagnosis failed \(RESOURCE_EXHAUSTED: Out of memory\); .* 2 is saved",
    ):
        dataclasses.replace(make_loop(world, tmp_path), diagnose=diagnose).run(make_state())
    assert world.committed == {2: (2, True, {"position": 2})}


@pytest.mark.parametrize("bad_step", [3, 4, 5])
def test_parameters_that_an_update_broke_are_never_saved(tmp_path, bad_step):
    world = World(bad_step=bad_step, is_update_bad=True)
    with pytest.raises(
        NonFiniteError, match=f"step {bad_step}: the update was not finite; .* newest checkpoint"
    ):
        make_loop(world, tmp_path).run(make_state())
    assert world.committed == ({4: (4, True, {"position": 4})} if bad_step == 5 else {})


@pytest.mark.parametrize(
    ("start", "stop", "profiled"),
    [(0, 9, [3, 4, 5]), (4, 9, [5]), (6, 9, []), (0, 4, [3, 4])],
    ids=str,
)
def test_the_profiler_records_its_window(tmp_path, monkeypatch, start, stop, profiled):
    """From the start, resumed within the window, resumed after it, and stopped within it."""
    world = World(position=start)
    monkeypatch.setattr(
        jax.profiler, "start_trace", lambda directory: world.log.append(f"on {directory}")
    )
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: world.log.append("off"))
    make_loop(world, tmp_path, steps=stop, window=(2, 5)).run(make_state(start))
    lines = [line for line in world.log if line.startswith(("step", "on", "off"))]
    if not profiled:
        assert f"on {tmp_path}" not in lines
        return
    inside = lines[lines.index(f"on {tmp_path}") + 1 : lines.index("off")]
    assert inside == [f"step {number}" for number in profiled]


def test_a_profile_is_written(tmp_path):
    profiler = Profiler((0, 1), tmp_path)
    profiler.update(0, make_state())
    jnp.ones(3).sum().block_until_ready()
    profiler.update(1, make_state())
    profiler.close()
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_figures_are_json(tmp_path):
    """What reaches a reporter is host numbers and, of a model with experts, arrays.

    How evenly these are used too.
    """
    seen = []
    world = World()
    world.report = lambda step, figures: seen.append(
        json.dumps(figures, default=lambda array: array.tolist())
    )

    def step(state, batch):
        state, metrics = world.step(state, batch)
        return state, metrics | {"load": jnp.array([[2.0, 2, 2, 2], [4, 4, 0, 0]])}

    dataclasses.replace(make_loop(world, tmp_path, steps=2), step_fn=step).run(make_state())
    figures = json.loads(seen[0])
    assert set(figures) >= {"loss", "gradient_norm", "tokens_per_second", "data_wait_s", "seconds"}
    assert (figures["expert_max_share"], figures["expert_entropy"]) == (0.5, pytest.approx(0.5))


def test_what_is_due_is_saved_though_the_evaluation_fails(tmp_path):
    def evaluate(params, step):
        raise ZeroDivisionError

    world = World()
    with pytest.raises(ZeroDivisionError):
        dataclasses.replace(
            make_loop(world, tmp_path, steps=9, evaluate_every=4), evaluate=evaluate
        ).run(make_state())
    assert world.committed == {4: (4, True, {"position": 4})}
