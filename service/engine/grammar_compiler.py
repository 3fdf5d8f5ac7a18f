"""Grammars compiled for one vocabulary, and matchers that tell which token may come next, over llguidance.

Knows neither requests nor tensors.
"""

from __future__ import annotations

import json
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cached_property

import llguidance
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import gbnf_to_lark

from service.engine.grammar import Grammar, GrammarKind

# The engine's trie of tokens is no deeper. A longer token is never allowed: its bytes can always be had from others.
MAX_TOKEN_BYTES = 250
# What one grammar may cost. With these, and what the gateway refuses, a step takes some tens of milliseconds at most.
_LIMITS = LLParserLimits(
    max_items_in_row=2000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,
    step_max_items=5_000,
    max_lexer_states=30_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
# Tokens that are forced are drawn like all others: so what is allowed depends on the bytes so far and on nothing else,
# and a long constant costs nothing to look ahead into.
_OPTIONS = '\n%llguidance {"no_forcing": true}\n'
# No whitespace between the tokens of JSON: a model that likes spaces could otherwise write them for ever.
_JSON_OPTIONS = {"whitespace_flexible": False}

# What stands in a grammar for itself, and the rule options that cannot be honoured.
_LITERAL = re.compile(r'"(?:[^"\\\n]|\\.)*"|/(?:[^/\\\n]|\\.)+/|(?://|#)[^\n]*')
_REFUSED_OPTION = re.compile(r"\[[^\]]*\b(temperature|stop)\b")
_GBNF = re.compile(r"^\s*root\s*::=", re.MULTILINE)
_PLACE = re.compile(r"^(?:at )?(\d+)\(\d+\): ")
_REGEX_ERROR = re.compile(r"^regex parse error: .* error: ")
_PREFIX = re.compile(r"^(failed to compile JSON schema|invalid regex .*? \(in regex\)): ", re.DOTALL)


class GrammarError(ValueError):
    """A grammar that is wrong, that no text can satisfy, or that is too complex to follow. Fit for a client to read."""


class Matcher:
    """Follows one text through a grammar, token by token."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def copy(self) -> Matcher:
        """Another matcher at the same place, which goes its own way from here."""
        return Matcher(self._matcher.deep_copy())

    def fill(self, address: int, num_bytes: int) -> None:
        """Writes one bit for each token id to memory at `address`: whether that token may come next.

        Raises GrammarError where nothing may, though the text is not complete, or where a limit is exceeded.
        """
        self._matcher.unsafe_compute_mask_ptr(address, num_bytes)
        if self._matcher.is_error():
            raise GrammarError(_explain(self._matcher.get_error()))

    def advance(self, token_id: int) -> None:
        """Takes a token that may come next. Raises GrammarError."""
        if not self._matcher.consume_token(token_id):
            raise GrammarError(_explain(self._matcher.get_error()))

    @property
    def can_end(self) -> bool:
        """Whether the text so far is complete as it is."""
        return bool(self._matcher.is_accepting())

    @property
    def is_complete(self) -> bool:
        """Whether the text so far is complete and no token can follow it."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()


class GrammarCompiler:
    """Compiles grammars and keeps those that are held, and of the others those last used. For use by any thread."""

    def __init__(self, read_tokens: Callable[[], Sequence[bytes]], max_kept: int = 32) -> None:
        """`read_tokens` gives the bytes of every id that may be drawn; one that stands for no text has none.

        It is called when the first grammar comes. At most `max_kept` grammars are kept that nobody holds.
        """
        self._read_tokens = read_tokens
        self._max_kept = max_kept
        self._kept: OrderedDict[Grammar, Future[Matcher]] = OrderedDict()
        self._num_holders: Counter[Grammar] = Counter()
        self._lock = threading.Lock()  # Never held for long: who only wants a copy waits for no compilation.

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        # Threads that come first at the same time each make one; either does.
        return LLTokenizer(TokenizerWrapper(_Vocabulary(self._read_tokens())))

    @property
    def num_mask_bytes(self) -> int:
        """The size of what `Matcher.fill` writes."""
        return -(-self._vocabulary.vocab_size // 32) * 4

    def is_ready(self, grammar: Grammar) -> bool:
        """Whether `matcher` would answer at once. For a grammar that is held this stays so."""
        compiled = self._kept.get(grammar)
        return compiled is not None and compiled.done()

    def hold(self, grammar: Grammar) -> None:
        """Keeps `grammar` from when it is compiled until it is released as often as it was held."""
        with self._lock:
            self._num_holders[grammar] += 1

    def release(self, grammar: Grammar) -> None:
        """Takes back one `hold`."""
        with self._lock:
            self._num_holders[grammar] -= 1
            if not self._num_holders[grammar]:
                del self._num_holders[grammar]
            self._drop_unused()

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher at the beginning of a text. Raises GrammarError; takes long the first time."""
        with self._lock:
            compiled = self._kept.get(grammar)
            is_new = compiled is None
            if compiled is None:
                compiled = self._kept[grammar] = Future()
            self._kept.move_to_end(grammar)
            self._drop_unused()
        if is_new:
            self._complete(compiled, grammar)
        return compiled.result().copy()

    def _drop_unused(self) -> None:
        unheld = [grammar for grammar in self._kept if grammar not in self._num_holders]
        for grammar in unheld[: -self._max_kept]:
            del self._kept[grammar]

    def _complete(self, compiled: Future[Matcher], grammar: Grammar) -> None:
        """Compiles for all who wait for `compiled`. What fails is not kept."""
        try:
            compiled.set_result(self._compile(grammar))
        except BaseException as error:
            with self._lock:
                if self._kept.get(grammar) is compiled:
                    del self._kept[grammar]
            compiled.set_exception(error)

    def _compile(self, grammar: Grammar) -> Matcher:
        definition = LLMatcher.grammar_from_lark(_to_lark(grammar) + _OPTIONS)
        matcher = LLMatcher(self._vocabulary, definition, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise GrammarError(_explain(matcher.get_error()))
        return Matcher(matcher)


class _Vocabulary:
    """The tokens in the form in which llguidance wants them.

    Its end token is one of our own behind all others, which no model has: when a text may end is for us to say.
    """

    bos_token_id = None
    special_token_ids: Sequence[int] = ()

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self.tokens = [token if len(token) <= MAX_TOKEN_BYTES else b"" for token in token_bytes] + [b""]
        self.eos_token_id = len(token_bytes)

    def __call__(self, _: object) -> list[int]:
        raise NotImplementedError("nothing is forced, so nothing is tokenized")


def _to_lark(grammar: Grammar) -> str:
    source = grammar.source
    if grammar.kind is GrammarKind.JSON_SCHEMA:
        return _schema_to_lark(source)
    if grammar.kind is GrammarKind.REGEX:
        # As in JavaScript and JSON schemas \d, \w and \s are about ASCII: few who write \d expect Bengali digits.
        return f"start: /{llguidance.regex_to_lark(source, 'dws')}/"
    if grammar.kind is GrammarKind.CHOICE:
        return f"start: /{'|'.join(map(_spell_out, json.loads(source)))}/"
    if not _GBNF.search(source):
        if refused := _REFUSED_OPTION.search(_LITERAL.sub("", source)):
            raise GrammarError(f"the rule option '{refused[1]}' is not supported")
        return source
    try:
        return gbnf_to_lark(source)
    except RecursionError:
        raise GrammarError("it is nested too deeply") from None
    except Exception as error:  # the converter raises bare Exception
        raise GrammarError(str(error)) from None


def _schema_to_lark(source: str) -> str:
    try:
        schema = json.loads(source)
    except RecursionError:
        raise GrammarError("it is nested too deeply") from None
    except ValueError as error:
        raise GrammarError(f"it is not valid JSON: {error}") from None
    if not isinstance(schema, dict):
        raise GrammarError("a schema must be an object")
    if "x-guidance" in schema:
        raise GrammarError("'x-guidance' is not supported")
    return "start: %json " + json.dumps(schema | {"x-guidance": _JSON_OPTIONS})


def _spell_out(text: str) -> str:
    """A regular expression for exactly `text`."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _explain(error: str) -> str:
    """One line of what the engine said. Places are told where the client's own text has lines."""
    if error.startswith("panic"):
        return "it names a token or uses a construct that cannot be followed here"
    if error.startswith("NoExtensionBias"):
        return "no text can satisfy it"
    if "coerce_one_of" in error:
        return "oneOf is followed only where its branches plainly exclude one another; anyOf is always"
    first = re.split(r"\n +\d+ \| ", error)[0].removesuffix("<non-verbose/>")
    place = _PLACE.match(first)
    text = " ".join(_PREFIX.sub("", first[place.end() if place else 0 :]).split())
    text = _REGEX_ERROR.sub("not a regular expression: ", text).replace(
        "Unimplemented keys:", "these keywords are not supported:"
    )
    return f"line {place[1]}: {text}" if place and int(place[1]) > 1 else text
