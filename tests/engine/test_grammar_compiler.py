"""What may come next by the grammar engine, against definitions that need none: prefixes, parsers, validators."""

from __future__ import annotations

import array
import ast
import json
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.tokenizer import Tokenizer
from service.engine.grammar import Grammar, GrammarKind
from service.engine.grammar_compiler import MAX_TOKEN_BYTES, GrammarCompiler, GrammarError, Matcher
from tests.gateway.server import MODEL_DIR
from tests.grammars import small_schemas


def choice(*texts: str) -> Grammar:
    return Grammar(GrammarKind.CHOICE, json.dumps(texts))


def allowed(compiler: GrammarCompiler, matcher: Matcher) -> set[int]:
    """The ids whose bit is set; the one behind the vocabulary is the end."""
    size = compiler.num_mask_bytes
    buffer = array.array("B", bytes(size))
    matcher.fill(buffer.buffer_info()[0], size)
    return {8 * i + bit for i, byte in enumerate(buffer) if byte for bit in range(8) if byte >> bit & 1}


@pytest.fixture(scope="module")
def tokens() -> list[bytes]:
    tokenizer = Tokenizer.load(MODEL_DIR)
    assert tokenizer is not None
    return [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]


@pytest.fixture(scope="module")
def compiler(tokens: list[bytes]) -> GrammarCompiler:
    return GrammarCompiler(lambda: tokens)


def wander(compiler: GrammarCompiler, tokens: list[bytes], grammar: Grammar, seed: int, max_tokens: int = 2000) -> str:
    """A text made of tokens drawn at random from those allowed, ending as soon as it may after 20 of them."""
    rng, matcher, text = random.Random(seed), compiler.matcher(grammar), b""
    for i in range(max_tokens):
        if matcher.is_complete or (i >= 20 and matcher.can_end):
            return text.decode()
        ids = sorted(allowed(compiler, matcher) - {len(tokens)})
        if not ids:
            assert matcher.can_end
            return text.decode()
        token_id = rng.choice(ids)
        matcher.advance(token_id)
        text += tokens[token_id]
    raise AssertionError(f"no end in sight: {text!r}")


spelled = st.text("ab\u00e9\U0001f600", min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(spelled, min_size=1, max_size=5),
    words=st.lists(spelled.map(str.encode), max_size=6),
    cuts=st.lists(st.integers(0, 3), max_size=8),
)
def test_what_is_allowed_is_what_can_still_become_one_of_the_texts(
    texts: list[str], words: list[bytes], cuts: list[int]
) -> None:
    # Parts of characters too, and nothing twice: of equal tokens llguidance knows one.
    pieces = {word[: cut + 1] for word, cut in zip(words, cuts, strict=False)} | set(words)
    vocabulary = [b"", *sorted({bytes([byte]) for text in texts for byte in text.encode()} | pieces)]
    compiler = GrammarCompiler(lambda: vocabulary)
    targets = {text.encode() for text in texts}
    for seed in range(3):
        rng, matcher, written = random.Random(seed), compiler.matcher(choice(*texts)), b""
        while True:
            expected = {
                i
                for i, token in enumerate(vocabulary)
                if token and any(target.startswith(written + token) for target in targets)
            }
            assert matcher.can_end == (written in targets)
            assert matcher.is_complete == (not expected)
            if not expected:
                break
            assert allowed(compiler, matcher) - {len(vocabulary)} == expected
            token_id = rng.choice(sorted(expected))
            matcher.advance(token_id)
            written += vocabulary[token_id]
        assert written in targets


@settings(max_examples=60, deadline=None)
@given(schema=small_schemas, seed=st.integers(0, 2**31))
def test_json_is_compact_and_valid(
    compiler: GrammarCompiler, tokens: list[bytes], schema: dict[str, Any], seed: int
) -> None:
    text = wander(compiler, tokens, Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema)), seed)
    jsonschema.validate(json.loads(text), schema)
    quoted = re.sub(r'"(?:[^"\\]|\\.)*"', "", text)
    assert not re.search(r"\s", quoted), text


