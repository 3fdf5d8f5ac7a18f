"""Finds the beginning of a text in memory: which blocks and snapshots hold which text. Integers and keys only.

Who holds a block is the block manager's affair; here a block is in use or idle, and an idle one may be evicted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

from service.engine.continuations import Continuations
from service.engine.prefix_keys import PrefixKeys
from service.engine.sequence import Sequence
from service.engine.swap_pool import SwapPool


@dataclass(frozen=True, slots=True)
class StateSnapshot:
    """The state of a sequence after its first `num_tokens` tokens, kept in `slot` of the memory cache."""

    num_tokens: int
    slot: int


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """The longest beginning of a text that need not be absorbed again.

    `blocks` can be shared as they are. The first pairs of `tail`, if there is one, are the text's, the others are not:
    it has to be copied. `is_growing`: another sequence is just making it longer. `branch_point`, if it is not 0: it has
    so many tokens in common with another text, and there is no state after them yet. In a network with a short-term
    memory `short_table` has that memory's blocks, None for those that nothing to come can see; `short_tail` as `tail`.
    """

    blocks: tuple[int, ...] = ()
    tail: int | None = None
    snapshot: StateSnapshot | None = None
    is_growing: bool = False
    branch_point: int = 0
    short_table: tuple[int | None, ...] = ()
    short_tail: int | None = None

    @property
    def num_tokens(self) -> int:
        return 0 if self.snapshot is None else self.snapshot.num_tokens


@dataclass(frozen=True, slots=True)
class _Tail:
    """A text that ends within `block`."""

    block: int
    slot: int


class PrefixCache:
    """What is known of every block whose content can be found again.

    Block m of a text is complete, and gets the key of all tokens up to there, after (m + 1) * block_size + look_ahead
    tokens; the state at that point is its snapshot, in a slot that belongs to the block. Beside those there are a few
    *tails*: the state just before a prompt's last token, for others with the same prompt, which then absorb that one;
    and the state where a second text parted from a first within a block, for a third that goes as far with them.

    Slots of snapshots come after the `num_slots` of sequences: one for each block, then `num_slots` for tails. Blocks
    that are evicted go to `swap_pool`, where there is one.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_slots: int,
        look_ahead: int = 1,
        *,
        is_enabled: bool = True,
        swap_pool: SwapPool | None = None,
    ) -> None:
        self.block_size = block_size
        self.look_ahead = look_ahead
        self._keys = PrefixKeys(block_size, look_ahead)
        self.is_enabled = is_enabled
        self.swap_pool = swap_pool or SwapPool(0)
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self.num_evictions = 0
        self._num_blocks = num_blocks
        self._first_slot = num_slots
        self._blocks: dict[bytes, int] = {}
        self._block_keys: dict[int, bytes] = {}
        # From the least to the most recently used.
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._tails: OrderedDict[bytes, _Tail] = OrderedDict()
        self._tail_keys: dict[int, bytes] = {}
        self._free_tail_slots = [num_slots + num_blocks + i for i in range(num_slots if is_enabled else 0)]
        # What sequences that have begun will have absorbed soon.
        self._growing: dict[bytes, Sequence] = {}
        self._blocks_after, self._tails_after = Continuations(), Continuations()
        # So many tokens more must two texts have in common that a tail is kept of it.
        self._min_branch = max(block_size // 4, 1)

    @property
    def num_slots(self) -> int:
        """Slots for snapshots, of blocks and of tails."""
        return self._num_blocks + self._first_slot if self.is_enabled else 0

    @property
    def num_idle_blocks(self) -> int:
        return len(self._idle)

    @property
    def num_cached_blocks(self) -> int:
        """Complete blocks that can be found, in use or idle. Each has a snapshot."""
        return len(self._blocks)

    @property
    def num_snapshots(self) -> int:
        return len(self._blocks) + len(self._tails)

    def is_cached(self, block: int) -> bool:
        return block in self._block_keys or block in self._tail_keys

    def is_idle(self, block: int) -> bool:
        return block in self._idle

    def find(self, sequence: Sequence) -> CachedPrefix:
        """The longest prefix of `sequence` in memory that leaves it a token to absorb. Changes nothing."""
        # Whoever asks about a prompt's tokens needs the logits after each of them.
        if not self.is_enabled or sequence.wants_prompt_logprobs:
            return CachedPrefix()
        keys = self._keys.of_blocks(sequence, sequence.fork_point)
        blocks: list[int] = []
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                return self._parted(sequence, blocks, is_growing=key in self._growing)
            blocks.append(block)
        tail_key = self._keys.of_tail(sequence, sequence.fork_point)
        tail = self._tails.get(tail_key) if tail_key else None
        if tail is None:
            return self._parted(sequence, blocks, is_growing=tail_key in self._growing)
        return CachedPrefix(tuple(blocks), tail.block, StateSnapshot(sequence.fork_point, tail.slot))

    def _parted(self, sequence: Sequence, blocks: list[int], *, is_growing: bool) -> CachedPrefix:
        """What there is of a text in `blocks`, and within the next one."""
        end = min(self._keys.end(len(blocks)) - 1, sequence.fork_point)
        parent, start = self._keys.parent(sequence, self._keys.end(len(blocks) - 1))
        token_ids = sequence.token_ids[start:end]
        key, length = self._tails_after.longest(parent, token_ids)
        prefix = self._whole_blocks(blocks, is_growing=is_growing)
        if key is not None:
            tail = self._tails[key]
            prefix = CachedPrefix(tuple(blocks), tail.block, StateSnapshot(start + length, tail.slot), is_growing)
        common = max(after.num_common(parent, token_ids) for after in (self._blocks_after, self._tails_after))
        if common < length + self._min_branch or start + common == sequence.fork_point:
            return prefix
        return replace(prefix, branch_point=start + common)

    def shorter(self, prefix: CachedPrefix) -> CachedPrefix:
        """The longest prefix that is part of this one, which is not empty."""
        blocks = prefix.blocks if prefix.tail is not None else prefix.blocks[:-1]
        return self._whole_blocks(list(blocks), is_growing=prefix.is_growing)

    def keys(self, sequence: Sequence, num_tokens: int) -> list[bytes]:
        """Of the blocks of a prefix of so many tokens that was found, a tail's last."""
        keys, tail_key = self._keys.of_blocks(sequence, num_tokens), self._keys.of_tail(sequence, num_tokens)
        return [*keys, tail_key] if tail_key else keys

    def _whole_blocks(self, blocks: list[int], *, is_growing: bool) -> CachedPrefix:
        if not blocks:
            return CachedPrefix(is_growing=is_growing)
        snapshot = StateSnapshot(self._keys.end(len(blocks) - 1), self._first_slot + blocks[-1])
        return CachedPrefix(tuple(blocks), None, snapshot, is_growing)

    def begin(self, sequence: Sequence, prefix: CachedPrefix) -> None:
        """Takes note that `sequence` absorbs now what comes after `prefix`, which is what `find` has found."""
        if not self.is_enabled:
            return
        if prefix.tail is not None:
            self._tails.move_to_end(self._tail_keys[prefix.tail])
            self._touch(prefix.tail)
        if sequence.num_cached_tokens is None:  # what a preempted sequence finds again is no news
            self.num_queried_tokens += sequence.num_tokens
            self.num_hit_tokens += prefix.num_tokens
        # Of two texts that end in one block, the whole prompt's is kept.
        is_apart = self._keys.num_complete(prefix.branch_point) < self._keys.num_complete(sequence.fork_point)
        sequence.branch_point = prefix.branch_point if is_apart else 0
        fork_point = sequence.fork_point
        for key in (*self._keys.of_blocks(sequence, fork_point), self._keys.of_tail(sequence, fork_point)):
            if key and key not in self._blocks and key not in self._tails:
                self._growing.setdefault(key, sequence)

    def end(self, sequence: Sequence) -> None:
        """Takes note that `sequence` absorbs nothing any more."""
        for key in (*sequence.block_keys, *sequence.tail_keys.values()):
            if self._growing.get(key) is sequence:
                del self._growing[key]

    def snapshots(self, sequence: Sequence, start: int, end: int) -> tuple[StateSnapshot, ...]:
        """Where to keep which states while `sequence` absorbs its tokens `start` .. `end` - 1. To be booked after."""
        if not self.is_enabled:
            return ()
        tails = (sequence.branch_point, sequence.fork_point)
        # Nearly every token completes nothing, and is found out soonest.
        if end - start == 1 and end not in tails and (end - self.look_ahead) % self.block_size:
            return ()
        first, last = self._keys.num_complete(start), self._keys.num_complete(end)
        wanted = [
            StateSnapshot(self._keys.end(m), self._first_slot + sequence.block_table[m]) for m in range(first, last)
        ]
        for num_tokens in tails:
            is_tail = start < num_tokens <= end and self._keys.of_tail(sequence, num_tokens)
            if is_tail and (slot := self._take_tail_slot()) is not None:
                wanted.append(StateSnapshot(num_tokens, slot))
        return tuple(wanted)

    def book(self, sequence: Sequence, snapshots: tuple[StateSnapshot, ...]) -> None:
        """These were taken: from now on others can find what `sequence` has absorbed up to there."""
        for snapshot in snapshots:
            m, rest = divmod(snapshot.num_tokens - self.look_ahead, self.block_size)
            if rest:
                self._book_tail(sequence, sequence.block_table[m], snapshot)
                continue
            key = self._keys.of_blocks(sequence, snapshot.num_tokens)[m - 1]
            block = sequence.block_table[m - 1]
            if key not in self._blocks:
                self._blocks[key] = block
                self._block_keys[block] = key
                self._goes_on(self._blocks_after, sequence, key, snapshot.num_tokens)
            self._growing.pop(key, None)

    def _book_tail(self, sequence: Sequence, block: int, snapshot: StateSnapshot) -> None:
        key = self._keys.of_tail(sequence, snapshot.num_tokens)
        assert key
        self._growing.pop(key, None)
        if key in self._tails:
            self._free_tail_slots.append(snapshot.slot)
        else:
            self._tails[key] = _Tail(block, snapshot.slot)
            self._tail_keys[block] = key
            self._goes_on(self._tails_after, sequence, key, snapshot.num_tokens)

    def _goes_on(self, after: Continuations, sequence: Sequence, key: bytes, num_tokens: int) -> None:
        """The first `num_tokens` tokens of `sequence` can be found by `key`, after the last block before their end."""
        parent, start = self._keys.parent(sequence, num_tokens - 1)
        after.add(parent, key, sequence.token_ids[start:num_tokens])

    def use(self, block: int) -> None:
        """A sequence holds `block` now."""
        self._idle.pop(block, None)

    def rest(self, block: int) -> None:
        """No sequence holds `block` any more."""
        self._idle[block] = None

    def evict(self) -> int:
        """Forgets the idle block that was used least recently. There must be one."""
        block, _ = self._idle.popitem(last=False)
        self.num_evictions += self.is_cached(block)
        if key := self._block_keys.pop(block, None):
            del self._blocks[key]
            self._blocks_after.remove(key)
            self.swap_pool.send(key, block, self._first_slot + block)
        if key := self._tail_keys.get(block):
            self._free_tail_slots.append(self._drop_tail(key).slot)
        return block

    def bring_back(self, sequence: Sequence, prefix: CachedPrefix, free_blocks: list[int]) -> list[int]:
        """Makes `prefix`, which `find` has found, longer by what the swap pool has; into which blocks.

        Takes blocks from `free_blocks`, then idle ones.
        """
        if not self.swap_pool.num_blocks or prefix.is_growing or sequence.wants_prompt_logprobs:
            return []
        if prefix.tail is not None and prefix.num_tokens == sequence.fork_point:
            return []
        for block in prefix.blocks:
            self._touch(block)
        num_spare = len(free_blocks) + len(self._idle) - sum(block in self._idle for block in prefix.blocks)
        brought: list[int] = []
        keys = self._keys.of_blocks(sequence, sequence.fork_point)
        for m, key in enumerate(keys[len(prefix.blocks) :], start=len(prefix.blocks)):
            place = self.swap_pool.place_of(key)
            if num_spare == 0 or (place is None and key not in self._blocks):
                break
            num_spare -= 1
            if key in self._blocks or place is None:
                self._touch(self._blocks[key])
                continue
            block = free_blocks.pop() if free_blocks else self.evict()
            self._blocks[key], self._block_keys[block] = block, key
            self._goes_on(self._blocks_after, sequence, key, self._keys.end(m))
            self._idle[block] = None
            self.swap_pool.bring_back(place, block, self._first_slot + block)
            brought.append(block)
        return brought

    def _touch(self, block: int) -> None:
        if block in self._idle:
            self._idle.move_to_end(block)

    def _take_tail_slot(self) -> int | None:
        """None when all of them have been taken for this very step."""
        if self._free_tail_slots:
            return self._free_tail_slots.pop()
        return self._drop_tail(next(iter(self._tails))).slot if self._tails else None

    def _drop_tail(self, key: bytes) -> _Tail:
        tail = self._tails.pop(key)
        self._tails_after.remove(key)
        del self._tail_keys[tail.block]
        if tail.block in self._idle and tail.block not in self._block_keys:
            self._idle.move_to_end(tail.block, last=False)  # of no use any more
        return tail

    def check_integrity(self, num_holders: SequenceOf[int], running: Iterable[Sequence]) -> None:
        """Raises AssertionError when tables, idle blocks or slots contradict each other or `num_holders` per block."""
        assert {block: key for key, block in self._blocks.items()} == self._block_keys, "blocks and keys differ"
        assert {tail.block: key for key, tail in self._tails.items()} == self._tail_keys, "tails and keys differ"
        for block in self._idle:
            assert num_holders[block] == 0, f"block {block} is idle and held"
        for block in (*self._block_keys, *self._tail_keys):
            assert num_holders[block] > 0 or block in self._idle, f"block {block} can be found, but is free"
        slots = sorted([*self._free_tail_slots, *(tail.slot for tail in self._tails.values())])
        first = self._first_slot + self._num_blocks
        assert slots == list(range(first, first + len(slots))), "a tail's slot is lost or has two owners"
        assert len(slots) == (self._first_slot if self.is_enabled else 0)
        self._blocks_after.check_integrity(set(self._blocks))
        self._tails_after.check_integrity(set(self._tails))
        self.swap_pool.check_integrity()
        alive = set(running)
        for key, sequence in self._growing.items():
            assert sequence in alive, "a text is awaited from a sequence that does not run"
            assert key not in self._blocks, "a text is awaited that is there"
