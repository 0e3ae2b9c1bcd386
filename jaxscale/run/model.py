"""A trained model in a notebook: from a run or its directory to logits and samples.

model = load("runs/tour")
logits = model(model.encode("def "))
model.generate("def ", max_new_tokens=40)
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxscale.checkpoint.restore import Restored, restore_params
from jaxscale.convert.folder import open_folder
from jaxscale.data.tokenizer import Tokenizer, check_tokenizer, check_vocabulary, load_tokenizer
from jaxscale.launch.memory import check_fits
from jaxscale.models.config.facts import checkpoint_facts
from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import ExecutionConfig, Whole
from jaxscale.models.lora import merged, without_adapters
from jaxscale.models.parameters import parameter_table
from jaxscale.models.quantised import QuantisedConfig, quantised
from jaxscale.parallel.mesh import MeshConfig, make_mesh
from jaxscale.parallel.region import Region, make_serving_operations
from jaxscale.parallel.rules import make_specs
from jaxscale.rlhf.critic import CRITIC
from jaxscale.run.folder import folder_run, is_folder
from jaxscale.run.run import Run, load_run
from jaxscale.serve.decoding import check_prompts, generate_tokens
from jaxscale.serve.sampling import SamplingConfig
from jaxscale.train.run_directory import CONFIG
from jaxscale.train.state import stored_params
from jaxscale.types import Array, Batch, InputError, Params


class LanguageModel(nnx.Module):
    """A decoder with its parameters and its tokenizer.

    Args:
        decoder: the model, bound to one device's operations, or to those of `region`.
        params: the parameter tree.
        tokenizer: of the texts; None for a model that is given tokens.
        region: of the mesh over which the model is spread; None for one device.
    """

    def __init__(
        self,
        decoder: Decoder,
        params: Params,
        tokenizer: Tokenizer | None = None,
        region: Region | None = None,
    ):
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.region = region
        self.params = nnx.data(jax.tree.map(nnx.Param, params))

    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        segments: Array | None = None,
    ) -> Array:
        """Logits [B, T, V] of tokens [B, T]; positions default to 0 .. T - 1."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        batch = {"tokens": tokens, "positions": positions}
        if segments is not None:
            batch["segments"] = segments
        forward = _logits if self.region is None else _logits_of_region(self.region)
        return forward(self.decoder, self.pure_params(), batch)

    def encode(self, text: str) -> Array:
        """The tokens [1, T] of a text."""
        return jnp.asarray([self.tokenizer.encode(text)], jnp.int32)

    def generate(
        self,
        prompts: Sequence[str] | str,
        *,
        max_new_tokens: int = 100,
        sampling: SamplingConfig = SamplingConfig(),
    ) -> list[str]:
        """Continues prompts; arguments and errors as `run.generate.generate`.

        Returns:
            The continuations, without the prompts.
        """
        prompts = (prompts,) if isinstance(prompts, str) else prompts
        outputs = generate_tokens(
            self.decoder,
            self.pure_params(),
            [self.tokenizer.encode(prompt) for prompt in prompts],
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            eos_id=self.tokenizer.eos_id,
            num_tokens=self.tokenizer.vocab_size,
            region=self.region,
        )
        return [self.tokenizer.decode(output) for output in outputs]

    def pure_params(self) -> Params:
        """The parameter tree as plain arrays, as the train step takes it."""
        return jax.tree.map(
            lambda p: p[...], self.params, is_leaf=lambda p: isinstance(p, nnx.Param)
        )


def _logits(decoder: Decoder, params: Params, batch: Batch) -> Array:
    return decoder.logits(params, batch)[0]


@functools.cache
def _logits_of_region(region: Region) -> Callable:
    """`_logits` over the devices of a region, compiled once for each shape of a batch."""

    @functools.partial(jax.jit, static_argnums=0)
    def forward(decoder: Decoder, params: Params, batch: Batch) -> Array:
        local = functools.partial(_logits, decoder)
        everywhere = PartitionSpec()
        return region.forward(local, in_specs=(everywhere,), out_specs=everywhere)(params, batch)

    return forward


