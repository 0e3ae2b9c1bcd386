"""A training of another system goes on here: parameters, Adam moments and steps, by rules.

The checkpoint is laid out as DeepSpeed does under ZeRO 3 over 3 data by 2 tensor ranks: torch's
names, matrices [out, in], q, k and v fused and gate and up.
"""

import numpy as np
import pytest

from jaxscale import cli
from jaxscale.checkpoint.deepspeed_writer import write_universal
from jaxscale.checkpoint.native import NativeCheckpoint
from jaxscale.checkpoint.torch_writer import save_torch
from jaxscale.convert.families.llama import LLAMA
from jaxscale.convert.weights import export_tensors
from tests.run import runs

NUM_DATA, NUM_TENSOR = 3, 2
STATES = {"fp32": "params/", "exp_avg": "opt_state/1/0/mu/", "exp_avg_sq": "opt_state/1/0/nu/"}
RULES = r"""
[[rule]]
match = 'embed\.weight'
to = 'params/embedding/tokens'
cuts = [{axis = 'tensor', dim = 0, size = 264}]

[[rule]]
match = 'layers\.(?P<layer>\d+)\.qkv\.weight'
stack = ['layer']
cuts = [{axis = 'tensor', dim = 0, blocks = [32, 16, 16]}]
targets = [
    {to = 'params/layers/0/attention/q', rows = 32, axes = [1, 0], shape = [16, 4, 8]},
    {to = 'params/layers/0/attention/k', rows = 16, axes = [1, 0], shape = [16, 2, 8]},
    {to = 'params/layers/0/attention/v', rows = 16, axes = [1, 0], shape = [16, 2, 8]},
]

[[rule]]
match = 'layers\.(?P<layer>\d+)\.o\.weight'
to = 'params/layers/0/attention/o'
stack = ['layer']
cuts = [{axis = 'tensor', dim = 1}]
axes = [1, 0]
shape = [4, 8, 16]

[[rule]]
match = 'layers\.(?P<layer>\d+)\.gate_up\.weight'
stack = ['layer']
cuts = [{axis = 'tensor', dim = 0, blocks = [32, 32]}]
targets = [
    {to = 'params/layers/0/ffn/gate', rows = 32, axes = [1, 0]},
    {to = 'params/layers/0/ffn/up', rows = 32, axes = [1, 0]},
]

[[rule]]
match = 'layers\.(?P<layer>\d+)\.down\.weight'
to = 'params/layers/0/ffn/down'
stack = ['layer']
cuts = [{axis = 'tensor', dim = 1}]
axes = [1, 0]

[[rule]]
match = 'layers\.(?P<layer>\d+)\.(?P<part>attention|ffn)_norm\.weight'
to = 'params/layers/0/{part}/norm/scale'
stack = ['layer']
kind = 'replicated'

[[rule]]
match = 'norm\.weight'
to = 'params/final_norm/scale'
kind = 'replicated'
"""


def cut_alone(parts, tensor):
    """The share of a tensor rank of blocks that are cut each by itself, fused again."""
    return np.concatenate([np.split(part, NUM_TENSOR)[tensor] for part in parts])


def of_torch(tree, tensor):
    """The tensors of one tensor rank, of leaves by their paths below `params`."""
    padded = np.pad(tree["embedding/tokens"], ((0, 8), (0, 0)))
    tensors = {
        "embed.weight": np.split(padded, NUM_TENSOR)[tensor],
        "norm.weight": tree["final_norm/scale"],
    }
    for layer in range(2):
        own = {path: leaf[layer] for path, leaf in tree.items() if path.startswith("layers")}
        attention, ffn = "layers/0/attention", "layers/0/ffn"
        heads = [own[f"{attention}/{name}"].reshape(16, -1).T for name in "qkv"]
        out = own[f"{attention}/o"].reshape(-1, 16).T
        gates = [own[f"{ffn}/{name}"].T for name in ("gate", "up")]
        tensors |= {
            f"layers.{layer}.qkv.weight": cut_alone(heads, tensor),
            f"layers.{layer}.o.weight": np.split(out, NUM_TENSOR, axis=1)[tensor],
            f"layers.{layer}.gate_up.weight": cut_alone(gates, tensor),
            f"layers.{layer}.down.weight": np.split(own[f"{ffn}/down"].T, NUM_TENSOR, axis=1)[
                tensor
            ],
            f"layers.{layer}.attention_norm.weight": own[f"{attention}/norm/scale"],
            f"layers.{layer}.ffn_norm.weight": own[f"{ffn}/norm/scale"],
        }
    return tensors


