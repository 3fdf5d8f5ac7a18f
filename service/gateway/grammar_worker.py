"""A process that tries grammars out: one may crash, hang or fill the memory of whoever compiles it.

Reads lines of JSON: first the vocabulary, then a grammar a line, each answered by a line that says what is wrong with
it. Ends with its input, or by the kernel's hand when a grammar costs too much.
"""

from __future__ import annotations

import array
import random
import resource
import sys
from collections.abc import Sequence

import orjson

from service.engine.grammar import Grammar, GrammarKind
from service.engine.grammar_compiler import GrammarCompiler, GrammarError

MAX_CPU_S = 2
MAX_MEMORY_BYTES = 256 * 2**20
# Less than the threads of an engine have, so that what passes here does not overflow there.
_STACK_BYTES = 4 * 2**20
# Most limits are reached within a few tokens, if ever.
_NUM_TOKENS_TRIED = 100


def main() -> None:
    """Answers until there is no more to read."""
    vocabulary = [token.encode("latin-1") for token in orjson.loads(sys.stdin.buffer.readline())]
    compiler = GrammarCompiler(lambda: vocabulary, max_kept=1)
    compiler.matcher(Grammar(GrammarKind.REGEX, "a"))
    _limit_memory()
    for line in sys.stdin.buffer:
        kind, source = orjson.loads(line)
        _limit_time()
        answer = find_fault(compiler, vocabulary, Grammar(GrammarKind(kind), source))
        sys.stdout.buffer.write(orjson.dumps(answer) + b"\n")
        sys.stdout.buffer.flush()


def find_fault(compiler: GrammarCompiler, vocabulary: Sequence[bytes], grammar: Grammar) -> str | None:
    """Why `grammar` cannot be followed; None where a text written at random got on well."""
    mask = array.array("B", bytes(compiler.num_mask_bytes))
    address, rng = mask.buffer_info()[0], random.Random(0)  # noqa: S311
    try:
        matcher = compiler.matcher(grammar)
        for position in range(_NUM_TOKENS_TRIED):
            matcher.fill(address, len(mask))
            allowed = _set_bits(mask, len(vocabulary))
            if not allowed:
                return "it allows no text but the empty one" if position == 0 else None
            matcher.advance(rng.choice(allowed))
            if matcher.is_complete:
                break
    except GrammarError as error:
        return str(error)
    except MemoryError:
        return "it takes too much memory"
    return None


def _set_bits(mask: Sequence[int], size: int) -> list[int]:
    found = [8 * i + bit for i, byte in enumerate(mask) if byte for bit in range(8) if byte >> bit & 1]
    return [token_id for token_id in found if token_id < size]


def _limit_memory() -> None:
    with open("/proc/self/statm", encoding="ascii") as statm:  # noqa: PTH123
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MAX_MEMORY_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_STACK, (_STACK_BYTES, resource.getrlimit(resource.RLIMIT_STACK)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_time() -> None:
    """From now on there are `MAX_CPU_S` seconds of the processor's time, and at most one more."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    until = int(usage.ru_utime + usage.ru_stime) + MAX_CPU_S + 1
    resource.setrlimit(resource.RLIMIT_CPU, (until, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
