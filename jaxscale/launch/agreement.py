"""What every process of a run must share is compared by name before the first step."""

import json

from jax._src import distributed  # private to JAX, see `launch.processes`

from jaxscale.launch.processes import process_index
from jaxscale.types import InputError

TIMEOUT_MS = 600_000  # a process may still be reading its texts


def check_agreement(facts: dict[str, str]) -> None:
    """Compares what the processes of a run were given; in a run of one it does nothing.

    Args:
        facts: name -> value as text, of what must be the same everywhere.
    Raises:
        InputError: in every process, if one of them differs from process 0; names the first fact.
    """
    client = distributed.global_state.client
    if client is None:
        return
    index, count = process_index(), distributed.global_state.num_processes
    client.key_value_set(f"jaxscale/facts/{index}", json.dumps(facts))
    if index == 0:
        given = [
            json.loads(client.blocking_key_value_get(f"jaxscale/facts/{other}", TIMEOUT_MS))
            for other in range(count)
        ]
        client.key_value_set("jaxscale/agreement", json.dumps(first_difference(given)))
    difference = json.loads(client.blocking_key_value_get("jaxscale/agreement", TIMEOUT_MS))
    if difference is not None:
        name, value, other, expected = difference
        given = f"{value} in process {other}"
        raise InputError(name, given, f"{expected}, as in process 0: all processes share it")


def first_difference(given: list[dict[str, str]]) -> tuple[str, str, int, str] | None:
    """(name, value, process, value of process 0) of the first fact that is not the same.

    Args:
        given: the facts of each process.
    """
    wanted = given[0]
    for process, facts in enumerate(given):
        for name in sorted(wanted.keys() | facts.keys()):
            value, expected = (each.get(name, "(absent)") for each in (facts, wanted))
            if value != expected:
                return name, value, process, expected
    return None
