"""What clients get, as pydantic models."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class PromptTokensDetails(BaseModel):
    """`cached_tokens` of the prompt tokens had been read before, for another request."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens read and written. `completion_tokens` counts the token that ended a choice."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Logprobs(BaseModel):
    """One entry for each token. The first token of an echoed prompt has no log probability."""

    tokens: list[str] = Field(description="Their text; `bytes:\\xe2\\x80` for part of a character.")
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(description="Where in `text`, in characters, the token's first byte lies.")


class PromptLogprob(BaseModel):
    """What the model thought of one token at one place of the prompt."""

    logprob: float
    rank: int
    decoded_token: str


class CompletionChoice(BaseModel):
    """One continuation. Choice `p * n + c` is choice c of prompt p."""

    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length", "deadline"] | None
    stop_reason: int | str | None = Field(description="The stop string or stop token id that ended the choice.")
    token_ids: list[int] | None = Field(None, description="Where asked for, or the model has no tokenizer.")
    prompt_token_ids: list[int] | None = Field(None, description="Streamed, in the first event of the choice.")
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class Completion(BaseModel):
    """The answer; streamed, each event is one of these with the text that is new."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str
    seed: int = Field(description="Send it again for the same text.")


class ModelCard(BaseModel):
    """A served name."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tessera"
    max_model_len: int


class ModelList(BaseModel):
    """All served names."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeResponse(BaseModel):
    """The tokens of a text."""

    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizeResponse(BaseModel):
    """The text of tokens, special ones spelled out."""

    prompt: str


class HealthResponse(BaseModel):
    """Whether a request sent now would make progress."""

    status: Literal["ok"]
    seconds_since_progress: float


class ProbeResponse(BaseModel):
    """The answer of a probe that passed. `asleep` is a server whose next request starts an engine, and waits for it."""

    status: Literal["ok", "asleep"]


class VersionResponse(BaseModel):
    """The version of this server."""

    version: str


class ErrorDetail(BaseModel):
    """What went wrong, and which parameter is the reason."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(BaseModel):
    """Every answer that is not a success."""

    error: ErrorDetail
