"""Numbers in a query string, checked like everything else a client sends."""

from __future__ import annotations

from starlette.requests import Request

from service.gateway.errors import BadRequestError


def number_in_query(request: Request, name: str, default: float, *, low: float, high: float) -> float:
    """The parameter `name`. Raises BadRequestError unless it is a number in `low`..`high`; unknown ones are refused."""
    if unknown := sorted(request.query_params.keys() - {name}):
        raise BadRequestError(f"'{unknown[0]}' is not a parameter of this endpoint", param=unknown[0])
    given = request.query_params.get(name)
    if given is None:
        return default
    try:
        value = float(given)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise BadRequestError(f"'{name}' must be a number from {low:g} to {high:g}", param=name)
    return value
