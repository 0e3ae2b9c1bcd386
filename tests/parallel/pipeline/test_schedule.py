"""Schedules: a machine that knows the rows alone runs each, and idle times are the papers'.

Letters are those of the papers: p stages with v chunks each and m micro-batches.
"""

import runpy
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from jaxscale.parallel.pipeline.schedule import (
    NONE,
    Schedule,
    bubble,
    duration,
    gpipe,
    interleaved,
    make_schedule,
    one_f_one_b,
    zero_bubble,
)
from jaxscale.types import InputError

SIZES = [(p, m) for p in (1, 2, 3, 4, 7) for m in (1, 2, 4, 6, 13)]
CHUNKED = [(p, v, p * groups) for p in (1, 2, 4) for v in (1, 2, 3) for groups in (1, 3)]
ALL = [maker(p, m) for maker in (gpipe, one_f_one_b, zero_bubble) for p, m in SIZES]
ALL += [interleaved(*sizes) for sizes in CHUNKED]
each_schedule = pytest.mark.parametrize(
    "schedule", ALL, ids=lambda s: f"{s.name}-{s.num_stages}-{s.num_chunks}-{s.num_microbatches}"
)


class Machine:
    """Runs the rows as an engine would, with labels in place of tensors.

    A label is (what it is, virtual stage, micro-batch).
    """

    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        self.last = schedule.num_stages * schedule.num_chunks - 1
        slots = dict(
            activation=schedule.num_activation_slots,
            residual=schedule.num_residual_slots,
            cotangent=schedule.num_cotangent_slots,
        )
        self.slots = {
            kind: [[None] * num for _ in range(schedule.num_stages)] for kind, num in slots.items()
        }
        self.done = []

    def run(self) -> list[tuple]:
        """All that was done, as (kind, virtual stage, micro-batch)."""
        stages = range(self.schedule.num_stages)
        activations, cotangents = [None for _ in stages], [None for _ in stages]
        for tick in range(self.schedule.num_ticks):
            sent = [
                self.tick(tick, s, activations[s - 1], cotangents[(s + 1) % len(stages)])
                for s in stages
            ]
            assert any(done for _, _, done in sent), f"nobody does anything in tick {tick}"
            activations, cotangents = [a for a, _, _ in sent], [c for _, c, _ in sent]
        assert (activations, cotangents).count(None) == 0
        return self.done

    def tick(self, tick, stage, activation, cotangent):
        """One stage's tick: what it sends forward and back, and how much it did."""
        row = type(self.schedule.rows)(*(int(column[tick, stage]) for column in self.schedule.rows))
        before = len(self.done)
        self.put("activation", stage, row.activation_store, activation)
        self.put("cotangent", stage, row.cotangent_store, cotangent)
        ahead = self.forward(stage, row) if row.forward != NONE else None
        back = self.backward(stage, row) if row.backward != NONE else None
        if row.weight != NONE:
            self.weight(stage, row)
        return ahead, back, len(self.done) - before

    def forward(self, stage, row):
        k, m = self.operate("forward", stage, row.forward, row.forward_chunk)
        if k == 0:
            assert row.activation_read == NONE
        else:
            assert self.take("activation", stage, row.activation_read) == ("activation", k, m)
        self.put("residual", stage, row.residual_store, ("residual", k, m))
        assert (row.cotangent_own != NONE) == (k == self.last)
        if k == self.last:
            self.put("cotangent", stage, row.cotangent_own, ("cotangent", k, m))
        return ("activation", k + 1, m) if k < self.last else None

    def backward(self, stage, row):
        k, m = self.operate("backward", stage, row.backward, row.backward_chunk)
        assert self.take("residual", stage, row.residual_read) == ("residual", k, m)
        assert self.take("cotangent", stage, row.cotangent_read) == ("cotangent", k, m)
        if self.schedule.is_split:
            self.put("residual", stage, row.residual_read, ("residual for weight", k, m))
        return ("cotangent", k - 1, m) if k else None

    def weight(self, stage, row):
        k, m = self.operate("weight", stage, row.weight, row.weight_chunk)
        assert self.take("residual", stage, row.residual_weight) == ("residual for weight", k, m)

    def operate(self, kind, stage, microbatch, chunk):
        virtual = chunk * self.schedule.num_stages + stage
        self.done.append((kind, virtual, microbatch))
        return virtual, microbatch

    def put(self, kind, stage, slot, label):
        """Fills a free slot; what was sent must be stored, and only what was sent."""
        assert (slot == NONE) == (label is None), f"{kind} {label} into slot {slot}"
        if label is not None:
            assert self.slots[kind][stage][slot] is None, (
                f"{label} overwrites {self.slots[kind][stage][slot]}"
            )
            self.slots[kind][stage][slot] = label

    def take(self, kind, stage, slot):
        assert slot >= 0
        label, self.slots[kind][stage][slot] = self.slots[kind][stage][slot], None
        return label


