"""Log probabilities of an answer: the right tokens, the right places, the right numbers, streamed or not."""

from __future__ import annotations

import codecs
from bisect import bisect_right

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.tokenizer import Tokenizer
from service.engine.request import FinishReason, Request, RequestOutput, SamplingParams, TokenLogprob
from service.gateway.choice import Choice
from service.gateway.logprobs import ScoredToken, TokenNames, legacy_logprobs, prompt_logprobs
from service.gateway.shape import AnswerShape
from service.gateway.stops import StopSet
from tests.gateway.server import MODEL_DIR

TOKENIZER = Tokenizer.load(MODEL_DIR)
assert TOKENIZER is not None
FOX = TOKENIZER.encode("🦊")
ALPHABET = "ab é€🦊\n"


def score(token_id: int) -> TokenLogprob:
    return TokenLogprob(token_id, -float(token_id), 1, ((token_id, -float(token_id)), (1, -0.5)))


def starts_of_characters(raw: bytes) -> list[int]:
    """The byte at which each character of the decoded text begins; what is no character is one U+FFFD."""
    broken: list[tuple[int, int]] = []

    def mark(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeDecodeError)
        broken.append((error.start, error.end))
        return "�", error.end

    codecs.register_error("mark", mark)
    raw.decode("utf-8", errors="mark")
    starts, at = [], 0
    for start, end in [*broken, (len(raw), len(raw))]:
        for character in raw[at:start].decode():
            starts.append(at)
            at += len(character.encode())
        if start < end:
            starts.append(start)
        at = end
    return starts


def play(choice: Choice, ids: list[int], cuts: set[int]) -> tuple[str, list[ScoredToken]]:
    """All text and scored tokens of a choice to which `ids` come, cut into outputs after `cuts` tokens."""
    text, scored, last = "", [], 0
    bounds = [*sorted(cut for cut in cuts if cut < len(ids)), len(ids)]
    for bound in bounds:
        piece = tuple(ids[last:bound])
        end = FinishReason.LENGTH if bound == len(ids) else None
        choice.feed(RequestOutput("r", piece, end, logprobs=tuple(map(score, piece))))
        last = bound
        delta = choice.take()
        if delta is not None:
            text += delta.text
            assert delta.scored is not None
            scored += delta.scored
            assert all(token.offset <= len(text) for token in delta.scored)
        if choice.is_finished:
            break
    return text, scored


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet=ALPHABET, min_size=1, max_size=20),
    mess=st.lists(st.sampled_from([*FOX, *TOKENIZER.encode("€"), *TOKENIZER.encode("a")]), max_size=8),
    stop=st.none() | st.text(alphabet=ALPHABET, min_size=1, max_size=3),
    cuts=st.sets(st.integers(1, 30)),
    echoed=st.text(alphabet=ALPHABET, max_size=6),
    include=st.booleans(),
)
def test_tokens_are_exact_and_lie_where_their_first_byte_is(
    text: str, mess: list[int], stop: str | None, cuts: set[int], echoed: str, include: bool
) -> None:
    assert TOKENIZER is not None
    prompt = TOKENIZER.encode(echoed)
    ids = [*TOKENIZER.encode(text), *mess]
    shape = AnswerShape(num_logprobs=1, echo=bool(prompt), include_stop=include)
    request = Request("r", tuple(prompt) or (5,), SamplingParams(max_tokens=100))
    choice = Choice(0, request, TOKENIZER, StopSet([stop]) if stop else None, shape)
    seen, scored = play(choice, ids, cuts)
    generated = scored[len(prompt) :]
    assert [token.token_id for token in scored] == [*prompt, *ids[: choice.num_tokens]]
    assert len(generated) == choice.num_tokens
    assert all(token.score is None for token in scored[: len(prompt)]), "nothing was said of this prompt"
    starts = starts_of_characters(TOKENIZER.bytes_of([*prompt, *ids]))
    at = 0
    for token in scored:
        expected = min(bisect_right(starts, at) - 1, len(seen))
        assert token.offset == expected
        at += len(TOKENIZER.token_bytes(token.token_id))
    one_piece = Choice(0, request, TOKENIZER, StopSet([stop]) if stop else None, shape)
    assert play(one_piece, ids, set()) == (seen, scored), "the same however it is cut"


def test_a_stop_token_lies_at_the_end() -> None:
    for stops in (None, StopSet(["zzz"])):
        choice = Choice(
            0, Request("r", (1,), SamplingParams(max_tokens=9)), TOKENIZER, stops, AnswerShape(num_logprobs=0)
        )
        ids = (*FOX[:-1], 0)
        choice.feed(RequestOutput("r", ids, FinishReason.STOP, 0, logprobs=tuple(map(score, ids))))
        delta = choice.take()
        assert delta is not None
        assert delta.text == "�"
        assert delta.scored is not None
        assert [token.offset for token in delta.scored] == [0] * (len(FOX) - 1) + [1]


def test_tokens_that_are_no_text_are_written_as_bytes_or_ids() -> None:
    names = TokenNames(TOKENIZER)
    spelled = [names[token_id] for token_id in FOX]
    assert all(name.startswith("bytes:\\x") for name in spelled)
    raw = b"".join(bytes.fromhex(name.removeprefix("bytes:").replace("\\x", "")) for name in spelled)
    assert raw.decode() == "🦊"
    assert (names[0], names[9999]) == ("<|endoftext|>", "token_id:9999")
    assert TokenNames(TOKENIZER, as_ids=True)[5] == TokenNames(None)[5] == "token_id:5"


