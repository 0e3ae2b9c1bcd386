"""Released models at full size: their config.json is read and has the published parameter count.

fixtures/full_size.json holds what their config.json (of transformers 4) says of the model, the
searched factors of LongRoPE replaced by others, and the count that Hugging Face publishes of their
weights on the page `source`. Nothing is allocated. fixtures/llm_jp.json has the shapes of the
LLM-jp releases as their cards and training scripts give them: of v4 the cards have the exact
counts, total and active, to which vocabulary, hidden size of the experts and kv heads are the only
fit; of v1 to v3 they have the size in the name.
"""

import json
from pathlib import Path

import pytest

from jaxscale import config
from jaxscale.convert.families import BY_MODEL_TYPE
from jaxscale.convert.folder import read_config
from jaxscale.models.config.facts import checkpoint_facts
from jaxscale.models.parameters import count_parameters, parameter_table
from jaxscale.run.run import Run

MODELS = json.loads((Path(__file__).parent / "fixtures" / "full_size.json").read_text())
LLM_JP = json.loads((Path(__file__).parent / "fixtures" / "llm_jp.json").read_text())
PAPERS = Path(__file__).parents[2] / "experiments" / "configs" / "papers"
IN_GIN = {"phi3_mini.gin": "Phi-3-mini 4K", "phi3_medium.gin": "Phi-3-medium 4K"}


def model_of(name, models=MODELS):
    values = models[name]["config"]
    tensors = () if values["tie_word_embeddings"] else ("lm_head.weight",)
    return read_config(BY_MODEL_TYPE[values["model_type"]], values, name, tensors)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_as_many_as_published(name):
    model = model_of(name)
    unread = 2 * model.model_dim if name.startswith("OPT") else 0  # positions that no token has
    assert count_parameters(parameter_table(model))[0] + unread == MODELS[name]["parameters"]


# Windows of the first two layers, base of the rotary positions, magnitude beyond L0.
MEANT = {
    "Phi-3-mini 4K": ([2047, 2047], 1e4, None),
    "Phi-3-mini 128K": ([262144, 262144], 1e4, 1.1902380714238083),  # sqrt(1 + ln 32 / ln 4096)
    "Phi-3.5-MoE": ([131072, 131072], 1e4, 1.243163121016122),
    "Mistral 7B v0.1": ([4096, 4096], 1e4, None),
    "Qwen2 7B": ([None, None], 1e6, None),  # one is there, and switched off
    "Gemma 2 9B": ([4096, None], 1e4, None),
}


@pytest.mark.parametrize("name", MEANT)
def test_windows_and_rotary_positions_are_the_released_ones(name):
    """Which no count of parameters tells."""
    attentions = [layer.attention for layer in model_of(name).layers[:2]]
    scaling = attentions[0].rotary.scaling
    magnitude = None if scaling is None else scaling.long_magnitude
    windows = [attention.window for attention in attentions]
    assert (windows, attentions[0].rotary.theta) == MEANT[name][:2]
    assert magnitude == pytest.approx(MEANT[name][2])


@pytest.mark.parametrize("name", LLM_JP)
def test_the_llm_jp_releases_have_their_sizes(name):
    release = LLM_JP[name]
    total, active = count_parameters(parameter_table(model_of(name, LLM_JP)))
    if "parameters" in release:
        assert total == release["parameters"]
    else:
        assert abs(total / release["named"] - 1) < 0.06
    if "active" in release:  # the card counts the embedding too
        model = model_of(name, LLM_JP)
        assert active + model.vocab_size * model.model_dim == release["active"]


@pytest.mark.parametrize("file", IN_GIN)
def test_the_gin_file_of_a_paper_is_the_released_model(file):
    def the_run(*, run: Run) -> Run:
        return run

    model = config.run(the_run, [PAPERS / file]).model
    released, ours = (checkpoint_facts(each) for each in (model_of(IN_GIN[file]), model))
    assert ours["fingerprint"] == released["fingerprint"]
