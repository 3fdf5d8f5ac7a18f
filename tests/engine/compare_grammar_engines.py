"""What grammars cost with llguidance, as served here, and with xgrammar, if that is installed.

`python -m tests.engine.compare_grammar_engines [TOKENIZER_JSON]` prints a table; a row is a grammar and an engine, each
tried in a process of its own, which is killed after 5 s of processor time. A text of 200 tokens is drawn at random,
the same way for both.
"""

from __future__ import annotations

import array
import importlib
import importlib.util
import json
import multiprocessing
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from model.tokenizer import Tokenizer
from service.engine.grammar import Grammar, GrammarKind
from service.engine.grammar_compiler import GrammarCompiler
from tests.gateway.server import MODEL_DIR

NUM_TOKENS = 200
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
        "kind": {"enum": ["a", "b", "c"]},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def objects(width: int, depth: int) -> dict[str, Any]:
    if depth == 0:
        return {"type": "string"}
    names = [f"p{i}" for i in range(width)]
    properties = {name: objects(width, depth - 1) for name in names}
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


AMBIGUOUS = "e e | {a} | e {plus} e | {nothing}"
CASES: dict[str, Grammar | tuple[Grammar, Grammar]] = {
    "any object": Grammar(GrammarKind.JSON_SCHEMA, '{"type":"object"}'),
    "person": Grammar(GrammarKind.JSON_SCHEMA, json.dumps(PERSON)),
    "enum of 1000": Grammar(GrammarKind.JSON_SCHEMA, json.dumps({"enum": [f"value-{i}" for i in range(1000)]})),
    "585 objects": Grammar(GrammarKind.JSON_SCHEMA, json.dumps(objects(8, 4))),
    "anyOf 500": Grammar(
        GrammarKind.JSON_SCHEMA, json.dumps({"anyOf": [objects(1, 1) | {"title": str(i)} for i in range(500)]})
    ),
    "maxLength 100000": Grammar(GrammarKind.JSON_SCHEMA, '{"type":"string","maxLength":100000}'),
    "2000 optional": Grammar(GrammarKind.JSON_SCHEMA, json.dumps(objects(2000, 1) | {"required": []})),
    "phone": Grammar(GrammarKind.REGEX, r"\(\d{3}\) \d{3}-\d{4}"),
    ".*(a|b).{200}": Grammar(GrammarKind.REGEX, ".*(a|b).{200}"),
    "((a{1,1000}){1,1000})...": Grammar(GrammarKind.REGEX, "((a{1,1000}){1,1000}){1,1000}"),
    "ambiguous": (
        Grammar(GrammarKind.CONTEXT_FREE, 'start: e\ne: e e | "a" | e "+" e | '),
        Grammar(GrammarKind.CONTEXT_FREE, 'root ::= e\ne ::= e e | "a" | e "+" e | ""'),
    ),
}


class Ours:
    """llguidance, through the classes that serve."""

    def __init__(self, tokens: list[bytes], _: int) -> None:
        self._compiler = GrammarCompiler(lambda: tokens)
        self._size = len(tokens)
        self._compiler.matcher(Grammar(GrammarKind.REGEX, "a"))
        self._mask = array.array("B", bytes(self._compiler.num_mask_bytes))

    def compile(self, grammar: Grammar) -> None:
        self._matcher = self._compiler.matcher(grammar)

    def mask(self) -> bytes:
        self._matcher.fill(self._mask.buffer_info()[0], len(self._mask))
        return self._mask.tobytes()

    def advance(self, token_id: int) -> None:
        self._matcher.advance(token_id)