def test_the_legacy_arrays() -> None:
    told = TokenLogprob(5, -3.0, 9, ((6, -0.1), (7, float("-inf"))))
    body = legacy_logprobs([ScoredToken(4, None, 0), ScoredToken(5, told, 1)], TokenNames(None))
    assert body == {
        "tokens": ["token_id:4", "token_id:5"],
        "token_logprobs": [None, -3.0],
        "top_logprobs": [None, {"token_id:6": -0.1, "token_id:7": -9999.0, "token_id:5": -3.0}],
        "text_offset": [0, 1],
    }


def test_the_tables_of_a_prompt() -> None:
    told = TokenLogprob(5, -3.0, 9, ((6, -0.1), (7, -0.2)))
    assert prompt_logprobs([told], 1, TokenNames(None)) == [
        None,
        {
            "5": {"logprob": -3.0, "rank": 9, "decoded_token": "token_id:5"},
            "6": {"logprob": -0.1, "rank": 1, "decoded_token": "token_id:6"},
        },
    ]


BODY = {"prompt": "Once upon a time, the 🦊", "max_tokens": 20, "logprobs": 3, "seed": 3, "echo": True}


def test_a_completion_scores_as_a_prompt_as_it_did_when_it_was_written(real: httpx.Client) -> None:
    written = real.post("/v1/completions", json={**BODY, "return_token_ids": True, "ignore_eos": True}).json()
    [choice] = written["choices"]
    ids = [*choice["prompt_token_ids"], *choice["token_ids"]]
    scored = real.post("/v1/completions", json={**BODY, "prompt": ids, "max_tokens": 0}).json()
    assert scored["usage"]["completion_tokens"] == 0
    assert scored["usage"]["prompt_tokens"] == len(ids)
    assert scored["choices"][0]["logprobs"] == choice["logprobs"], "to the last bit"
    assert scored["choices"][0]["text"] == choice["text"]
    assert (scored["choices"][0]["finish_reason"], scored["choices"][0]["stop_reason"]) == ("length", None)
    first, *others = choice["logprobs"]["token_logprobs"]
    assert first is None
    assert all(other <= 0 for other in others)


def test_scoring_without_log_probabilities_gives_the_prompt_back(real: httpx.Client) -> None:
    body = {"prompt": ["a fox", "b"], "n": 2, "echo": True, "max_tokens": 0}
    answer = real.post("/v1/completions", json=body).json()
    assert [choice["text"] for choice in answer["choices"]] == ["a fox"] * 2 + ["b"] * 2
    assert answer["usage"]["completion_tokens"] == 0


def test_a_whole_prompt_of_the_models_length_can_be_scored(real: httpx.Client) -> None:
    body = {"prompt": [5] * 512, "echo": True, "max_tokens": 0, "logprobs": 0}
    [choice] = real.post("/v1/completions", json=body).json()["choices"]
    assert len(choice["logprobs"]["tokens"]) == 512


def test_a_prompt_read_without_generating_is_known_the_next_time(real: httpx.Client) -> None:
    body = {"prompt": [7, 8] * 60, "echo": True, "max_tokens": 0}
    first, second = (real.post("/v1/completions", json=body).json()["usage"] for _ in range(2))
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["prompt_tokens_details"]["cached_tokens"] > 90


@pytest.mark.parametrize("temperature", [0, 1])
def test_the_likeliest_token_is_the_greedy_one(real: httpx.Client, temperature: float) -> None:
    body = {**BODY, "temperature": temperature, "echo": False}
    [choice] = real.post("/v1/completions", json=body).json()["choices"]
    told = choice["logprobs"]
    is_greedy = [
        max(top, key=top.get) == token for token, top in zip(told["tokens"], told["top_logprobs"], strict=True)
    ]
    assert all(is_greedy) == (temperature == 0)
    for token, logprob, top in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        assert top[token] == logprob
        assert len(top) in (3, 4)
        assert list(top.values())[:3] == sorted(top.values(), reverse=True)[:3]


def test_prompt_log_probabilities_beside_echo_have_their_own_number(real: httpx.Client) -> None:
    body = {**BODY, "logprobs": 0, "prompt_logprobs": 2}
    [choice] = real.post("/v1/completions", json=body).json()["choices"]
    tables = choice["prompt_logprobs"][1:]
    assert {len(table) for table in tables} <= {2, 3}
    assert all(len(top) == 1 for top in choice["logprobs"]["top_logprobs"][1:])
    for table, logprob in zip(tables, choice["logprobs"]["token_logprobs"][1:], strict=False):
        assert next(iter(table.values()))["logprob"] == logprob
    alone = real.post("/v1/completions", json={**body, "echo": False, "logprobs": None}).json()["choices"][0]
    assert alone["prompt_logprobs"] == choice["prompt_logprobs"]
    assert alone["logprobs"] is None


def test_a_deadline_before_the_prompt_was_read_leaves_its_tokens_without_numbers(real: httpx.Client) -> None:
    [choice] = real.post("/v1/completions", json={**BODY, "timeout": 1e-6, "prompt_logprobs": 1}).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == (BODY["prompt"], "deadline")
    assert set(choice["logprobs"]["token_logprobs"]) == {None}
    assert choice["prompt_logprobs"] is None