@pytest.mark.parametrize(
    "pattern",
    [
        r"\d{3}-\d{4}",
        r"(cat|dog|bird)s? (sat|ran)\.",
        r"[A-Z][a-z]{2,8}( [a-z]{1,6}){0,3}",
        r"^(?i)yes|no$",
        r'"\\n/\x41\s?"',
        r"\w{1,5}@\w{1,5}\.com",
        r"[^\x00-\x7f]{1,3}",
    ],
)
def test_a_whole_text_matches_its_regular_expression(
    compiler: GrammarCompiler, tokens: list[bytes], pattern: str
) -> None:
    python_pattern = f"(?i){pattern.replace('(?i)', '')}" if "(?i)" in pattern else pattern
    for seed in range(10):
        assert re.fullmatch(python_pattern, wander(compiler, tokens, Grammar(GrammarKind.REGEX, pattern), seed))


LARK = """
start: sum
sum: product (("+" | "-") product)*
product: atom (("*" | "/") atom)*   // a comment with [stop="x"] in it
atom: NUMBER | "(" sum ")"
NUMBER: /[1-9][0-9]{0,3}/
"""
GBNF = """
# arithmetic
root ::= sum
sum ::= product (("+" | "-") product)*
product ::= atom (("*" | "/") atom)*
atom ::= [1-9] [0-9]{0,3} | "(" sum ")"
"""


@pytest.mark.parametrize("source", [LARK, GBNF], ids=["lark", "gbnf"])
def test_a_context_free_text_can_be_parsed(compiler: GrammarCompiler, tokens: list[bytes], source: str) -> None:
    digits = [i for i, token in enumerate(tokens) if token in (b"1", b")")]
    for seed in range(20):
        rng, matcher, text = random.Random(seed), compiler.matcher(Grammar(GrammarKind.CONTEXT_FREE, source)), b""
        for i in range(200):
            ids = sorted(allowed(compiler, matcher) - {len(tokens)})
            if i > 20:  # Close what is open.
                if matcher.can_end:
                    break
                ids = [token_id for token_id in digits if token_id in ids] or ids
            token_id = rng.choice(ids)
            matcher.advance(token_id)
            text += tokens[token_id]
        assert matcher.can_end
        ast.parse(text.decode(), mode="eval")


REFUSED = [
    (GrammarKind.REGEX, "(", "unclosed group"),
    (GrammarKind.REGEX, "(?=a)b", "look-ahead"),
    (GrammarKind.REGEX, r"(a)\1", "backreferences"),
    (GrammarKind.JSON_SCHEMA, '{"a"', "not valid JSON"),
    (GrammarKind.JSON_SCHEMA, "[]", "must be an object"),
    (GrammarKind.JSON_SCHEMA, '{"a":' * 5000 + "{}" + "}" * 5000, "nested too deeply"),
    (GrammarKind.JSON_SCHEMA, '{"x-guidance": {"lenient": true}}', "x-guidance"),
    (GrammarKind.JSON_SCHEMA, '{"type": "foo"}', "Invalid type: foo"),
    (GrammarKind.JSON_SCHEMA, '{"type": "array", "uniqueItems": true}', 'not supported: ["uniqueItems"]'),
    (GrammarKind.JSON_SCHEMA, '{"type": "string", "format": "tomato"}', "Unknown format: tomato"),
    (GrammarKind.JSON_SCHEMA, '{"type": "string", "pattern": "("}', "unclosed group"),
    (GrammarKind.JSON_SCHEMA, '{"type": "integer", "minimum": 5, "maximum": 3}', "greater than maximum"),
    (GrammarKind.JSON_SCHEMA, '{"oneOf": [{"minimum": 1}, {"maximum": 5}]}', "oneOf is followed only where"),
    (GrammarKind.JSON_SCHEMA, '{"$ref": "http://example.com/x"}', "not present"),
    (GrammarKind.CONTEXT_FREE, "", "no start rule"),
    (GrammarKind.CONTEXT_FREE, 'start: "a" b', 'unknown name: "b"'),
    (GrammarKind.CONTEXT_FREE, 'start: "a" B\n\nB: "b" B', "line 3: circular reference"),
    (GrammarKind.CONTEXT_FREE, 'start: "a" <|endoftext|>', "names a token"),
    (GrammarKind.CONTEXT_FREE, 'start: a\na[temperature=0.5]: "x"', "option 'temperature' is not supported"),
    (GrammarKind.CONTEXT_FREE, 'start: a\na[capture, stop="b"]: /.*/', "option 'stop' is not supported"),
    (GrammarKind.CONTEXT_FREE, "root ::= a", "'a' not found"),
    (GrammarKind.CONTEXT_FREE, "root ::= " + "(" * 5000, "nested too deeply"),
]


