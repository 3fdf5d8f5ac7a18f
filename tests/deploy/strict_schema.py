"""Holds documents to a schema more strictly than its owners do: a key that is not named there is an error."""

from __future__ import annotations

from typing import Any

from jsonschema import Draft202012Validator

Schema = dict[str, Any]


def strict(schema: Schema) -> Schema:
    """`schema`, of JSON Schema or of a Kubernetes CustomResourceDefinition, without room for keys it does not name."""
    result: Schema = {key: _strict_value(key, value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        result |= {"type": ["integer", "string"]}
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if "properties" in schema and not is_open:
        result["additionalProperties"] = False
    return result


def _strict_value(key: str, value: Any) -> Any:
    if key in ("properties", "$defs"):
        return {name: strict(part) for name, part in value.items()}
    if key in ("items", "additionalProperties") and isinstance(value, dict):
        return strict(value)
    if key in ("anyOf", "oneOf", "allOf"):
        return [strict(part) for part in value]
    return value


def faults(document: object, schema: Schema) -> list[str]:
    """What is wrong with `document`, each with its path."""
    found = Draft202012Validator(strict(schema)).iter_errors(document)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in found]
