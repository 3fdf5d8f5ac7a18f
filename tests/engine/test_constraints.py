"""Grammars in the engine: whatever the schedule, what is drawn is what one pass with a fresh matcher draws."""

from __future__ import annotations

import json
import math
import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.kernels.kernel import TorchKernel
from model.mosaic_v1 import MemoryMosaic
from service.engine.block_manager import BlockManager
from service.engine.constraints import Constraints
from service.engine.engine import Engine
from service.engine.grammar import Grammar, GrammarKind
from service.engine.grammar_compiler import GrammarCompiler, GrammarError, Matcher
from service.engine.request import FinishReason, Request, RequestOutput, SamplingParams
from service.engine.sampler import SamplingRow, sample
from tests.engine.served import engine_over
from tests.engine.test_with_checkpoint import CONFIG

# Ids 0 (the end) to 36; those above are padding. The last one is a marker, which is no text.
WORDS = ("ab", "bc", "abc", "12", '{"', '":', "}}", " a")
TOKENS = [b"", *(c.encode() for c in 'abcdefxyz0123456789,:{}[]" '), *(word.encode() for word in WORDS), b""]
MARKER = 36
GRAMMARS = [
    Grammar(GrammarKind.REGEX, "[a-c]{3,30}"),
    Grammar(GrammarKind.REGEX, "(ab|bc12)*"),
    Grammar(GrammarKind.CHOICE, '["abc", "ab", "xyz 123"]'),
    Grammar(GrammarKind.JSON_SCHEMA, '{"type": "array", "items": {"type": "integer"}, "maxItems": 5}'),
    Grammar(GrammarKind.CONTEXT_FREE, 'start: "[" start? "]" | "a"'),
]


def test_the_vocabulary_of_this_test_fits_the_model() -> None:
    assert len(TOKENS) == CONFIG.num_sampled_tokens == MARKER + 1


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(lambda: TOKENS)


@pytest.fixture(scope="module")
def model() -> MemoryMosaic:
    torch.manual_seed(5)
    return MemoryMosaic(CONFIG).cast_weights(torch.float64).eval().requires_grad_(False)


def text_of(token_ids: list[int]) -> str:
    return b"".join(TOKENS[token_id] for token_id in token_ids).decode()


def may_follow(matcher: Matcher, token_id: int) -> bool:
    """Whether the matcher would take this token, tried on a copy."""
    if not TOKENS[token_id]:
        return False
    try:
        matcher.copy().advance(token_id)
    except GrammarError:
        return False
    return True


def one_pass(model: MemoryMosaic, compiler: GrammarCompiler, request: Request) -> tuple[list[int], FinishReason]:
    """Every token from a fresh pass over all before it, among those that a fresh matcher takes."""
    sampling, prompt, written = request.sampling, list(request.prompt_token_ids), list(request.output_token_ids)
    grammar = sampling.grammar
    assert grammar is not None
    while len(written) < sampling.max_tokens:
        matcher = compiler.matcher(grammar)
        for token_id in written:
            matcher.advance(token_id)
        allowed = {i for i in range(len(TOKENS)) if may_follow(matcher, i)}
        ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos and allowed else {0})
        if matcher.can_end:
            allowed |= ends
        logits = model(torch.tensor([[*prompt, *written]]))[0, -1:, : CONFIG.num_sampled_tokens]
        logits[0, [i for i in range(len(TOKENS)) if i not in allowed]] = -torch.inf
        banned = () if len(written) + 1 >= sampling.min_tokens else (0, *sampling.stop_token_ids)
        row = SamplingRow(sampling, len(written), banned, prompt, written)
        [token_id] = sample(logits, [row])
        is_text = may_follow(matcher, token_id)
        written.append(token_id)
        if not is_text or (token_id in sampling.stop_token_ids and len(written) >= sampling.min_tokens):
            return written, FinishReason.STOP
        matcher.advance(token_id)
        if matcher.is_complete:
            return written, FinishReason.STOP
    return written, FinishReason.LENGTH


def make_engine(
    model: MemoryMosaic, compiler: GrammarCompiler, *, num_blocks: int, max_num_seqs: int, budget: int
) -> Engine:
    blocks = BlockManager(num_blocks, 4, max_num_seqs)
    constraints = Constraints(compiler, CONFIG.eos_token_id)
    return engine_over(TorchKernel(model), CONFIG, blocks, budget, torch.float64, torch.float64, constraints)


def run(engine: Engine, requests: list[Request]) -> dict[str, list[RequestOutput]]:
    told: dict[str, list[RequestOutput]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add_request(request)
    while engine.has_work:
        for output in engine.step():
            told[output.request_id].append(output)
        engine.scheduler.check_integrity()
    return told


def ids_of(outputs: list[RequestOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.new_token_ids]


sampling_strategy = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 14),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 3]),
    top_p=st.sampled_from([1.0, 0.5]),
    min_p=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 2**32),
    min_tokens=st.sampled_from([0, 0, 6, 30]),
    ignore_eos=st.booleans(),
    stop_token_ids=st.sampled_from([(), (MARKER,), (2, 20)]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    logit_bias=st.sampled_from([(), ((1, 100.0), (0, -100.0)), ((36, 100.0),)]),
    allowed_token_ids=st.sampled_from([None, None, (1, 2, 3), (MARKER,)]),
    grammar=st.sampled_from(GRAMMARS),
)


