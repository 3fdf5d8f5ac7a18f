"""What clients send, as pydantic models. Knows the shape of each field, not the limits of this server."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

INT32_MAX = 2**31 - 1
REQUEST_ID = r"^[A-Za-z0-9._-]{1,128}$"
INT64_MAX = 2**63 - 1

_TOKEN_IDS: JsonSchemaValue = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXTS: JsonSchemaValue = {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1}
_PROMPT: JsonSchemaValue = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        _TEXTS,
        _TOKEN_IDS,
        {"type": "array", "items": _TOKEN_IDS, "minItems": 1},
    ]
}
_SCHEMA: JsonSchemaValue = {"anyOf": [{"type": "object"}, {"type": "string"}]}
_STOP: JsonSchemaValue = {
    "anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "items": {"type": "string", "minLength": 1}}]
}


class StrictModel(BaseModel):
    """No coercion, no unknown field, no NaN; an optional field given as null means its default."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _null_is_default(cls, value: object, info: ValidationInfo) -> object:
        field = cls.model_fields[info.field_name or ""]
        return field.get_default(call_default_factory=True) if value is None and not field.is_required() else value

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        described = handler.resolve_ref_schema(handler(schema))
        for name, field in cls.model_fields.items():
            if not field.is_required():
                _allow_null(described["properties"][field.alias or name])
        return described


def _allow_null(described: JsonSchemaValue) -> None:
    if "$ref" in described:
        described["anyOf"] = [{"$ref": described.pop("$ref")}, {"type": "null"}]
    elif "anyOf" in described:
        if {"type": "null"} not in described["anyOf"]:
            described["anyOf"] = [*described["anyOf"], {"type": "null"}]
    else:
        described["type"] = [described["type"], "null"]
        if "enum" in described:
            described["enum"] = [*described["enum"], None]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class JsonSchemaFormat(StrictModel):
    """A JSON schema as OpenAI's clients wrap it. Its name and description are for people."""

    name: str | None = Field(None, description="No effect.")
    description: str | None = Field(None, description="No effect.")
    schema_: dict[str, Any] = Field(alias="schema", description="The JSON schema.")
    strict: bool = Field(True, description="No effect: the schema is always followed.")


class ResponseFormat(StrictModel):
    """What the text is to be."""

    type: Literal["text", "json_object", "json_schema"] = Field(description="`text` asks for nothing.")
    json_schema: JsonSchemaFormat | None = Field(None, description="With the type of the same name.")


class StructuredOutputs(StrictModel):
    """What the text is to be: exactly one of `json`, `regex`, `choice`, `grammar` and `json_object`."""

    json_: Annotated[Any, WithJsonSchema(_SCHEMA)] = Field(
        None, alias="json", description="A JSON schema, or the text of one."
    )
    regex: str | None = Field(None, description="A regular expression for the whole text.")
    choice: list[str] | None = Field(None, description="The text is one of these.")
    grammar: str | None = Field(None, description="A context-free grammar, in Lark's notation or in GBNF.")
    json_object: bool = Field(False, description="The text is some JSON object.")
    disable_any_whitespace: bool = Field(False, description="No effect: there is none between the tokens of JSON.")


class StreamOptions(StrictModel):
    """What a stream carries besides text."""

    include_usage: bool = Field(False, description="Send one more chunk before the end, with the usage.")
    continuous_usage_stats: bool = Field(False, description="Tell the usage so far in every chunk.")