def load(
    run: Run | str | Path,
    *,
    step: int | None = None,
    tensor: int = 1,
    quantisation: QuantisedConfig | None = None,
    prompts: Sequence[str] = (),
    max_new_tokens: int = 1,
    admitted: Sequence[str] = (),
) -> LanguageModel:
    """The model of a run's checkpoint.

    Args:
        run: the run, or its directory, whose saved configuration is read. The checkpoint is the
            one in that directory, wherever it was when the run trained.
        step: which checkpoint; the newest when None.
        tensor: devices over which the model is spread.
        quantisation: of the matrices of layers, on one device; None keeps them as they are, those
            of a folder in few bits too.
        prompts: checked before anything large is read, with `max_new_tokens`.
        max_new_tokens: longest continuation.
        admitted: modules beside jaxscale that a saved configuration may name, see `config.run`.
    Raises:
        InputError: there is no such checkpoint, it had another tokenizer, or the model does not fit
            `tensor` devices.
    """
    run = opened(run, admitted)
    tokenizer = load_tokenizer(run.data.tokenizer)
    check_vocabulary(tokenizer, run.model.vocab_size)
    if prompts:
        ids = [tokenizer.encode(prompt) for prompt in prompts]
        check_prompts(ids, run.model, max_new_tokens)
    mesh = MeshConfig(tensor=tensor)
    devices = make_mesh(mesh, jax.devices()[:tensor])
    specs = make_specs(parameter_table(run.model), mesh)
    check = functools.partial(check_tokenizer, tokenizer=tokenizer)
    if quantisation is not None and tensor > 1:
        raise InputError("tensor", tensor, "1 with quantised weights")
    if run.execution.is_batch_invariant and (tensor > 1 or quantisation is not None):
        expected = "one device and whole weights with the strategy BatchInvariant"
        raise InputError("ExecutionConfig.strategy", run.execution.strategy, expected)
    is_kept = quantisation is None and tensor == 1 and not run.execution.is_batch_invariant
    params = restore_model(run, step=step, tensor=tensor, check=check, is_packed=is_kept).params
    config = run.model
    if quantisation is not None:
        params, config = merged(params, config.lora), without_adapters(config)
        params = quantised(params, parameter_table(config), quantisation)
    # Not as in training: its attention may be of a device or of lengths that are not here, and a
    # loop over layers decodes at half the rate of unrolled ones.
    strategy = run.execution.strategy if run.execution.is_batch_invariant else Whole()
    is_reference = run.runtime.is_deterministic and not run.execution.is_batch_invariant
    execution = ExecutionConfig(
        is_scanned=False,
        remat="none",
        attention="reference" if is_reference else None,
        strategy=strategy,
    )
    operations, region = execution.operations(), None
    if tensor > 1:
        attention = operations.backends.attention
        operations = make_serving_operations(mesh, specs, attention=attention)
        region = Region(devices, specs, operations)
    decoder = Decoder(config, operations, run.policy, execution)
    return LanguageModel(decoder, params, tokenizer, region)


def opened(run: Run | str | Path, admitted: Sequence[str] = ()) -> Run:
    """A run, or that of a directory, wherever it lies by now; `admitted` as for `load`.

    A folder of Hugging Face is one, too.
    """
    if isinstance(run, Run):
        return run
    path = Path(run).expanduser()
    if is_folder(path):
        return folder_run(path)
    return dataclasses.replace(load_run([path / CONFIG], (), admitted), directory=str(path))


def restore_model(
    run: Run,
    *,
    step: int | None = None,
    tensor: int = 1,
    check: Callable[[dict[str, Any]], None] | None = None,
    is_packed: bool = False,
    is_averaged: bool = False,
) -> Restored:
    """The parameters of a run's checkpoint, spread over the first `tensor` devices.

    Args:
        run: the run.
        step: which checkpoint; the newest when None.
        tensor: devices over which each matrix is spread.
        check: as `checkpoint.restore.restore_params`.
        is_packed: keeps the integers of a folder in few bits; else its matrices are made whole.
        is_averaged: as `checkpoint.restore.restore_params`.
    Raises:
        InputError: there is no such checkpoint, it is damaged, or it is of another model.
    """
    mesh = MeshConfig(tensor=tensor)
    devices = make_mesh(mesh, jax.devices()[:tensor])
    table = parameter_table(run.model)
    specs = make_specs(table, mesh)
    stored = stored_params(table, devices, specs, run.policy.parameters)
    folder = open_folder(run.path) if is_folder(run.path) else None
    if folder is not None and folder.is_packed and is_packed:
        return Restored(0, folder.packed_params(stored))
    check_fits("model", {"parameters": stored})
    if folder is not None:
        return Restored(0, folder.params(stored))
    return restore_params(
        run.checkpoint.within(run.path),
        checkpoint_facts(run.model),
        stored,
        dims=specs.dims,
        layout=specs.layout,
        step=step,
        check=check,
        left_out=() if run.critic is None else (CRITIC,),
        is_averaged=is_averaged,
    )
