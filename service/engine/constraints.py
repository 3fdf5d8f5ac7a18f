"""The grammars that running sequences follow: what each may draw next, and how far each has got.

Knows logits and sequences; what a grammar means is the compiler's affair.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from service.engine.grammar import FAULT
from service.engine.grammar_compiler import GrammarCompiler, GrammarError, Matcher
from service.engine.sequence import Sequence


class _Follower:
    """A matcher that has followed one request's text, `num_tokens` generated tokens of it."""

    __slots__ = ("_request", "matcher", "num_tokens")

    def __init__(self, sequence: Sequence, matcher: Matcher) -> None:
        self._request = sequence.request
        self.matcher = matcher
        self.num_tokens = 0

    def is_at(self, sequence: Sequence) -> bool:
        return self._request is sequence.request and self.num_tokens == sequence.num_output_tokens

    def advance(self, token_id: int) -> None:
        self.matcher.advance(token_id)
        self.num_tokens += 1


class Restriction:
    """What one step's sequences may draw. `failures` says of rows why they can draw nothing."""

    def __init__(self, masks: Tensor) -> None:
        self.failures: dict[int, str] = {}
        self._masks = masks
        self._followers: dict[int, tuple[int, _Follower]] = {}

    def add(self, row: int, place: int, follower: _Follower) -> None:
        """Notes who draws for `row`, by `place` in the masks."""
        self._followers[row] = (place, follower)

    def advance(self, token_ids: SequenceOf[int]) -> set[int]:
        """Takes the drawn tokens of all rows; the rows whose text is complete with them."""
        complete = set()
        for row, (place, follower) in self._followers.items():
            token_id = token_ids[row]
            if not int(self._masks[place, token_id >> 3]) >> (token_id & 7) & 1:
                complete.add(row)  # No text: it was drawn because the text may end here.
                continue
            try:
                follower.advance(token_id)
            except GrammarError as error:
                self.failures[row] = FAULT + str(error)
            else:
                if follower.matcher.is_complete:
                    complete.add(row)
        return complete


class Constraints:
    """Restricts logits to what grammars allow.

    There is at most one matcher for each state slot. One that is left behind, because its sequence ended or was
    preempted, is noticed when the slot is used next; a sequence that finds none of its own catches up with a new one.
    """

    def __init__(self, compiler: GrammarCompiler, eos_token_id: int | None) -> None:
        self._compiler = compiler
        self._eos_token_id = eos_token_id
        self._followers: dict[int, _Follower] = {}
        bits = (torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1
        # What is added to the logits of eight tokens, for each value that a byte of a mask can have.
        self._penalties = torch.zeros(256, 8).masked_fill(bits == 0, -torch.inf)

    def restrict(self, logits: Tensor, sequences: Mapping[int, Sequence]) -> Restriction:
        """Forbids in `logits` [rows, vocab], in place, what the grammars of `sequences`, by row, do not allow.

        Where a text may end, tokens that end it are allowed too. Rows that fail are left as they are.
        """
        masks = torch.zeros(len(sequences), self._compiler.num_mask_bytes, dtype=torch.uint8)
        restriction = Restriction(masks)
        rows: list[int] = []
        places: list[int] = []
        ends: list[tuple[int, Sequence]] = []
        for place, (row, sequence) in enumerate(sequences.items()):
            try:
                follower = self._follow(sequence)
                follower.matcher.fill(masks[place].data_ptr(), masks.shape[1])
            except GrammarError as error:
                restriction.failures[row] = FAULT + str(error)
                continue
            if follower.matcher.can_end:
                ends.append((len(rows), sequence))
            restriction.add(row, place, follower)
            rows.append(row)
            places.append(place)
        if rows:
            penalties = self._unpack(masks[places].to(logits.device), logits)
            for i, sequence in ends:
                self._allow_end(penalties[i], sequence)
            logits[rows] += penalties
        return restriction

    def _follow(self, sequence: Sequence) -> _Follower:
        assert sequence.slot is not None
        assert sequence.request.sampling.grammar is not None
        follower = self._followers.get(sequence.slot)
        if follower is None or not follower.is_at(sequence):
            follower = _Follower(sequence, self._compiler.matcher(sequence.request.sampling.grammar))
            for token_id in sequence.output_token_ids:
                follower.advance(token_id)
            self._followers[sequence.slot] = follower
        return follower

    def _unpack(self, masks: Tensor, logits: Tensor) -> Tensor:
        """Zeros and minus infinities [masks, vocab] for bits that are set and not set."""
        table = self._penalties.to(logits)
        return table.index_select(0, masks.flatten().int()).view(masks.shape[0], -1)[:, : logits.shape[1]]

    def _allow_end(self, penalties: Tensor, sequence: Sequence) -> None:
        sampling, eos = sequence.request.sampling, self._eos_token_id
        ends = [token_id for token_id in sampling.stop_token_ids if token_id < penalties.shape[0]]
        # Whoever wants the end ignored still gets it where nothing can be added.
        if eos is not None and (not sampling.ignore_eos or float(penalties.max()) == -torch.inf):
            ends.append(eos)
        penalties[ends] = 0.0