class CompletionRequest(StrictModel):
    """A prompt to continue."""

    model: str | None = Field(None, description="One of the served names. Default: the first.")
    prompt: Annotated[Any, WithJsonSchema(_PROMPT)] = Field(
        description="Text, token ids, or several of either. Each is continued on its own."
    )
    max_tokens: int | None = Field(
        None,
        ge=0,
        le=INT32_MAX,
        description="Most tokens of each choice. Default: 16, or fewer if no more fit. 0 with `echo` alone.",
    )
    echo: bool = Field(False, description="Put the prompt before the text, and its tokens into `logprobs`.")
    logprobs: int | None = Field(
        None,
        ge=0,
        le=INT32_MAX,
        description="Tell each token's log probability and those of so many likeliest ones.",
    )
    logprob_token_ids: list[int] = Field(
        default_factory=list, description="Tell the log probabilities of these tokens instead of the likeliest."
    )
    prompt_logprobs: int | None = Field(
        None, ge=0, le=INT32_MAX, description="The same for the tokens of the prompt, by token id; not streamed."
    )
    min_tokens: int = Field(0, ge=0, le=INT32_MAX, description="No choice stops by itself before so many tokens.")
    temperature: float = Field(1.0, ge=0, le=100, description="0 always takes the most likely token.")
    top_p: float = Field(1.0, gt=0, le=1, description="Draw from the likeliest tokens that reach this probability.")
    top_k: int = Field(0, ge=-1, le=INT32_MAX, description="Draw from so many likeliest tokens. 0 or -1: from all.")
    min_p: float = Field(
        0.0, ge=0, le=1, description="Drop tokens less likely than this times the likelihood of the likeliest."
    )
    typical_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Draw from the tokens of the most expected information that reach this probability.",
    )
    repetition_penalty: float = Field(
        1.0,
        ge=0.01,
        le=100,
        description="Divides the logits of tokens seen in prompt or completion; above 1 avoids them.",
    )
    presence_penalty: float = Field(
        0.0, ge=-2, le=2, description="Taken from the logits of tokens that are in the completion."
    )
    frequency_penalty: float = Field(
        0.0, ge=-2, le=2, description="Taken from the logits of tokens once for each time they are in the completion."
    )
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(
        default_factory=dict, description="Token id to what is added to its logit."
    )
    allowed_token_ids: list[int] | None = Field(None, min_length=1, description="Draw no other tokens.")
    bad_words: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, description="Words that no run of whole tokens may spell, with or without a space before."
    )
    seed: int | None = Field(
        None,
        ge=-INT64_MAX - 1,
        le=INT64_MAX,
        description="Same seed, same text. Default, and -1: a random one, which the answer names.",
    )
    n: int = Field(1, ge=1, le=INT32_MAX, description="Choices for each prompt.")
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_as_list), WithJsonSchema(_STOP)] = (
        Field(default_factory=list, description="Text that ends a choice; it is not part of the answer.")
    )
    stop_token_ids: list[int] = Field(default_factory=list, description="Tokens that end a choice.")
    include_stop_str_in_output: bool = Field(False, description="What ended a choice is part of its text.")
    ignore_eos: bool = Field(False, description="Continue past the end of text.")
    skip_special_tokens: bool = Field(True, description="Leave markers such as the end of text out of the text.")
    return_token_ids: bool = Field(False, description="Tell the token ids of prompt and completion.")
    return_tokens_as_token_ids: bool = Field(False, description="Write `token_id:5` for tokens in `logprobs`.")
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, le=INT32_MAX, description="Use so many tokens of each prompt. -1: as many as fit."
    )
    truncation_side: Literal["left", "right"] = Field("left", description="Where a prompt that is too long is cut.")
    add_special_tokens: bool = Field(True, description="No effect: the tokenizers served here add none.")
    stream: bool = Field(False, description="Send text as server-sent events while it is generated.")
    stream_options: StreamOptions | None = Field(None, description="Only with `stream`.")
    response_format: ResponseFormat | None = Field(None, description="Hold the text to JSON.")
    structured_outputs: StructuredOutputs | None = Field(None, description="Hold the text to a rule.")
    guided_json: Annotated[Any, WithJsonSchema(_SCHEMA)] = Field(None, description="As `structured_outputs.json`.")
    guided_regex: str | None = Field(None, description="As `structured_outputs.regex`.")
    guided_choice: list[str] | None = Field(None, description="As `structured_outputs.choice`.")
    guided_grammar: str | None = Field(None, description="As `structured_outputs.grammar`.")
    grammar: str | None = Field(None, description="As `structured_outputs.grammar`; empty asks for nothing.")
    json_schema: dict[str, Any] | None = Field(None, description="As `structured_outputs.json`.")
    user: str | None = Field(None, description="A tag for the access log; the session, where no header names one.")
    request_id: str | None = Field(
        None, pattern=REQUEST_ID, description="The `id` of the answer, in place of the X-Request-Id header's."
    )
    priority: int = Field(
        0, ge=-INT32_MAX - 1, le=INT32_MAX, description="Of requests that wait, those with a lower one go first."
    )
    cache_salt: str | None = Field(
        None, min_length=1, description="Share cached memory only with requests that have the same salt."
    )
    timeout: float | None = Field(
        None, gt=0, description="Seconds after its arrival at which the request ends with what there is."
    )


class TokenizeRequest(StrictModel):
    """Text to turn into token ids."""

    model: str | None = Field(None, description="One of the served names.")
    prompt: str = Field(description="The text. Spellings of special tokens are plain text.")


class DetokenizeRequest(StrictModel):
    """Token ids to turn into text."""

    model: str | None = Field(None, description="One of the served names.")
    tokens: Annotated[list[int], WithJsonSchema({"type": "array", "items": {"type": "integer", "minimum": 0}})] = Field(
        description="Token ids."
    )
