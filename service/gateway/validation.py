"""From a JSON body to a request model; from what is wrong with it to one sentence that names the parameter."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from service.gateway.errors import BadRequestError, shorten
from service.gateway.schema import INT64_MAX, CompletionRequest, DetokenizeRequest, TokenizeRequest
from service.gateway.unsupported import (
    NEUTRAL_COMPLETION_VALUES,
    NEUTRAL_STRUCTURED_VALUES,
    NEUTRAL_TOKENIZE_VALUES,
    drop_neutral,
)

_Model = TypeVar("_Model", bound=BaseModel)

# What pydantic calls an error, and how a client is told. `{...}` are the error's own bounds.
_SENTENCES = {
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "list_type": "must be an array",
    "dict_type": "must be an object",
    "literal_error": "must be {expected}",
    "model_type": "must be an object",
    "finite_number": "must be a finite number",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
    # The one pattern there is: REQUEST_ID.
    "string_pattern_mismatch": "must be 1 to 128 letters, digits, '.', '_' or '-'",
}
# llama.cpp's names that no likeness of letters leads to.
_OTHER_NAMES = {"n_predict": "max_tokens", "repeat_penalty": "repetition_penalty", "n_probs": "logprobs"}
_MAX_NAME_CHARS = 64
_MAX_VALUE_CHARS = 40


def parse_completion(body: dict[str, object]) -> CompletionRequest:
    """Raises BadRequestError for what is wrong, unknown or not supported."""
    n, best_of = body.get("n"), body.get("best_of")
    if type(n) is int and type(best_of) is int:
        if best_of < n:
            raise BadRequestError(f"'best_of' must be at least 'n' ({n}), got {best_of}", param="best_of")
        if best_of == n:
            body = {**body, "best_of": None}  # The best n of n are all of them.
    body = drop_neutral(body, NEUTRAL_COMPLETION_VALUES)
    if isinstance(wanted := body.get("structured_outputs"), dict):
        body["structured_outputs"] = drop_neutral(wanted, NEUTRAL_STRUCTURED_VALUES, "structured_outputs.")
    request = _parse(CompletionRequest, body)
    if request.stream_options is not None and not request.stream:
        raise BadRequestError("'stream_options' needs 'stream' to be true", param="stream_options")
    return request


def parse_tokenize(body: dict[str, object]) -> TokenizeRequest:
    """Raises BadRequestError for what is wrong, unknown or not supported."""
    return _parse(TokenizeRequest, drop_neutral(body, NEUTRAL_TOKENIZE_VALUES))


def parse_detokenize(body: dict[str, object]) -> DetokenizeRequest:
    """Raises BadRequestError for what is wrong or unknown."""
    return _parse(DetokenizeRequest, body)


def _parse(model: type[_Model], body: Mapping[str, object]) -> _Model:
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise _describe(error.errors(include_url=False)[0], model) from None


def _describe(error: ErrorDetails, model: type[BaseModel]) -> BadRequestError:
    param = _param(error["loc"])
    if error["type"] == "missing":
        return BadRequestError(f"'{param}' is required", param=param, code="missing_parameter")
    if error["type"] == "extra_forbidden":
        return BadRequestError(_unknown(param, model), param=param, code="unknown_parameter")
    value = error["input"]
    sentence = _SENTENCES.get(error["type"], "is not valid").format(**_plain(error.get("ctx", {})))
    if error["type"] == "int_type" and isinstance(value, float) and abs(value) > INT64_MAX:
        sentence = "is out of range"  # The JSON reader hands integers beyond 64 bits over as floats.
    got = f", got {shorten(repr(value), _MAX_VALUE_CHARS)}" if isinstance(value, int | float) else ""
    return BadRequestError(f"'{param}' {sentence}{got}", param=param, code="invalid_value")


def _plain(bounds: Mapping[str, object]) -> dict[str, object]:
    """A bound of 100.0 reads as 100."""
    return {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in bounds.items()}


def _param(location: tuple[int | str, ...]) -> str:
    """("stop", 3) is "stop[3]", ("stream_options", "x") is "stream_options.x"."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return shorten(path, _MAX_NAME_CHARS)


def _unknown(param: str, model: type[BaseModel]) -> str:
    close = difflib.get_close_matches(param, model.model_fields, n=1, cutoff=0.75)
    meant = _OTHER_NAMES.get(param) or (close[0] if close else None)
    hint = f"; did you mean '{meant}'?" if meant in model.model_fields else ""
    return f"'{param}' is not a parameter of this endpoint{hint}"
