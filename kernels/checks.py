"""Arguments that do not fit, refused before anything is compiled."""


def require(holds: bool, operation: str, given: object, expected: object) -> None:
    """Raises ValueError, in one line, unless `holds`."""
    if not holds:
        raise ValueError(f"{operation}: given {given}, expected {expected}")


def check_backend(
    operation: str, implementation: str, backends: tuple[str, ...], refusal: str | None
) -> None:
    """Raises ValueError for an unknown backend, and for "mosaic" where `refusal` says what it cannot do."""
    require(
        implementation in backends,
        operation,
        f"implementation {implementation!r}",
        f"one of {backends}",
    )
    require(implementation != "mosaic" or refusal is None, operation, "'mosaic'", refusal)