@each_schedule
def test_a_machine_can_run_the_rows(schedule):
    machine = Machine(schedule)
    done = machine.run()
    kinds = ["forward", "backward"] + ["weight"] * schedule.is_split
    wanted = {
        (kind, k, m)
        for kind in kinds
        for k in range(machine.last + 1)
        for m in range(schedule.num_microbatches)
    }
    assert len(done) == len(wanted) and set(done) == wanted
    assert not any(label for kind in machine.slots.values() for stage in kind for label in stage)


@each_schedule
def test_what_is_idle_names_no_slot(schedule):
    rows = schedule.rows
    for operation, columns in (
        (
            rows.forward,
            (rows.forward_chunk, rows.activation_read, rows.residual_store, rows.cotangent_own),
        ),
        (rows.backward, (rows.backward_chunk, rows.residual_read, rows.cotangent_read)),
        (rows.weight, (rows.weight_chunk, rows.residual_weight)),
    ):
        assert all((column[operation == NONE] == NONE).all() for column in columns)
    assert (
        schedule.is_split
        == (schedule.name == "zero_bubble")
        == (rows.residual_weight != NONE).any()
    )


@each_schedule
def test_gradients_add_up_in_the_order_of_the_microbatches(schedule):
    rows = schedule.rows
    by = (
        (rows.weight, rows.weight_chunk)
        if schedule.is_split
        else (rows.backward, rows.backward_chunk)
    )
    for stage in range(schedule.num_stages):
        for chunk in range(schedule.num_chunks):
            order = by[0][by[1][:, stage] == chunk, stage]
            np.testing.assert_array_equal(order, np.arange(schedule.num_microbatches))


@pytest.mark.parametrize("p, m", SIZES)
@pytest.mark.parametrize("maker", [gpipe, one_f_one_b])
def test_the_bubble_is_that_of_the_paper(maker, p, m):
    for costs in ((1, 1, 1), (1, 3, 0), (2, 3, 0.5), (3, 1, 1)):
        assert bubble(maker(p, m), *costs) == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)


@pytest.mark.parametrize("p, v, m", CHUNKED)
def test_interleaving_divides_the_bubble(p, v, m):
    schedule = interleaved(p, v, m)
    for costs in ((1, 1, 1), (1, 3, 0), (3, 1, 1)):
        assert bubble(schedule, *costs) == pytest.approx((p - 1) / (v * m + p - 1), abs=1e-12)
    assert schedule.num_residual_slots == min(v * m, v * p + p - 1)


@pytest.mark.parametrize("p, m", SIZES)
def test_zero_bubble_idles_as_little_as_the_paper_says(p, m):
    schedule = zero_bubble(p, m)
    for costs in ((1, 1, 1), (1, 2, 1), (1, 1.5, 0.5), (2, 1, 1)):
        forward, backward, weight = costs
        busy = m * sum(costs)
        idle = duration(schedule, *costs) - busy
        of_the_paper = (p - 1) * (forward + backward - weight)
        assert idle <= duration(one_f_one_b(p, m), *costs) - busy
        assert idle >= of_the_paper - 1e-12
        if m >= 2 * (p - 1):
            assert idle == pytest.approx(of_the_paper, abs=1e-12)
            share = idle / (busy + idle)
            assert bubble(schedule, *costs) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize("p, m", SIZES)
def test_slots_grow_with_the_stages_and_not_with_the_microbatches(p, m):
    one, zero, all_forward = one_f_one_b(p, m), zero_bubble(p, m), gpipe(p, m)
    assert one.num_residual_slots == zero.num_residual_slots == min(m, 2 * p - 1)
    assert all_forward.num_residual_slots == m
    for schedule in (one, zero):
        assert schedule.num_cotangent_slots == 1 and schedule.num_activation_slots == min(1, p - 1)


@pytest.mark.parametrize("p, m", SIZES)
def test_zero_bubble_has_no_more_microbatches_in_flight_on_any_stage(p, m):
    rows = zero_bubble(p, m).rows
    begun = np.cumsum(rows.forward != NONE, 0)
    # A slot is free in the tick after its last use.
    ended = np.cumsum(rows.weight != NONE, 0) - (rows.weight != NONE)
    assert (begun - ended).max() <= one_f_one_b(p, m).num_residual_slots