@settings(max_examples=8, deadline=None)
@given(
    samplings=st.lists(sampling_strategy, min_size=1, max_size=4),
    spare_blocks=st.integers(0, 12),
    max_num_seqs=st.integers(1, 4),
    extra_budget=st.integers(0, 20),
)
def test_the_schedule_changes_nothing(
    model: MemoryMosaic,
    compiler: GrammarCompiler,
    samplings: list[SamplingParams],
    spare_blocks: int,
    max_num_seqs: int,
    extra_budget: int,
) -> None:
    requests = []
    for i, sampling in enumerate(samplings):
        rng = random.Random(sampling.seed)
        requests.append(Request(f"r{i}", tuple(rng.randrange(40) for _ in range(rng.randint(1, 20))), sampling))
    engine = make_engine(
        model, compiler, num_blocks=16 + spare_blocks, max_num_seqs=max_num_seqs, budget=max_num_seqs + extra_budget
    )
    told = run(engine, requests)
    for request in requests:
        outputs = told[request.request_id]
        assert (ids_of(outputs), outputs[-1].finish_reason) == one_pass(model, compiler, request)
        assert [output.is_finished for output in outputs] == [False] * (len(outputs) - 1) + [True]


def test_preempted_or_resumed_elsewhere_the_text_goes_on(model: MemoryMosaic, compiler: GrammarCompiler) -> None:
    requests = [
        Request(f"r{i}", (i + 1,) * 20, SamplingParams(max_tokens=30, seed=i, ignore_eos=True, grammar=GRAMMARS[i % 2]))
        for i in range(4)
    ]
    engine = make_engine(model, compiler, num_blocks=24, max_num_seqs=4, budget=16)
    told = run(engine, requests)
    assert engine.scheduler.num_preemptions > 0
    for i, request in enumerate(requests):
        whole = ids_of(told[request.request_id])
        assert whole == one_pass(model, compiler, request)[0]
        for done in (1, len(whole) - 1)[: 2 - i // 2]:
            resumed = Request("a", request.prompt_token_ids, request.sampling, tuple(whole[:done]))
            again = run(make_engine(model, compiler, num_blocks=24, max_num_seqs=1, budget=5), [resumed])
            assert ids_of(again["a"]) == whole[done:]


def test_a_slot_of_a_request_of_the_same_name_is_not_mistaken(model: MemoryMosaic, compiler: GrammarCompiler) -> None:
    engine = make_engine(model, compiler, num_blocks=16, max_num_seqs=1, budget=16)
    for grammar, pattern in ((GRAMMARS[0], "[a-c]+"), (GRAMMARS[3], r"\[.*")) * 2:
        told = run(engine, [Request("a", (1, 2), SamplingParams(max_tokens=3, seed=1, grammar=grammar))])
        assert re.fullmatch(pattern, text_of(ids_of(told["a"])))


def test_a_complete_text_ends_at_once_and_whole(model: MemoryMosaic, compiler: GrammarCompiler) -> None:
    grammar = Grammar(GrammarKind.CHOICE, json.dumps(["abc12"]))
    sampling = SamplingParams(max_tokens=20, min_tokens=20, ignore_eos=True, grammar=grammar)
    outputs = run(
        make_engine(model, compiler, num_blocks=16, max_num_seqs=1, budget=16), [Request("a", (1,), sampling)]
    )
    assert text_of(ids_of(outputs["a"])) == "abc12"
    assert (outputs["a"][-1].finish_reason, outputs["a"][-1].stop_token_id) == (FinishReason.STOP, None)


def test_where_a_text_may_end_its_end_token_ends_it(model: MemoryMosaic, compiler: GrammarCompiler) -> None:
    sampling = SamplingParams(max_tokens=20, temperature=0, logit_bias=((0, 100.0),), grammar=GRAMMARS[0])
    outputs = run(
        make_engine(model, compiler, num_blocks=16, max_num_seqs=1, budget=16), [Request("a", (1,), sampling)]
    )
    ids = ids_of(outputs["a"])
    assert len(text_of(ids)) in (3, 4)
    assert ids[-1] == outputs["a"][-1].stop_token_id == 0


def test_what_cannot_go_on_fails_alone(model: MemoryMosaic, compiler: GrammarCompiler) -> None:
    dead_end = Grammar(GrammarKind.CONTEXT_FREE, "start: A B\nA: /a/\nB: /b/ & /c/")
    requests = [
        Request("good", (1,), SamplingParams(max_tokens=5, grammar=GRAMMARS[0])),
        Request("bad", (1,), SamplingParams(max_tokens=5, grammar=dead_end)),
        Request("free", (1,), SamplingParams(max_tokens=5, ignore_eos=True)),
    ]
    engine = make_engine(model, compiler, num_blocks=16, max_num_seqs=3, budget=16)
    told = run(engine, requests)
    assert told["bad"][-1].finish_reason is FinishReason.ERROR
    assert "no text" in (told["bad"][-1].error or "")
    assert ids_of(told["good"]) == one_pass(model, compiler, requests[0])[0]
    assert len(ids_of(told["free"])) == 5


def test_log_probabilities_are_those_without_the_grammar(model: MemoryMosaic, compiler: GrammarCompiler) -> None:
    sampling = SamplingParams(max_tokens=8, seed=1, num_logprobs=37, grammar=GRAMMARS[0])
    told = run(make_engine(model, compiler, num_blocks=16, max_num_seqs=1, budget=16), [Request("a", (1, 2), sampling)])
    ids = ids_of(told["a"])
    logits = model(torch.tensor([[1, 2, *ids]]))[0][1:-1, : CONFIG.num_sampled_tokens]
    expected = [float(row[i]) for row, i in zip(logits.log_softmax(-1), ids, strict=True)]
    logprobs = [logprob for output in told["a"] for logprob in output.logprobs]
    assert [p.logprob for p in logprobs] == pytest.approx(expected)
    assert all(math.isfinite(value) for p in logprobs for _, value in p.top)
