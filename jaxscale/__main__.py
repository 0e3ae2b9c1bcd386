"""The `jaxscale` command, also as `python -m jaxscale`."""

import signal
import sys


def main() -> int:
    """Runs one verb; returns the exit status."""
    # Importing JAX takes a second, in which the exception that Python makes of Ctrl-C may be lost:
    # the system's own action is not. Each verb then hears signals by `launch.preemption`.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from jaxscale import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