def test_each_stage_may_cost_its_own():
    # Stage 1 ends its two ticks at 1 + 7 and 8 + 7; stage 0 then has one backward left.
    assert duration(one_f_one_b(2, 2), [1, 2], [3, 4], [0, 1]) == 18
    assert bubble(one_f_one_b(2, 2), [1, 2], [3, 4], [0, 1]) == pytest.approx(1 - 22 / 36)
    head = [[1, 1], [1, 2]]  # [v, p]: only the last chunk of the last stage has the head
    schedule = interleaved(2, 2, 4)
    even = duration(schedule, 1, 1, 1)
    uneven = duration(schedule, head, 1, 1)
    assert even + 4 <= uneven < duration(schedule, [1, 2], 1, 1)


def test_a_stage_waits_for_its_neighbours_only():
    # All forwards but stage 0's and all backwards take 1. Stage 2 does a forward and a backward
    # while stage 0 is at its second forward: were all to wait for all, it would be 26.
    assert duration(one_f_one_b(3, 2), [10, 1, 1], 1, 0) == 25


def test_all_stages_wait_for_the_head_that_they_share():
    # Were it the last stage's alone, stage 0 would go on meanwhile. All begin it when the slowest
    # forward of its tick has ended, and what a backward takes comes after it.
    assert duration(one_f_one_b(3, 2), [10, 1, 1], 1, 0, head=0) == 26
    assert duration(one_f_one_b(2, 4), 1, 1, 1, head=3) == 1 + 4 * (1 + 3 + 2) + 2
    # Of two stages the zero bubble, whose stages differ within a tick, then saves half as much.
    whole = duration(one_f_one_b(2, 16), 1, 1.2, 0.9)
    alone, shared = (duration(zero_bubble(2, 16), 1, 1.2, 0.9, head=h) for h in (None, 0))
    assert whole - alone == pytest.approx(2 * 0.9) and whole - shared == pytest.approx(0.9)


@pytest.mark.parametrize(
    "name, maker", [("gpipe", gpipe), ("1f1b", one_f_one_b), ("zero_bubble", zero_bubble)]
)
def test_schedules_are_made_by_name(name, maker):
    made = make_schedule(name, 3, 1, 5)
    sizes = (made.num_stages, made.num_chunks, made.num_microbatches)
    assert made.name == name and sizes == (3, 1, 5)
    for column, expected in zip(made.rows, maker(3, 5).rows, strict=True):
        assert column.dtype == np.int32 and column.shape == (made.num_ticks, 3)
        np.testing.assert_array_equal(column, expected)
    assert make_schedule("interleaved", 3, 2, 6).num_chunks == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ("interleaved", 4, 2, 6),
            "TrainConfig.num_microbatches: given 6, expected num_microbatches % pipeline == 0 "
            "for the interleaved schedule, but 6 % 4 = 2; nearest: 4 or 8",
        ),
        (("interleaved", 4, 2, 3), "3 % 4 = 3; nearest: 4"),
        (("interleaved", 4, 0, 8), "MeshConfig.num_chunks: given 0, expected a number above 0"),
        (
            ("1f1b", 4, 2, 8),
            'MeshConfig.num_chunks: given 2, expected 1 unless schedule is "interleaved"',
        ),
        (("1f1b", 4, 1, 0), "TrainConfig.num_microbatches: given 0, expected a number above 0"),
        (
            ("dualpipe", 4, 1, 8),
            "MeshConfig.schedule: given 'dualpipe', expected one of 'gpipe', '1f1b'",
        ),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(InputError) as error:
        make_schedule(*arguments)
    assert message in str(error.value)


def test_a_picture_has_a_box_for_each_operation():
    """Of whichever schedule; the box says its micro-batch, in the row of its stage."""
    script = Path(__file__).resolve().parents[3] / "experiments/schedules/schedule_panel.py"
    draw, figure = runpy.run_path(str(script))["draw"], plt.figure()
    for name, num_chunks, kinds in (
        ("gpipe", 1, 2),
        ("1f1b", 1, 2),
        ("interleaved", 2, 2),
        ("zero_bubble", 1, 3),
    ):
        axes = figure.add_subplot()
        draw(axes, make_schedule(name, 2, num_chunks, 4))
        boxes = [(text.get_position()[1], int(text.get_text())) for text in axes.texts]
        assert sorted(boxes) == sorted(
            (s, m) for s in range(2) for m in range(4) for _ in range(kinds * num_chunks)
        )
        colors = {tuple(bars.get_facecolor()[0]) for bars in axes.collections}
        assert len(colors) >= kinds * num_chunks
    plt.close(figure)
