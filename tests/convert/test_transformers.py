"""What is written loads in Hugging Face's own code and computes the same, where it is installed."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxscale.convert.families import BY_MODEL_TYPE
from jaxscale.convert.folder import CONFIG, read_config, write_folder
from jaxscale.models.decoder import Decoder
from jaxscale.models.parameters import init_params, parameter_table
from jaxscale.models.quantised import QuantisedConfig, quantised
from jaxscale.ops.precision import Policy
from tests.convert.test_families import (
    FIXTURES,
    NAMES,
    PACKED,
    arrays,
    assert_close,
    folder,
    params,
)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("bert", PACKED)])
def test_an_export_computes_the_same_in_transformers(name, tmp_path):
    """Without the config.json of the import: every field is what the family writes."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    dtype = np.dtype("float32")
    kind = folder(name).family.model_types[0]
    write_folder(tmp_path, folder(name).config, params(name), dtype=dtype, family=kind)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, about = load(tmp_path, attn_implementation="eager", output_loading_info=True)
    assert not any(about[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = arrays(name)["tokens"]
    with torch.no_grad():
        got = model.eval()(torch.from_numpy(tokens)).logits.numpy()
    assert_close(got, arrays(name)[f"logits_{tokens.shape[1]}"])


@pytest.mark.long
def test_an_export_in_few_bits_computes_the_same_in_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    values = json.loads((FIXTURES / "phi3" / CONFIG).read_text())
    values |= {"hidden_size": 256, "intermediate_size": 384}  # whole groups
    model = read_config(BY_MODEL_TYPE["phi3"], values, CONFIG, ["lm_head.weight"])
    table = parameter_table(model)
    drawn = jax.tree.map(
        lambda leaf: leaf.astype("bfloat16"), init_params(table, jax.random.key(0), "float32")
    )
    small = quantised(drawn, table, QuantisedConfig(4))
    write_folder(tmp_path, model, small, dtype=np.dtype(ml_dtypes.bfloat16), family="phi3")
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(tmp_path, attn_implementation="eager", dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(0, 97, (2, 24))
    with torch.no_grad():
        got = theirs.eval()(torch.from_numpy(tokens)).logits.numpy()
    batch = {"tokens": tokens, "positions": np.broadcast_to(np.arange(24), tokens.shape)}
    wanted = jax.jit(Decoder(model, policy=Policy(compute="float32")).logits)(small, batch)[0]
    assert_close(got, np.asarray(wanted))
