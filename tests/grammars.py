"""JSON schemas made at random, small enough that a random text satisfies them soon."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

Schema = dict[str, Any]

_strings: st.SearchStrategy[Schema] = st.one_of(
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 12)),
    st.builds(
        lambda n, m: {"type": "string", "minLength": n, "maxLength": n + m}, st.integers(0, 5), st.integers(0, 5)
    ),
    st.sampled_from(
        [
            {"type": "string", "pattern": "^[a-z]{1,4}-[0-9]{2}$"},
            {"type": "string", "format": "date"},
            {"type": "string", "format": "uuid"},
            {"type": "string", "format": "ipv4"},
        ]
    ),
)
_numbers: st.SearchStrategy[Schema] = st.one_of(
    st.builds(
        lambda low, span: {"type": "integer", "minimum": low, "maximum": low + span},
        st.integers(-1000, 1000),
        st.integers(0, 500),
    ),
    st.builds(lambda n: {"type": "integer", "multipleOf": n, "minimum": 0, "maximum": 500}, st.integers(1, 20)),
    st.builds(lambda top: {"type": "number", "minimum": 0, "exclusiveMaximum": top}, st.integers(1, 100)),
)
_fixed: st.SearchStrategy[Schema] = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]}]),
    st.builds(
        lambda values: {"enum": values},
        st.lists(st.one_of(st.text(max_size=6), st.integers(-99, 99), st.none()), min_size=1, max_size=5),
    ),
    st.builds(lambda value: {"const": value}, st.one_of(st.text(max_size=8), st.lists(st.booleans(), max_size=3))),
)


def _arrays(items: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    return st.builds(
        lambda item, low, span: {"type": "array", "items": item, "minItems": low, "maxItems": low + span},
        items,
        st.integers(0, 2),
        st.integers(0, 2),
    )


@st.composite
def _objects(draw: st.DrawFn, values: st.SearchStrategy[Schema]) -> Schema:
    properties = draw(st.dictionaries(st.text(min_size=1, max_size=5), values, max_size=4))
    required = [name for name in properties if draw(st.booleans())]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _nested(values: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    unions = st.builds(lambda branches: {"anyOf": branches}, st.lists(values, min_size=1, max_size=3))
    return st.one_of(_arrays(values), _objects(values), unions)


small_schemas: st.SearchStrategy[Schema] = st.recursive(st.one_of(_strings, _numbers, _fixed), _nested, max_leaves=5)
