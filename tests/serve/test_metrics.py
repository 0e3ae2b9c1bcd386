"""What a server's metrics say of a sequence."""

from jaxscale.serve.figures import Figures
from jaxscale.serve.metrics import Metrics, SequenceClock
from jaxscale.serve.requests import Delta
from jaxscale.serve.sequences import FinishReason


def test_a_sequence_is_counted_with_its_tokens_and_times():
    metrics, clock = Metrics('a "model"'), SequenceClock(num_prompt=7)
    for tokens, reason in (((1,), None), ((2, 3), None), ((4,), FinishReason.LENGTH)):
        metrics.observe(clock, Delta(0, 0, "", tokens, (), reason, 0, 0))
    lines = dict(line.rsplit(" ", 1) for line in lines_of(metrics))
    label = 'model_name="a \\"model\\""'

    def value(name):
        return float(lines[f"vllm:{name}{{{label}}}"])

    assert value("request_prompt_tokens_sum") == 7
    assert value("request_generation_tokens_sum") == 4
    assert value("inter_token_latency_seconds_count") == 3
    for name in ("time_to_first_token", "e2e_request_latency", "request_decode_time"):
        assert value(f"{name}_seconds_count") == 1
    assert lines[f'vllm:request_generation_tokens_bucket{{{label},le="5"}}'] == "1"
    assert lines[f'vllm:request_generation_tokens_bucket{{{label},le="2"}}'] == "0"


def lines_of(metrics):
    zeros = dict.fromkeys(Figures.__dataclass_fields__, 0)
    text = metrics.text(Figures(**zeros | {"num_blocks": 1}))
    return [line for line in text.splitlines() if not line.startswith("#")]
