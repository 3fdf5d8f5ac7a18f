"""Fields that other servers know and this one does not: refused by name, unless their value asks for nothing."""

from __future__ import annotations

from collections.abc import Mapping

from service.gateway.errors import BadRequestError

# Each field with the values that change nothing; null is always one of them.
NEUTRAL_COMPLETION_VALUES: Mapping[str, tuple[object, ...]] = {
    "beam_width": (1,),
    "best_of": (1,),
    "early_stopping": (False,),
    "ec_transfer_params": (),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": (),
    "prompt_embeds": (),
    "repetition_detection": (),
    "return_token_offsets": (False,),
    "spaces_between_special_tokens": (True, False),  # There are none: tokens are bytes.
    "structural_tag": (),
    "suffix": (),
    "thinking_token_budget": (-1,),
    "use_beam_search": (False,),
    "vllm_xargs": (),
    "whitespace_pattern": (),
}
NEUTRAL_STRUCTURED_VALUES: Mapping[str, tuple[object, ...]] = {
    "disable_additional_properties": (False,),
    "disable_fallback": (True, False),  # There is one engine for grammars, and nothing to fall back to.
    "structural_tag": (),
    "whitespace_pattern": (),
}
NEUTRAL_TOKENIZE_VALUES: Mapping[str, tuple[object, ...]] = {
    "add_special_tokens": (True, False),
    "return_token_strs": (False,),
}


def drop_neutral(
    body: Mapping[str, object], table: Mapping[str, tuple[object, ...]], prefix: str = ""
) -> dict[str, object]:
    """`body` without the fields of `table`. Raises BadRequestError for one that asks for something.

    `prefix` is what comes before the names of fields that are inside another.
    """
    for name in body.keys() & table.keys():
        if not _is_neutral(body[name], table[name]):
            message = f"'{prefix}{name}' is not supported by this server"
            raise BadRequestError(message, param=prefix + name, code="unsupported_parameter")
    return {name: value for name, value in body.items() if name not in table}


def _is_neutral(value: object, neutral: tuple[object, ...]) -> bool:
    # To Python True is 1 and False is 0; to a client they are not.
    return value is None or any(
        value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral
    )
