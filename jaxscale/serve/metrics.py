"""Prometheus metrics of a server, under the names that dashboards of vLLM know."""

import bisect
import dataclasses
import time
from collections.abc import Sequence

from jaxscale.serve.answers import REASONS
from jaxscale.serve.figures import Figures
from jaxscale.serve.requests import Delta
from jaxscale.serve.sequences import FinishReason

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
TOKENS = tuple(size * 10**power for power in range(6) for size in (1, 2, 5))
PREFIX = "vllm:"


class Histogram:
    """Counts of observed values at or below each bound.

    Args:
        name: of the metric, without the prefix.
        help: one line.
        bounds: ascending.
    """

    def __init__(self, name: str, help: str, bounds: Sequence[float] = SECONDS):
        self.name, self.help = name, help
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Counts a value."""
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, label: str) -> list[str]:
        """In the text format, where `label` is on every line."""
        name, total = PREFIX + self.name, 0
        found = [f"# HELP {name} {self.help}", f"# TYPE {name} histogram"]
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            found.append(f'{name}_bucket{{{label},le="{bound}"}} {total}')
        return [*found, f"{name}_sum{{{label}}} {self._sum}", f"{name}_count{{{label}}} {total}"]


class Metrics:
    """What a server observes of its requests.

    Args:
        model: the label `model_name`.
    """

    def __init__(self, model: str):
        escaped = model.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        self._label = f'model_name="{escaped}"'
        self._first = Histogram("time_to_first_token_seconds", "Time to the first token.")
        self._between = Histogram("inter_token_latency_seconds", "Time between two tokens.")
        self._whole = Histogram("e2e_request_latency_seconds", "Time of a whole sequence.")
        self._queue = Histogram("request_queue_time_seconds", "From arrival to the first step.")
        self._prefill = Histogram("request_prefill_time_seconds", "From there to the first token.")
        self._decode = Histogram("request_decode_time_seconds", "From the first token to the last.")
        self._running = Histogram("request_inference_time_seconds", "From the first step on.")
        self._prompt = Histogram("request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self._new = Histogram("request_generation_tokens", "New tokens of a sequence.", TOKENS)
        self._longest = Histogram(
            "request_max_num_generation_tokens",
            "Of a prompt's longest sequence.",
            TOKENS,
        )
        self._finished = dict.fromkeys(FinishReason, 0)

    def observe(self, clock: "SequenceClock", delta: Delta) -> None:
        """Takes in what is new of a sequence."""
        now = time.monotonic()
        if delta.tokens:
            if clock.last_s is None:
                self._first.observe(now - clock.began_s)
                clock.first_s = now
            else:
                # Several tokens of a launch come together.
                for _ in delta.tokens:
                    self._between.observe((now - clock.last_s) / len(delta.tokens))
            clock.last_s = now
            clock.num_new += len(delta.tokens)
        if delta.finish_reason is not None:
            self._whole.observe(now - clock.began_s)
            self._prompt.observe(clock.num_prompt)
            self._new.observe(clock.num_new)
            if clock.first_s is not None:
                first_step_s = clock.began_s + delta.waited_s
                self._queue.observe(delta.waited_s)
                self._prefill.observe(clock.first_s - first_step_s)
                self._decode.observe(now - clock.first_s)
                self._running.observe(now - first_step_s)
            self._finished[delta.finish_reason] += 1

    def observe_longest(self, clocks: Sequence["SequenceClock"]) -> None:
        """Takes in that all sequences of a prompt have ended."""
        self._longest.observe(max(clock.num_new for clock in clocks))

    def count_cancelled(self, num_sequences: int) -> None:
        """Counts sequences whose client has gone."""
        self._finished[FinishReason.CANCELLED] += num_sequences

    def text(self, figures: Figures) -> str:
        """All metrics in Prometheus' text format, version 0.0.4."""
        lines = []
        for name, kind, help, value in _plain(figures):
            lines += [f"# HELP {PREFIX}{name} {help}", f"# TYPE {PREFIX}{name} {kind}"]
            lines.append(f"{PREFIX}{name}{{{self._label}}} {value}")
        name = f"{PREFIX}request_success_total"
        lines += [f"# HELP {name} Finished sequences.", f"# TYPE {name} counter"]
        for reason, count in self._finished.items():
            lines.append(f'{name}{{{self._label},finished_reason="{REASONS[reason]}"}} {count}')
        seconds = self._first, self._between, self._whole, self._queue, self._prefill
        seconds = *seconds, self._decode, self._running
        for histogram in (*seconds, self._prompt, self._new, self._longest):
            lines += histogram.lines(self._label)
        return "\n".join(lines) + "\n"


@dataclasses.dataclass
class SequenceClock:
    """When a sequence began, and when its first and last tokens came; how many there are."""

    num_prompt: int = 0
    num_new: int = 0
    began_s: float = dataclasses.field(default_factory=time.monotonic)
    first_s: float | None = None
    last_s: float | None = None


def _plain(figures: Figures) -> list[tuple[str, str, str, float]]:
    """(name, type, help, value) of what is a number."""
    usage = figures.num_held / figures.num_blocks
    return [
        ("num_requests_running", "gauge", "Sequences that run.", figures.num_running),
        ("num_requests_waiting", "gauge", "Sequences that wait.", figures.num_waiting),
        ("kv_cache_usage_perc", "gauge", "Share of the cache that is held, 0 to 1.", usage),
        ("num_preemptions_total", "counter", "Preemptions.", figures.num_preemptions),
        (
            "spec_decode_num_draft_tokens_total",
            "counter",
            "Tokens that were guessed and checked.",
            figures.num_drafts,
        ),
        (
            "spec_decode_num_accepted_tokens_total",
            "counter",
            "Guesses that were right.",
            figures.num_accepted,
        ),
        ("prompt_tokens_total", "counter", "Tokens of prompts.", figures.num_prompt_tokens),
        ("generation_tokens_total", "counter", "Tokens drawn.", figures.num_new_tokens),
        (
            "prefix_cache_queries_total",
            "counter",
            "Tokens looked up in the prefix cache.",
            figures.num_prompt_tokens,
        ),
        (
            "prefix_cache_hits_total",
            "counter",
            "Tokens found there.",
            figures.num_cached_tokens,
        ),
    ]
