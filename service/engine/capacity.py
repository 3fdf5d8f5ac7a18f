"""How many tokens a second an engine can compute, measured from its own steps, and how long a number of them takes."""

from __future__ import annotations

from collections import defaultdict

# A class of steps says something once it has seen so many.
_MIN_STEPS = 8
# Of what was known of a class, so much is kept with each of its steps: the last hundred or so count.
_MEMORY = 0.99


class _Rate:
    """Tokens over seconds of steps of one class, the latest counting most."""

    __slots__ = ("_num_steps", "_num_tokens", "_seconds", "per_s")

    def __init__(self) -> None:
        self._num_steps = 0
        self._num_tokens = 0.0
        self._seconds = 0.0
        self.per_s = 0.0  # while too little is known

    def add(self, num_tokens: int, seconds: float) -> None:
        self._num_steps += 1
        self._num_tokens = _MEMORY * self._num_tokens + num_tokens
        self._seconds = _MEMORY * self._seconds + seconds
        if self._num_steps >= _MIN_STEPS and self._seconds > 0:
            self.per_s = self._num_tokens / self._seconds


class Capacity:
    """What full batches come to. One thread records; any thread may ask.

    Tokens of prompts cost less than generated ones, so each kind has its rate. Larger steps give more tokens a second:
    steps are told apart by powers of two, and the best class is what this engine can do, whatever it is asked for now.

    `work_s` grows with each step by the time its tokens take at these rates. Its growth over a time is the share of
    the engine that was used: a single stream keeps an engine busy and leaves most of it free.
    """

    def __init__(self) -> None:
        self.work_s = 0.0
        self._prompt_rates: defaultdict[int, _Rate] = defaultdict(_Rate)
        self._generation_rates: defaultdict[int, _Rate] = defaultdict(_Rate)
        # The best of each: all that is read, so that whoever asks is not disturbed by what is recorded meanwhile.
        self._prompts_per_s = 0.0
        self._generation_per_s = 0.0

    def record(self, num_tokens: int, num_prompt_tokens: int, seconds: float) -> None:
        """A step has absorbed `num_tokens`, of them so many of prompts."""
        rates = self._prompt_rates if num_prompt_tokens else self._generation_rates
        rates[num_tokens.bit_length()].add(num_tokens, seconds)
        best = max([rate.per_s for rate in rates.values()])
        if num_prompt_tokens:
            self._prompts_per_s = best
        else:
            self._generation_per_s = best
        self.work_s += self.seconds_for(num_prompt_tokens, num_tokens - num_prompt_tokens) or seconds

    @property
    def prompt_tokens_per_s(self) -> float:
        """0 while neither kind has been measured; until this one has been, the other's."""
        return self._prompts_per_s or self._generation_per_s

    @property
    def generation_tokens_per_s(self) -> float:
        """As `prompt_tokens_per_s`."""
        return self._generation_per_s or self._prompts_per_s

    def seconds_for(self, num_prompt_tokens: float, num_generation_tokens: float) -> float:
        """How long so many tokens take in full batches; 0 while nothing has been measured."""
        prompts_per_s, generation_per_s = self.prompt_tokens_per_s, self.generation_tokens_per_s
        if not prompts_per_s:
            return 0.0
        return num_prompt_tokens / prompts_per_s + num_generation_tokens / generation_per_s
