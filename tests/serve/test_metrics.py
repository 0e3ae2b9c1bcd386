"""What a server's metrics say of a sequence."""

from types import SimpleNamespace

import pytest

from jaxscale.serve.figures import Figures
from jaxscale.serve.metrics import Metrics, SequenceClock
from jaxscale.serve.requests import Delta
from jaxscale.serve.sequences import FinishReason


def test_a_sequence_is_counted_with_its_tokens_and_times(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("jaxscale.serve.metrics.time", SimpleNamespace(monotonic=lambda: now[0]))
    metrics, clock = Metrics('a "model"'), SequenceClock(num_prompt=7, began_s=now[0])
    for tokens, reason in (((1,), None), ((2, 3), None), ((4,), FinishReason.LENGTH)):
        now[0] += 2.0
        metrics.observe(clock, Delta(0, 0, "", tokens, (), reason, 0, 0, waited_s=0.5))
    metrics.observe_longest([clock, SequenceClock(num_new=3)])
    lines = dict(line.rsplit(" ", 1) for line in lines_of(metrics))
    label = 'model_name="a \\"model\\""'

    def value(name):
        return float(lines[f"vllm:{name}{{{label}}}"])

    assert value("request_prompt_tokens_sum") == 7
    assert value("request_generation_tokens_sum") == 4
    assert value("inter_token_latency_seconds_count") == 3
    assert value("request_max_num_generation_tokens_sum") == 4
    for name, seconds in (
        ("time_to_first_token", 2.0),
        ("e2e_request_latency", 6.0),
        ("request_queue_time", 0.5),
        ("request_prefill_time", 1.5),
        ("request_decode_time", 4.0),
        ("request_inference_time", 5.5),
    ):
        assert value(f"{name}_seconds_count") == 1
        assert value(f"{name}_seconds_sum") == seconds
    assert value("inter_token_latency_seconds_sum") == 4.0
    assert lines[f'vllm:request_generation_tokens_bucket{{{label},le="5"}}'] == "1"
    assert lines[f'vllm:request_generation_tokens_bucket{{{label},le="2"}}'] == "0"


# What the panels of vLLM's own dashboard for Grafana ask for.
OF_DASHBOARDS = {
    "histogram": """e2e_request_latency_seconds inter_token_latency_seconds
        time_to_first_token_seconds request_queue_time_seconds request_prefill_time_seconds
        request_decode_time_seconds request_prompt_tokens request_generation_tokens
        request_max_num_generation_tokens""",
    "counter": """prompt_tokens generation_tokens request_success num_preemptions
        prefix_cache_queries prefix_cache_hits spec_decode_num_draft_tokens
        spec_decode_num_accepted_tokens""",
    "gauge": "num_requests_running num_requests_waiting kv_cache_usage_perc",
}


def test_prometheus_reads_what_dashboards_ask_for():
    parser = pytest.importorskip("prometheus_client.parser")
    metrics = Metrics("tiny")
    metrics.count_cancelled(3)
    zeros = dict.fromkeys(Figures.__dataclass_fields__, 0)
    text = metrics.text(Figures(**zeros | {"num_blocks": 1}))
    families = {each.name: each for each in parser.text_string_to_metric_families(text)}
    for kind, names in OF_DASHBOARDS.items():
        for name in names.split():
            family = families[f"vllm:{name}"]
            assert family.type == kind
            assert all(sample.labels["model_name"] == "tiny" for sample in family.samples)
    ends = families["vllm:request_success"].samples
    counts = {sample.labels["finished_reason"]: sample.value for sample in ends}
    assert counts == {"stop": 0, "length": 0, "abort": 3, "timeout": 0}


def lines_of(metrics):
    zeros = dict.fromkeys(Figures.__dataclass_fields__, 0)
    text = metrics.text(Figures(**zeros | {"num_blocks": 1}))
    return [line for line in text.splitlines() if not line.startswith("#")]
