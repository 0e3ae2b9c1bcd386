"""The verbs of the command: where the function of each is, and what its help says."""

from typing import NamedTuple


class Word(NamedTuple):
    """A parameter of a verb's function that stands on the command line without its name.

    `is_repeated` says that there may be several, which reach the function as a tuple.
    """

    name: str
    help: str
    is_repeated: bool = False


class Verb(NamedTuple):
    """Where a verb's function is, imported only when the verb is used, and a line of help.

    `option` is a parameter of the function that has an option of its own on the command line, with
    its help. `flags` are parameters that are true where the command line names them. `has_file`
    says whether a gin file or a run's directory comes before the `words`.
    """

    function: str
    help: str
    option: tuple[str, str] | None = None
    flags: tuple[tuple[str, str], ...] = ()
    words: tuple[Word, ...] = ()
    has_file: bool = True


VERBS = {
    "pretrain": Verb(
        "jaxscale.run.pretrain:pretrain",
        "train a model; resumes if the run's directory has a checkpoint",
    ),
    "generate": Verb(
        "jaxscale.run.generate:generate",
        "sample text from a checkpoint",
    ),
    "score": Verb(
        "jaxscale.run.reward:score",
        "print what a reward model says of texts, or of answers to a prompt",
    ),
    "serve": Verb(
        "jaxscale.run.serve:serve",
        "answer OpenAI's clients over HTTP with a checkpoint",
    ),
    "evaluate": Verb(
        "jaxscale.run.evaluate:evaluate",
        "measure a checkpoint on held-out text",
    ),
    "corpus": Verb(
        "jaxscale.data.build_corpus:build_corpus",
        "filter raw text and take near duplicates out, into JSON lines with a report",
    ),
    "tokenizer": Verb(
        "jaxscale.data.tokenizer:train_tokenizer",
        "train a tokenizer",
    ),
    "data": Verb(
        "jaxscale.run.data:show_data",
        "show what a run will be trained on: counts, how full its rows are, a batch as text",
    ),
    "plot": Verb(
        "jaxscale.run.plot:plot",
        "draw the curves of runs: loss, held-out figures, learning rate",
        words=(Word("runs", "directories of runs, drawn in one picture", is_repeated=True),),
        has_file=False,
    ),
    "inspect": Verb(
        "jaxscale.run.inspect:inspect",
        "print a run's configuration, parameters, shardings and bytes; allocates nothing",
    ),
    "compile": Verb(
        "jaxscale.run.compile:compile_step",
        "compile a run's step for devices that are not here and print its memory and collectives;"
        " exit 1 if it does not fit",
        option=("topology", "MACHINE:HOSTSxGPUS_PER_HOST, such as h200:16x8; or v5e:2x4"),
    ),
    "import": Verb(
        "jaxscale.run.huggingface:import_model",
        "make a run's directory of a folder of Hugging Face",
        words=(Word("source", "the folder: config.json, safetensors, tokenizer"),),
        has_file=False,
    ),
    "adapt": Verb(
        "jaxscale.run.adapt:adapt",
        "make a run's directory in which low-rank adapters of a model are trained",
        words=(Word("directory", "of the new run"),),
    ),
    "average": Verb(
        "jaxscale.run.average:average",
        "make a run's directory of the running average of a run's parameters",
        words=(Word("directory", "of the new run"),),
    ),
    "describe": Verb(
        "jaxscale.run.describe:describe",
        "print the fields of a part of a run, with their meanings and defaults",
        words=(
            Word("name", "a class or function that jaxscale.run names, such as OptimizerConfig"),
        ),
        has_file=False,
    ),
    "chat": Verb(
        "jaxscale.run.chat:chat",
        "talk to an imported model in the terminal",
    ),
    "export": Verb(
        "jaxscale.run.huggingface:export_model",
        "write a checkpoint as a folder that Hugging Face loads",
        words=(Word("directory", "the new folder"),),
    ),
    "tune": Verb(
        "jaxscale.run.tune:tune",
        "measure block sizes of the Triton kernels on this GPU and write the fastest to a file",
        words=(Word("output", "the new file, for runtime.block_sizes"),),
        has_file=False,
    ),
    "plan": Verb(
        "jaxscale.run.plan:plan",
        "find the fastest mesh for a run on devices that need not be here, say why others are"
        " slower, and write a file for pretrain",
        option=("devices", "DEVICE:HOSTSxDEVICES_PER_HOST, such as h200:2x8"),
        flags=(("measure", "time matmuls, links and the best plans' layers on the devices here"),),
    ),
}

CHECKPOINT = "jaxscale.run.checkpoint"
ACTIONS = {
    "ls": "list the checkpoints in a folder",
    "show": "print each array's type, shape and bytes",
    "verify": "check the whole by its checksums, or that all of it can be read",
    "convert": "write it as a checkpoint of jaxscale or of another system",
    "diff": "compare two array by array; exit 1 if they differ",
}
CONVERT_OPTIONS = {
    "to": "jaxscale (the default), deepspeed, safetensors or npz",
    "family": "model type of Hugging Face, by whose names the arrays are called",
    "run": "gin file of the run that is to start from it",
    "budget": "host memory, such as 512MiB; 4GiB when not given",
}

EXAMPLES = """\
examples:
  jaxscale inspect experiments/configs/runs/main_job.gin
  jaxscale compile experiments/configs/runs/llama_1b.gin --topology h200:16x8 \\
      --set mesh.data=128 --set data.batch_size=512
  jaxscale plan experiments/configs/runs/llama_1b.gin --devices h200:2x8 \\
      --set data.batch_size=512
  jaxscale corpus experiments/configs/examples/corpus.gin --set num_processes=2
  jaxscale tokenizer experiments/configs/runs/main_job.gin
  jaxscale pretrain experiments/configs/runs/main_job.gin --set train.steps=100 --set mesh.zero=3
  jaxscale generate runs/main_job --set 'prompts="Once upon"'
  jaxscale plot runs/main_job runs/zero3
  jaxscale import models/phi3 --set directory=runs/phi3
  jaxscale adapt runs/phi3 runs/phi3_lora --set lora.rank=8
  jaxscale chat runs/phi3 --set sampling.temperature=0.7
  jaxscale serve runs/phi3 --set port=8000
  jaxscale score runs/reward --set 'prompt=Is 7 even?' --set 'texts=("No.", "Yes.")'
  jaxscale export runs/phi3 models/phi3_tuned
  jaxscale checkpoint show runs/main_job/checkpoints

The gin files come with the package, as jaxscale/configs/... wherever it is:
  jaxscale pretrain jaxscale/configs/runs/main_job.gin

A run leaves the file that repeats it in its directory, which may stand for the file:
  jaxscale pretrain runs/main_job/config.gin --set directory=runs/again

--set FIELD=VALUE             a parameter of the verb, such as prompts, or a field of the run,
                              such as directory
--set NAME.FIELD=VALUE        a field of the run's configuration NAME, and so on inwards; a number
                              selects an item of a tuple: model.pattern.0.attention.window=128
--set SCOPE/NAME.FIELD=VALUE  the same in one gin scope, where a file configures two of a kind
--set MACRO=VALUE             a macro of the file, such as DIRECTORY
VALUE is a Python literal; anything else is taken as text.

exit status:
  0           done
  1           the run failed
  2           bad input: one line says what was given and what was expected
  143 or 130  stopped by SIGTERM or SIGINT; a training run ends after its step and saves
              everything, before its first step it ends at once
  75 or 134   another process of the run is stuck or dead: start it again
"""
