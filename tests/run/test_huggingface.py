"""From a folder of Hugging Face to a run that generates and trains on, and back."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file

from jaxscale import cli, config, tree
from jaxscale.convert.tokenizer import tokenizer_config
from jaxscale.data.tokenizer import load_tokenizer
from jaxscale.models.config.facts import checkpoint_facts
from jaxscale.models.quantised import QuantisedConfig
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.run.huggingface import import_model
from jaxscale.run.model import load
from jaxscale.run.run import load_run
from jaxscale.types import InputError

FIXTURES = Path(__file__).parents[1] / "convert" / "fixtures"
END = "<|endoftext|>"


def with_tokenizer(target, name="phi3", **fields):
    """A fixture with a tokenizer of single characters, whose end token is 94."""
    path = Path(shutil.copytree(FIXTURES / name, target / "model"))
    vocabulary = {chr(33 + i): i for i in range(94)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary | {END: 94}, []))
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": END}}))
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(values | {"eos_token_id": [94, 96]} | fields))
    return path


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """(the folder, the directory of the run that the command line made of it)."""
    root = tmp_path_factory.mktemp("imported")
    source, directory = with_tokenizer(root), root / "run"
    assert cli.main(["import", str(source), "--set", f"directory={directory}"]) == 0
    return source, directory


@pytest.mark.parametrize("more", [[], ["--set=quantisation.bits=8"]], ids=["whole", "integers"])
def test_an_imported_model_generates(imported, capsys, more):
    _, directory = imported
    settings = ["--set", "prompts=hello", "--set", "max_new_tokens=5", *more]
    assert cli.main(["generate", str(directory), *settings]) == 0
    assert capsys.readouterr().out.startswith("hello")


def test_an_export_is_the_folder_that_was_imported(imported, tmp_path):
    source, directory = imported
    assert cli.main(["export", str(directory), str(tmp_path / "out")]) == 0
    got, wanted = (load_file(path / "model.safetensors") for path in (tmp_path / "out", source))
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(got[name].view(np.uint16), tensor.view(np.uint16), name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    values, before = (
        json.loads((path / "config.json").read_text()) for path in (tmp_path / "out", source)
    )
    assert values["model_type"] == "phi3" and values["eos_token_id"] == before["eos_token_id"]


@pytest.mark.long
def test_an_export_in_few_bits_generates_as_the_model_in_few_bits(imported, tmp_path):
    _, directory = imported
    few = QuantisedConfig(4, embedding_bits=8)
    bits = [f"--set=quantisation.{name}={value}" for name, value in vars(few).items()]
    assert cli.main(["export", str(directory), str(tmp_path / "out"), *bits]) == 0
    got, wanted = load(tmp_path / "out"), load(directory, quantisation=few)
    tokens = wanted.encode("hello")
    np.testing.assert_array_equal(got(tokens), wanted(tokens))


def test_an_import_over_several_devices_has_the_same_weights(imported, tmp_path):
    source, directory = imported
    settings = [f"directory={tmp_path / 'run'}", "mesh.data=2", "mesh.zero=3"]
    assert cli.main(["import", str(source), *(f"--set={each}" for each in settings)]) == 0
    got, wanted = (tree.flatten(load(path).pure_params()) for path in (tmp_path / "run", directory))
    for path, leaf in wanted.items():
        np.testing.assert_array_equal(got[path], leaf, path)
    with pytest.raises(InputError, match=r"mesh.pipeline: given 2"):
        import_model(source=str(source), directory="other", mesh=MeshConfig(pipeline=2))


def test_the_weights_and_the_type_are_those_of_the_folder(imported):
    source, directory = imported
    run = load_run([directory / "config.gin"])
    assert (run.policy.parameters, run.policy.compute) == ("bfloat16", "bfloat16")
    tokens = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    got = np.asarray(load(directory).pure_params()["embedding"]["tokens"])
    np.testing.assert_array_equal(got.view(np.uint16), tokens.view(np.uint16))


def test_a_gin_file_names_a_folder_as_its_model(imported, tmp_path):
    source, directory = imported
    file = tmp_path / "tuned.gin"
    file.write_text(
        "from __gin__ import dynamic_registration\n"
        "from jaxscale import run\n"
        f"include '{directory}/config.gin'\n"
        "run.Run.model = @run.huggingface_model()\n"
        f"run.huggingface_model.directory = '{source}'\n"
    )
    model = load_run([file]).model
    saved = load_run([directory / "config.gin"]).model
    assert checkpoint_facts(model)["fingerprint"] == checkpoint_facts(saved)["fingerprint"]


def test_an_existing_directory_is_kept(imported):
    source, directory = imported
    with pytest.raises(InputError, match=r"directory: given .* does not exist yet"):
        import_model(source=str(source), directory=str(directory))


def test_texts_begin_as_hugging_faces_tokenizer_begins_them(tmp_path):
    path = with_tokenizer(tmp_path)
    (path / "tokenizer_config.json").write_text("{}")  # as that of GPT-2 says no end
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    pair = [("!", 0)]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("! $A", None, pair)
    tokenizer.save(str(path / "tokenizer.json"))
    run = import_model(source=str(path), directory=str(tmp_path / "run"))
    assert (run.data.tokenizer.bos_token, run.data.tokenizer.eos_token) == ("!", END)
    ours = load_tokenizer(run.data.tokenizer)
    assert ours.encode("bc") == tokenizer.encode("bc").ids == ours.encode_batch(["bc"])[0].tolist()


def without(path, name):
    (path / name).unlink()


TOKENIZERS = {
    "none": (lambda path: without(path, "tokenizer.json"), "a folder with tokenizer.json or"),
    "no end": (
        lambda path: (path / "tokenizer_config.json").write_text('{"eos_token": 3}'),
        "eos_token: given 3",
    ),
    "absent end": (
        lambda path: (path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}'),
        "eos_token: given '</s>'",
    ),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_folder_without_a_whole_tokenizer_is_refused(tmp_path, name):
    change, message = TOKENIZERS[name]
    path = with_tokenizer(tmp_path)
    change(path)
    with pytest.raises(InputError, match=message):
        import_model(source=str(path), directory=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_disagrees_with_the_configuration_is_refused(tmp_path):
    path = with_tokenizer(tmp_path, eos_token_id=7)
    with pytest.raises(InputError, match=r"tokenizer_config.json: eos_token: .*\(94\)'.*\(7,\)"):
        config.run(import_model, [], [f"source={str(path)!r}", "directory='absent'"])


@pytest.mark.parametrize("end", [5000, -1, "94", 3.5, {"a": 1}, [94], True])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_end_that_is_no_token_of_the_model_is_refused(tmp_path, file, end):
    path = with_tokenizer(tmp_path)
    values = json.loads((path / file).read_text()) if (path / file).exists() else {}
    (path / file).write_text(json.dumps(values | {"eos_token_id": [94, end]}))
    with pytest.raises(InputError, match=f"{file}: eos_token_id: given .*vocab_size - 1 = 96"):
        import_model(source=str(path), directory=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_more_tokens_than_the_model_is_refused(tmp_path):
    path = with_tokenizer(tmp_path, vocab_size=90, eos_token_id=None)
    with pytest.raises(
        InputError, match=r"config\.json: vocab_size: given 90, expected at least 95"
    ):
        tokenizer_config(path)


@pytest.fixture(scope="module")
def adapted(imported, tmp_path_factory):
    """The directory of a run with new adapters of the imported model."""
    path = tmp_path_factory.mktemp("adapted") / "run"
    assert cli.main(["adapt", str(imported[1]), str(path), "--set", "lora.rank=2"]) == 0
    return path


def test_new_adapters_are_exported_as_the_model_that_was_imported(imported, adapted, tmp_path):
    words = [str(adapted), str(tmp_path / "out"), "--set=dtype=bfloat16"]
    assert cli.main(["export", *words]) == 0
    got, wanted = (load_file(at / "model.safetensors") for at in (tmp_path / "out", imported[0]))
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(got[name].view(np.uint16), tensor.view(np.uint16), name)


def test_adapters_of_peft_come_in_and_go_out(imported, tmp_path):
    source, given = FIXTURES / "peft_phi3", tmp_path / "adapted"
    words = [str(imported[1]), str(given), f"--set=adapters={source}"]
    assert cli.main(["adapt", *words]) == 0
    assert cli.main(["export", str(given), str(tmp_path / "out"), "--set=is_peft=True"]) == 0
    got, wanted = (load_file(at / "adapter_model.safetensors") for at in (tmp_path / "out", source))
    assert got.keys() == wanted.keys()


def test_new_and_given_adapters_exclude_each_other(imported, tmp_path, capsys):
    words = [str(imported[1]), str(tmp_path / "adapted")]
    assert cli.main(["adapt", *words]) == 2
    assert "a folder of PEFT, or else lora.rank of new ones" in capsys.readouterr().err


@pytest.mark.long
def test_only_adapters_are_trained_and_an_export_has_them_merged(imported, adapted, tmp_path):
    source, tuned = imported[0], tmp_path / "tuned"
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.txt").write_text("abcdefgh" * (number % 3 + 1))
    file = tmp_path / "tuned.gin"
    file.write_text(
        "from __gin__ import dynamic_registration\n"
        "from jaxscale import run\n"
        f"include '{adapted}/config.gin'\n"
        "run.DataConfig.sources = (@run.TextSource(),)\n"
        f"run.TextSource.paths = ('{tmp_path}/text',)\n"
    )
    settings = {
        "directory": tuned,
        "data.cache_directory": tmp_path / "cache",
        "data.sequence_length": 24,
        "data.batch_size": 8,
        "mesh.data": 8,
        "train.steps": 3,
        "optimizer.learning_rate": 0.1,
    }
    words = [f"--set={name}={value}" for name, value in settings.items()]
    assert cli.main(["pretrain", str(file), *words]) == 0
    before, after = (load(path).pure_params() for path in (adapted, tuned))
    for path, leaf in tree.flatten(before).items():
        is_same = np.array_equal(leaf, tree.flatten(after)[path])
        assert is_same != ("_lora/" in path), path
    assert cli.main(["export", str(tuned), str(tmp_path / "out"), "--set=dtype=float32"]) == 0
    got, wanted = (load_file(path / "model.safetensors") for path in (tmp_path / "out", source))
    assert got.keys() == wanted.keys()
    changed = {name for name in wanted if not np.array_equal(got[name], wanted[name])}
    assert changed == {name for name in wanted if "_proj" in name}
