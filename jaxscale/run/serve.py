"""`serve`: answers OpenAI's clients with a run's checkpoint."""

import functools
import gc
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from jaxscale.convert.tokenizer import stop_ids
from jaxscale.launch.runtime import apply_runtime
from jaxscale.models.quantised import QuantisedConfig
from jaxscale.run.model import load
from jaxscale.run.pipeline import chat_folder, make_engine
from jaxscale.run.run import Run
from jaxscale.serve.config import EngineConfig
from jaxscale.types import InputError, Params

if TYPE_CHECKING:
    from jaxscale.serve.handler import Service

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
BACKLOG = 2048
MAX_PORT = 2**16 - 1


def serve(
    *,
    run: Run,
    host: str = LOOPBACK,
    port: int = 8000,
    model_name: str | None = None,
    api_key_file: str | None = None,
    engine: EngineConfig = EngineConfig(),
    step: int | None = None,
    tensor: int = 1,
    draft: str | None = None,
    adapters: dict[str, str] | None = None,
    quantisation: QuantisedConfig | None = None,
    timeout_s: float | None = None,
    drain_s: int = 30,
    is_steered: bool = False,
    warm_up: bool = True,
) -> None:
    """Serves a trained model over HTTP until a signal ends it.

    Args:
        run: the run; its mesh is that of the training and is not used.
        host: address to listen at; by default only this machine reaches it.
        port: to listen at.
        model_name: under which clients ask for the model; the directory's name when None.
        api_key_file: a file with a key a line, of which a client must send one; None for no keys.
        engine: sizes and policies.
        step: which checkpoint; the newest when None.
        tensor: devices over which the model is spread.
        draft: directory of a run of a smaller model that guesses tokens, see
            `EngineConfig.num_drafts`.
        adapters: folders of PEFT by the name under which clients ask for them as a model.
        quantisation: of the matrices of layers, on one device; None keeps them as they are.
        timeout_s: after which a request is ended; None for never.
        is_steered: whether clients may pause the engine and have it take the weights of another
            checkpoint of the run.
        drain_s: seconds that running requests are given after SIGTERM.
        warm_up: whether all steps are compiled before the first request.
    Raises:
        InputError: there is no such checkpoint, the port is taken, a file cannot be read, or the
            extra `serve` is not installed.
    """
    apply_runtime(run.runtime, str(run.path))
    try:
        import uvicorn

        from jaxscale.serve.server import make_app
    except ImportError as error:
        expected = "the extra: pip install 'jaxscale[serve]'"
        raise InputError("serve", f"no module {error.name}", expected) from error
    read_params = functools.partial(_read_params, run, tensor, quantisation)
    service = make_service(
        run,
        model_name=model_name,
        api_keys=read_keys(api_key_file) if api_key_file else (),
        timeout_s=timeout_s,
        read_params=read_params if is_steered else None,
    )
    if service.model in (adapters or {}):
        expected = "other names than the model's, which nobody could ask for any more"
        raise InputError("adapters", service.model, expected)
    listening = listen(host, port)
    made = make_engine(
        run,
        config=engine,
        step=step,
        tensor=tensor,
        draft=draft,
        adapters=adapters or {},
        quantisation=quantisation,
    )
    if warm_up:
        logger.info("compiled %d shapes of steps", made.warm_up())
    # What lives as long as the server need not be looked at again by each collection.
    gc.collect()
    gc.freeze()
    settings = uvicorn.Config(
        make_app(lambda: made, service),
        log_level="warning",
        timeout_graceful_shutdown=drain_s,
    )
    address = "{}:{}".format(*listening.getsockname())
    print(f"serving {service.model} at http://{address}/v1", flush=True)
    uvicorn.Server(settings).run(sockets=[listening])


def make_service(
    run: Run,
    *,
    model_name: str | None = None,
    api_keys: tuple[str, ...] = (),
    timeout_s: float | None = None,
    read_params: Callable[[int | None], Params] | None = None,
) -> "Service":
    """What of a run is served; Args and Raises as `serve`."""
    from jaxscale.data.chat_template import find_chat_template
    from jaxscale.serve.handler import Service

    folder = chat_folder(run)
    return Service(
        model=model_name or run.path.resolve().name,
        chat_template=find_chat_template(folder),
        api_keys=api_keys,
        stop_ids=stop_ids(folder),
        timeout_s=timeout_s,
        read_params=read_params,
    )


def _read_params(
    run: Run,
    tensor: int,
    quantisation: QuantisedConfig | None,
    step: int | None,
) -> Params:
    """A checkpoint's parameters in the form in which the engine has those of another."""
    return load(run, step=step, tensor=tensor, quantisation=quantisation).pure_params()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        InputError: the address is taken or is not this machine's.
    """
    if not 0 <= port <= MAX_PORT:
        raise InputError("port", port, f"0 <= port <= {MAX_PORT}")
    try:
        return socket.create_server((host, port), backlog=BACKLOG)
    except OSError as error:
        expected = f"an address of this machine that is free ({error.strerror})"
        raise InputError("port", f"{host}:{port}", expected) from error


def read_keys(file: str) -> tuple[str, ...]:
    """The keys in a file, one a line.

    Raises:
        InputError: it cannot be read or holds none, which would let everybody in.
    """
    try:
        lines = Path(file).expanduser().read_text().splitlines()
    except OSError as error:
        expected = f"a file that can be read ({error.strerror})"
        raise InputError("api_key_file", file, expected) from error
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys:
        raise InputError("api_key_file", file, "a key a line")
    return keys