class Xgrammar:
    """xgrammar, set to the same compact JSON."""

    def __init__(self, tokens: list[bytes], eos: int) -> None:
        import xgrammar

        self._module = xgrammar
        kind = xgrammar.VocabType.RAW
        vocabulary = xgrammar.TokenizerInfo(tokens, vocab_type=kind, vocab_size=len(tokens), stop_token_ids=[eos])
        self._compiler = xgrammar.GrammarCompiler(vocabulary, max_threads=1, cache_enabled=False)
        self._compiler.compile_regex("a")
        self._mask = xgrammar.allocate_token_bitmask(1, len(tokens))

    def compile(self, grammar: Grammar) -> None:
        if grammar.kind is GrammarKind.JSON_SCHEMA:
            compiled = self._compiler.compile_json_schema(grammar.source, any_whitespace=False, separators=(",", ":"))
        elif grammar.kind is GrammarKind.REGEX:
            compiled = self._compiler.compile_regex(grammar.source)
        else:
            compiled = self._compiler.compile_grammar(grammar.source)
        self._matcher = self._module.GrammarMatcher(compiled)

    def mask(self) -> bytes:
        self._mask.fill_(-1)
        self._matcher.fill_next_token_bitmask(self._mask)
        return bytes(self._mask.numpy().tobytes())

    def advance(self, token_id: int) -> None:
        if not self._matcher.accept_token(token_id):
            raise ValueError("it refused a token that it had allowed")


def measure(make: Callable[[], Ours | Xgrammar], grammar: Grammar, eos: int, size: int) -> str:
    """Milliseconds to compile, and the median and the worst token's microseconds, of this thread's own time."""
    engine, rng = make(), random.Random(0)
    started = time.thread_time()
    engine.compile(grammar)
    compile_ms = (time.thread_time() - started) * 1000
    times = []
    for _ in range(NUM_TOKENS):
        started = time.thread_time()
        mask = engine.mask()
        spent = time.thread_time() - started
        ids = [8 * i + bit for i, byte in enumerate(mask) if byte for bit in range(8) if byte >> bit & 1]
        ids = [token_id for token_id in ids if token_id < size and token_id != eos]
        if not ids:
            break
        token_id = rng.choice(ids)
        started = time.thread_time()
        engine.advance(token_id)
        times.append(spent + time.thread_time() - started)
    times.sort()
    return f"{compile_ms:.1f} | {times[len(times) // 2] * 1e6:.0f} | {times[-1] * 1e6:.0f}"


def attempt(make: Callable[[], Ours | Xgrammar], grammar: Grammar, eos: int, size: int) -> str:
    """The same in a process that may die of it."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (5, 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            sender.send(measure(make, grammar, eos, size))
        except Exception as error:
            sender.send(f"{type(error).__name__}: {' '.join(str(error).split())[-60:]} | |")

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    sender.close()
    answer = None
    with suppress(EOFError):
        answer = receiver.recv()
    process.join()
    return answer or f"killed: {signal.Signals(-(process.exitcode or -1)).name} | |"


def rows(tokenizer: Tokenizer) -> Iterator[str]:
    eos = tokenizer.eos_token_id
    assert eos is not None
    tokens = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
    engines: dict[str, type[Ours] | type[Xgrammar]] = {"llguidance": Ours}
    if importlib.util.find_spec("xgrammar"):
        importlib.import_module("xgrammar")  # Once, for all that are forked from here.
        engines["xgrammar"] = Xgrammar
    for name, case in CASES.items():
        for i, (engine, kind) in enumerate(engines.items()):
            grammar = case[i] if isinstance(case, tuple) else case
            yield f"| {name} | {engine} | {attempt(lambda k=kind: k(tokens, eos), grammar, eos, len(tokens))} |"


if __name__ == "__main__":
    chosen = (
        Tokenizer.from_file(sys.argv[1]) if len(sys.argv) > 1 else Tokenizer.from_file(MODEL_DIR / "tokenizer.json")
    )
    print(f"vocabulary of {chosen.vocab_size}")
    print("| grammar | engine | compile ms | token us, median | worst |\n|---|---|---|---|---|")
    for row in rows(chosen):
        print(row, flush=True)
