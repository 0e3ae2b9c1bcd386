"""An engine for a run's checkpoint, and prompts continued by it in this process.

answer = pipeline("runs/tour")
answer(["def ", "class "], max_new_tokens=40)
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jaxscale.convert.folder import family_of
from jaxscale.convert.peft import read_adapters
from jaxscale.convert.tokenizer import stop_ids
from jaxscale.models.lora import Adapters
from jaxscale.models.quantised import QuantisedConfig
from jaxscale.run.folder import KEPT
from jaxscale.run.huggingface import files_beside
from jaxscale.run.model import load, opened
from jaxscale.run.run import Run
from jaxscale.serve.config import EngineConfig
from jaxscale.serve.drafting import Draft
from jaxscale.serve.engine import Engine
from jaxscale.serve.requests import Completion, RequestConfig


def make_engine(
    run: Run | str | Path,
    *,
    config: EngineConfig = EngineConfig(),
    step: int | None = None,
    tensor: int = 1,
    draft: Run | str | Path | None = None,
    adapters: Mapping[str, str] = MappingProxyType({}),
    quantisation: QuantisedConfig | None = None,
) -> Engine:
    """An engine with a run's model.

    Args:
        run, step, tensor, quantisation: as `run.model.load`.
        config: sizes and policies.
        draft: a run of a smaller model that guesses tokens, see `EngineConfig.num_drafts`.
        adapters: folders of PEFT by the name under which requests ask for them; of a model that was
            imported from Hugging Face.
    Raises:
        InputError: as `run.model.load`.
    """
    model = load(run, step=step, tensor=tensor, quantisation=quantisation)
    small = None if draft is None else load(draft)
    return Engine(
        model.decoder,
        model.pure_params(),
        config=config,
        tokenizer=model.tokenizer,
        region=model.region,
        draft=small and Draft(small.decoder, small.pure_params()),
        adapters=_read_adapters(run, adapters),
    )


def _read_adapters(
    run: Run | str | Path,
    adapters: Mapping[str, str],
) -> dict[str, Adapters]:
    """Low-rank adapters by name; Args and Raises as `make_engine`."""
    if not adapters:
        return {}
    run = opened(run)
    family = family_of(run.model, files_beside(run))
    return {
        name: read_adapters(folder, run.model, family.layout) for name, folder in adapters.items()
    }


class Pipeline:
    """Continues texts in this process.

    Args:
        engine: with a tokenizer.
        stop_ids: tokens that end a continuation, beside the tokenizer's end token.
    """

    def __init__(self, engine: Engine, stop_ids: tuple[int, ...] = ()):
        self.engine = engine
        self._stop_ids = stop_ids

    def __call__(
        self,
        prompts: str | Sequence[str],
        config: RequestConfig | None = None,
        **fields: Any,
    ) -> list[Completion] | list[list[Completion]]:
        """Continues one text or several.

        Args:
            prompts: texts.
            config: how.
            fields: of `RequestConfig` that are to be others, such as `max_new_tokens=40`.
        Returns:
            The continuations of each prompt; of a single text its own.
        Raises:
            InputError: a prompt is empty or too long.
        """
        config = dataclasses.replace(config or RequestConfig(), **fields)
        if not config.ignore_eos:
            stop_ids = (*config.stop_ids, *self._stop_ids)
            config = dataclasses.replace(config, stop_ids=stop_ids)
        if isinstance(prompts, str):
            return self.engine.generate([prompts], config)[0]
        return self.engine.generate(prompts, config)


def pipeline(
    run: Run | str | Path,
    *,
    config: EngineConfig = EngineConfig(),
    step: int | None = None,
    tensor: int = 1,
) -> Pipeline:
    """Continues prompts with a run's model.

    Args:
        run: the run, or its directory.
        config: sizes and policies of the engine.
        step: which checkpoint; the newest when None.
        tensor: devices over which the model is spread.
    Raises:
        InputError: as `run.model.load`.
    """
    run = opened(run)
    engine = make_engine(run, config=config, step=step, tensor=tensor)
    return Pipeline(engine, stop_ids(chat_folder(run)))


def chat_folder(run: Run) -> Path:
    """Where a chat template may lie: with an imported model, or beside the tokenizer's file."""
    kept, tokenizer = run.path / KEPT, run.data.tokenizer.path
    if kept.is_dir() or tokenizer is None:
        return kept
    path = Path(tokenizer).expanduser()
    return path if path.is_dir() else path.parent