@pytest.mark.parametrize(("kind", "source", "reason"), REFUSED)
def test_what_cannot_be_compiled_is_explained(
    compiler: GrammarCompiler, kind: GrammarKind, source: str, reason: str
) -> None:
    with pytest.raises(GrammarError, match=re.escape(reason)) as caught:
        compiler.matcher(Grammar(kind, source))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", [r"[^\s\S]", "a[^\\s\\S]"])
def test_a_text_that_cannot_be_finished_is_never_begun(compiler: GrammarCompiler, source: str) -> None:
    with pytest.raises(GrammarError, match="no text can satisfy it"):
        allowed(compiler, compiler.matcher(Grammar(GrammarKind.REGEX, source)))


def test_matchers_of_one_grammar_do_not_disturb_each_other(compiler: GrammarCompiler, tokens: list[bytes]) -> None:
    first, second = compiler.matcher(choice("ab")), compiler.matcher(choice("ab"))
    first.advance(tokens.index(b"a"))
    assert allowed(compiler, first) == {tokens.index(b"b")}
    assert tokens.index(b"a") in allowed(compiler, second)
    with pytest.raises(GrammarError):
        first.advance(tokens.index(b"a"))
    assert not first.can_end
    assert not first.is_complete


def test_few_grammars_are_kept() -> None:
    compiler = GrammarCompiler(lambda: [b"a", b"b", b"c"], max_kept=2)
    for texts in (("a",), ("b",), ("a",), ("c",)):
        compiler.matcher(choice(*texts))
    assert [compiler.is_ready(choice(text)) for text in "abc"] == [True, False, True]


def test_what_is_held_is_kept_until_it_is_released() -> None:
    compiler = GrammarCompiler(lambda: [b"a", b"b", b"c", b"d"], max_kept=1)

    def ready() -> str:
        return "".join(text for text in "abcd" if compiler.is_ready(choice(text)))

    for text in "aab":
        compiler.hold(choice(text))
    for text in "abcd":
        compiler.matcher(choice(text))
    assert ready() == "abd"
    compiler.release(choice("a"))
    assert ready() == "abd"
    compiler.release(choice("a"))
    assert ready() == "bd"
    compiler.release(choice("b"))
    assert ready() == "d"


class HeldUpCompiler(GrammarCompiler):
    """Compiles `slow` when it is let."""

    slow = choice("b")

    def __init__(self) -> None:
        super().__init__(lambda: [b"a", b"b", b"c"])
        self.has_begun, self.may_go = threading.Event(), threading.Event()
        self.compiled: list[Grammar] = []

    def _compile(self, grammar: Grammar) -> Matcher:
        self.compiled.append(grammar)
        if grammar == self.slow:
            self.has_begun.set()
            assert self.may_go.wait(60)
        return super()._compile(grammar)


def test_only_who_wants_it_waits_for_a_grammar_and_it_is_compiled_once() -> None:
    compiler = HeldUpCompiler()
    with ThreadPoolExecutor(3) as pool:
        try:
            waiting = [pool.submit(compiler.matcher, compiler.slow) for _ in range(2)]
            assert compiler.has_begun.wait(30)
            pool.submit(compiler.matcher, choice("a")).result(30)
            assert compiler.is_ready(choice("a"))
            assert not compiler.is_ready(compiler.slow)
            assert not any(matcher.done() for matcher in waiting)
        finally:
            compiler.may_go.set()
        first, second = [matcher.result(30) for matcher in waiting]
    first.advance(1)
    assert (first.is_complete, second.is_complete) == (True, False)
    assert compiler.compiled == [compiler.slow, choice("a")]


def test_what_failed_is_neither_ready_nor_kept(compiler: GrammarCompiler) -> None:
    for _ in range(2):
        with pytest.raises(GrammarError, match="unclosed"):
            compiler.matcher(Grammar(GrammarKind.REGEX, "("))
        assert not compiler.is_ready(Grammar(GrammarKind.REGEX, "("))


def test_tokens_that_are_too_long_are_left_alone() -> None:
    vocabulary = [b"a", b"a" * MAX_TOKEN_BYTES, b"a" * (MAX_TOKEN_BYTES + 1), b"a" * 5000]
    compiler = GrammarCompiler(lambda: vocabulary)
    assert allowed(compiler, compiler.matcher(Grammar(GrammarKind.REGEX, "a+"))) == {0, 1}
