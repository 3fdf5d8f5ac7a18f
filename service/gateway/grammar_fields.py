"""From the fields with which other servers' users ask for structured output to one grammar."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import orjson

from service.engine.grammar import Grammar, GrammarKind
from service.gateway.errors import MAX_NAME_CHARS, BadRequestError, shorten
from service.gateway.schema import CompletionRequest, ResponseFormat, StructuredOutputs
from service.gateway.settings import GatewaySettings
from service.repeated_keys import repeated_key


class AskedGrammar(NamedTuple):
    """A grammar, and the parameter that asked for it."""

    param: str
    grammar: Grammar


def asked_grammar(params: CompletionRequest, settings: GatewaySettings) -> AskedGrammar | None:
    """What the text is to be, where that was asked. Raises BadRequestError for more than one wish, or too large a one.

    Whether a grammar means anything is not looked into.
    """
    asked = {
        **_in_response_format(params.response_format),
        **_in_structured_outputs(params.structured_outputs),
        "guided_json": params.guided_json,
        "guided_regex": params.guided_regex,
        "guided_choice": params.guided_choice,
        "guided_grammar": params.guided_grammar,
        "grammar": params.grammar or None,
        "json_schema": params.json_schema,
    }
    given = [param for param, value in asked.items() if value is not None]
    if not given:
        return None
    if len(given) > 1:
        raise BadRequestError(f"'{given[1]}' cannot be used together with '{given[0]}'", param=given[1])
    [param] = given
    return AskedGrammar(param, _READERS[param.split(".")[-1]](asked[param], param, settings))


def _in_response_format(wanted: ResponseFormat | None) -> Mapping[str, object]:
    if wanted is None:
        return {}
    if wanted.json_schema is not None and wanted.type != "json_schema":
        param = "response_format.json_schema"
        raise BadRequestError(f"'{param}' needs 'response_format.type' to be 'json_schema'", param=param)
    if wanted.type == "text":
        return {}
    if wanted.type == "json_object":
        return {"response_format.json_object": True}
    if wanted.json_schema is None:
        param = "response_format.json_schema"
        raise BadRequestError(f"'{param}' is required with this type", param=param, code="missing_parameter")
    return {"response_format.json_schema.schema": wanted.json_schema.schema_}


def _in_structured_outputs(wanted: StructuredOutputs | None) -> Mapping[str, object]:
    if wanted is None:
        return {}
    asked = {
        "json": wanted.json_,
        "regex": wanted.regex,
        "choice": wanted.choice,
        "grammar": wanted.grammar,
        "json_object": wanted.json_object or None,
    }
    if all(value is None for value in asked.values()):
        message = "'structured_outputs' must have one of 'json', 'regex', 'choice', 'grammar' and 'json_object'"
        raise BadRequestError(message, param="structured_outputs")
    return {f"structured_outputs.{name}": value for name, value in asked.items()}


def _schema(value: Any, param: str, settings: GatewaySettings) -> Grammar:
    text = value.encode(errors="replace") if isinstance(value, str) else None
    if text is not None:
        _bound(len(text), settings.max_grammar_bytes, param, "bytes")
        try:
            value = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise BadRequestError(f"'{param}' is not valid JSON: {error.msg}", param=param) from None
    if not isinstance(value, dict):
        raise BadRequestError(f"'{param}' must be a JSON schema, an object", param=param)
    _check_depth(value, param, settings.max_schema_depth)
    if text is not None and (key := repeated_key(text, value)) is not None:
        message = f"'{param}' has '{shorten(key, MAX_NAME_CHARS)}' more than once"
        raise BadRequestError(message, param=param)
    source = orjson.dumps(value)
    _bound(len(source), settings.max_grammar_bytes, param, "bytes")
    return Grammar(GrammarKind.JSON_SCHEMA, source.decode())


def _json_object(*_: object) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, '{"type":"object"}')


def _regex(value: Any, param: str, settings: GatewaySettings) -> Grammar:
    _bound(len(value), settings.max_regex_chars, param, "characters")
    return Grammar(GrammarKind.REGEX, value)


def _choice(value: Any, param: str, settings: GatewaySettings) -> Grammar:
    if not value or not all(value):
        raise BadRequestError(f"'{param}' must not be empty, nor may any of its texts", param=param)
    _bound(len(value), settings.max_choice_texts, param, "texts")
    source = orjson.dumps(value)
    _bound(len(source), settings.max_grammar_bytes, param, "bytes")
    return Grammar(GrammarKind.CHOICE, source.decode())


def _context_free(value: Any, param: str, settings: GatewaySettings) -> Grammar:
    _bound(len(value.encode(errors="replace")), settings.max_grammar_bytes, param, "bytes")
    return Grammar(GrammarKind.CONTEXT_FREE, value)


_READERS: Mapping[str, Callable[[Any, str, GatewaySettings], Grammar]] = {
    "schema": _schema,
    "json": _schema,
    "guided_json": _schema,
    "json_schema": _schema,
    "json_object": _json_object,
    "regex": _regex,
    "guided_regex": _regex,
    "choice": _choice,
    "guided_choice": _choice,
    "grammar": _context_free,
    "guided_grammar": _context_free,
}


def _bound(size: int, limit: int, param: str, unit: str) -> None:
    if size > limit:
        raise BadRequestError(f"'{param}' must have at most {limit} {unit}, got {size}", param=param)


def _check_depth(value: object, param: str, limit: int) -> None:
    """Without recursion, which is what depth would exhaust."""
    level: list[object] = [value]
    for _ in range(limit):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return
    raise BadRequestError(f"'{param}' must not be nested more than {limit} deep", param=param)


def _children(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
