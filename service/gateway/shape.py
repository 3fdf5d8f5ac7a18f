"""What of a completion its answer tells, and how it is written."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AnswerShape:
    """`num_logprobs` and `num_prompt_logprobs` are how many likeliest tokens come beside each; None tells of none.

    `echo` puts the prompt before the text, and its tokens before those of the log probabilities. `has_token_ids` asks
    for the ids of prompt and completion, `tokens_as_ids` for `token_id:5` in place of a token's text. Markers are text
    unless `skip_special`; what ended a choice is part of it only with `include_stop`.
    """

    echo: bool = False
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    has_token_ids: bool = False
    tokens_as_ids: bool = False
    skip_special: bool = True
    include_stop: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether each piece of a choice has nothing but its text."""
        return self.num_logprobs is None and not self.has_token_ids


PLAIN = AnswerShape()