def flattened(tensors, data):
    """What a data rank holds of tensors that are partitioned each by itself."""
    flat = []
    for tensor in tensors.values():
        size = -(-tensor.size // NUM_DATA)
        padded = np.pad(tensor.reshape(-1), (0, size * NUM_DATA - tensor.size))
        flat.append(padded[data * size : (data + 1) * size])
    return np.concatenate(flat)


@pytest.fixture(scope="module")
def step(whole):
    """The folder of the whole run's last checkpoint."""
    return whole / "checkpoints" / str(runs.STEPS)


@pytest.fixture
def foreign(step, tmp_path):
    leaves = {path: leaf[()] for path, leaf in NativeCheckpoint(step).leaves().items()}
    trees = {}
    for state, start in STATES.items():
        own = {path: leaf for path, leaf in leaves.items() if path.startswith(start)}
        trees[state] = {path.removeprefix(start): leaf for path, leaf in own.items()}
    folder = tmp_path / "deepspeed" / "global_step30"
    folder.mkdir(parents=True)
    for tensor in range(NUM_TENSOR):
        tensors = {state: of_torch(tree, tensor) for state, tree in trees.items()}
        degrees = {"tp_degree": NUM_TENSOR, "pp_degree": 1}
        model = {
            "param_shapes": [{name: part.shape for name, part in tensors["fp32"].items()}],
            "checkpoint_parallel_dimensions": degrees,
        }
        for data in range(NUM_DATA):
            flat = {state: flattened(parts, data) for state, parts in tensors.items()}
            optimizer = {
                "partition_count": NUM_DATA,
                "fp32_flat_groups": [flat.pop("fp32")],
                "optimizer_state_dict": {"state": {0: flat}},
            }
            name = f"zero_pp_rank_{data}_mp_rank_{tensor:02d}"
            content = {"optimizer_state_dict": optimizer}
            save_torch(folder / f"{name}_optim_states.pt", content, piece_bytes=1 << 20)
            save_torch(folder / f"{name}_model_states.pt", model, piece_bytes=1 << 20)
    (folder.parent / "latest").write_text(folder.name)
    (tmp_path / "rules.toml").write_text(RULES)
    return folder.parent


@pytest.fixture
def converted(foreign, gin_file, tmp_path):
    """The foreign checkpoint as one of the run in `run.gin`."""
    run_file = tmp_path / "run.gin"
    run_file.write_text(
        "from __gin__ import dynamic_registration\nfrom jaxscale import run\n"
        f"include '{gin_file}'\nDIRECTORY = '{tmp_path}/new'\n"
        f"run.TrainConfig.init_from = '{tmp_path}/converted'\n"
        f"run.TrainConfig.init_changes = @run.Changes()\nrun.TrainConfig.steps = {runs.STEPS + 1}\n"
    )
    options = ["--rules", tmp_path / "rules.toml", "--run", run_file, "--step", runs.STEPS]
    convert = ["checkpoint", "convert", foreign, tmp_path / "converted", *options]
    assert cli.main(list(map(str, convert))) == 0
    return tmp_path / "converted"


def test_it_is_the_same_state(converted, step, capsys):
    """Parameters, moments, counts, step and key: bit by bit those of the run that was laid out."""
    assert cli.main(["checkpoint", "diff", str(step), str(converted)]) == 0
    assert "38 arrays are equal" in capsys.readouterr().out


@pytest.mark.long
def test_a_run_goes_on_from_it(converted, tmp_path):
    runs.train(tmp_path / "run.gin", tmp_path / "new")
    history = runs.read_history(tmp_path / "new" / "metrics.jsonl")
    (line,) = [line for line in history if "loss" in line]
    assert line["step"] == runs.STEPS + 1 and line["loss"] < 3  # a draw's is 5.6


# Names of a family of Hugging Face instead of rules


def test_a_family_of_hugging_face_comes_with_its_moments(step, gin_file, tmp_path, capsys):
    """As a trainer of Hugging Face leaves it behind that DeepSpeed has partitioned."""
    run = runs.load_run(gin_file, tmp_path)
    leaves = {path: leaf[()] for path, leaf in NativeCheckpoint(step).leaves().items()}
    named = {}
    for state, start in STATES.items():
        own = {path: leaf for path, leaf in leaves.items() if path.startswith(start)}
        own = {path.removeprefix(start): leaf for path, leaf in own.items()}
        for tensor in export_tensors(run.model, LLAMA.layout, own, dtype=np.dtype("float32")):
            named[f"{state}/{tensor.name}"] = tensor.make()
    write_universal(named, tmp_path / "universal", step=runs.STEPS, piece_bytes=1 << 20)
    run_file = tmp_path / "run.gin"
    text = f"from __gin__ import dynamic_registration\ninclude '{gin_file}'\nDIRECTORY = 'new'\n"
    run_file.write_text(text)
    options = ["--run", run_file, "--family", "llama", "--step", runs.STEPS]
    words = ["checkpoint", "convert", tmp_path / "universal", tmp_path / "converted", *options]
    assert cli.main(list(map(str, words))) == 0
    assert cli.main(["checkpoint", "diff", str(step), str(tmp_path / "converted")]) == 0
    assert "38 arrays are equal" in capsys.readouterr().out
