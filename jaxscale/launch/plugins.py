"""What JAX says of plugins that cannot start."""

import logging

XLA_BRIDGE = "jax._src.xla_bridge"  # the name of JAX's logger of platforms and plugins


def shorten_errors() -> None:
    """Lets one line stand for the traceback that JAX logs of a GPU plugin that cannot start."""
    logging.getLogger(XLA_BRIDGE).addFilter(_without_traceback)


def _without_traceback(record: logging.LogRecord) -> bool:
    if record.exc_info and "plugin configuration error" in record.getMessage():
        reason = str(record.exc_info[1]).partition("\n")[0]
        record.msg, record.args = f"{record.getMessage()} {reason}", ()
        record.exc_info = None
    return True
