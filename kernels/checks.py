"""Refuses arguments that do not fit, before anything is compiled."""


def require(
    holds: bool,
    operation: str,
    given: object,
    expected: object,
) -> None:
    """Raises ValueError, in one line, unless `holds`."""
    if not holds:
        raise ValueError(f"{operation}: given {given}, expected {expected}")


def check_backend(
    operation: str,
    implementation: str,
    backends: tuple[str, ...],
    refusal: str | None,
) -> None:
    """Raises ValueError unless the backend is known and can do what is asked.

    Args:
        operation: its name, for the message.
        implementation: the backend that was asked for.
        backends: those that exist.
        refusal: what the backend would need to compute the request; None when it can.
    """
    given = f"implementation {implementation!r}"
    require(implementation in backends, operation, given, f"one of {backends}")
    require(refusal is None, operation, repr(implementation), refusal)


def check_invariant(operation: str, implementation: str, is_invariant: bool) -> None:
    """Raises ValueError if invariant bits are asked of a backend that does not have them."""
    given = f"is_invariant with {implementation!r}"
    require(not is_invariant or implementation == "mosaic", operation, given, "'mosaic'")
