"""The past of a batch of token sequences, for decoder-only language models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.rows import parted


@dataclass
class KvCache:
    """The past of a batch of token sequences; a value that :meth:`models.llm.Llm.step` takes and returns.

    A row's *length* is how many tokens it holds, its *next position* where the next one will stand. They differ once
    something was evicted: what is kept stays at the positions where it was read, and positions go on counting.

    Ownership: a step writes into the free slots of the memory that it was given, and :meth:`crop` only counts back.
    So the values before and after a step share memory, each reads its own first ``lengths`` slots, and an older one
    stays true until it (or what was cropped from a newer one) is appended to; then the newer ones are no longer.
    To go two ways from one past, take a :meth:`copy` or a :meth:`row`: these share nothing.

    Attributes:
        memory: ``[L, 2, B, H_kv, capacity, D_h]``, rotated keys and values, oldest first; zeros or leftovers beyond a
            row's length.
        positions: ``int64[B, capacity]``, on the host: where the token of each slot stands.
        lengths: ``int64[B]``, on the host: tokens that each row holds.
        next_positions: ``int64[B]``, on the host.
    """

    memory: Tensor
    positions: Tensor
    lengths: Tensor
    next_positions: Tensor

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold before the memory has to grow."""
        return self.memory.shape[4]

    @staticmethod
    def cat(caches: list[KvCache]) -> KvCache:
        """One batch of the rows of several caches, in their order; a single one is returned as it is."""
        if len(caches) == 1:
            return caches[0]
        caches = [c._with_capacity(max(c.capacity for c in caches)) for c in caches]
        return KvCache(
            memory=torch.cat([c.memory for c in caches], 2),
            positions=torch.cat([c.positions for c in caches]),
            lengths=torch.cat([c.lengths for c in caches]),
            next_positions=torch.cat([c.next_positions for c in caches]),
        )

    def part(self, start: int, end: int) -> KvCache:
        """A copy of the rows ``start … end - 1``; it shares no memory with this one."""
        at = slice(start, end)
        return KvCache(
            memory=self.memory[:, :, at].clone(memory_format=torch.contiguous_format),
            positions=self.positions[at].clone(),
            lengths=self.lengths[at].clone(),
            next_positions=self.next_positions[at].clone(),
        )

    def row(self, index: int) -> KvCache:
        """A copy of one row, as a cache of batch 1; it shares no memory with this one."""
        return self.part(index, index + 1)

    def rows(self) -> list[KvCache]:
        """Every row as a cache of its own."""
        if len(self.lengths) == 1:
            return [self]
        on_host = (parted(x, 0) for x in (self.positions, self.lengths, self.next_positions))
        return [KvCache(*row) for row in zip(parted(self.memory, 2), *on_host, strict=True)]

    def copy(self) -> KvCache:
        """The same past in other memory."""
        return KvCache(self.memory.clone(), self.positions.clone(), self.lengths.clone(), self.next_positions.clone())

    def crop(self, lengths: Tensor) -> KvCache:
        """Forgets the newest tokens, as if they had not been read; shares this one's memory.

        Args:
            lengths: ``int64[B]`` on the host: tokens that each row keeps, at most its length. The first forgotten
                token's position is the row's next one.

        Raises:
            ValueError: A length is negative or above the row's.
        """
        if bool((lengths < 0).any() or (lengths > self.lengths).any()):
            raise ValueError(f"rows of {self.lengths.tolist()} tokens cannot be cropped to {lengths.tolist()}")
        first = self.positions.gather(1, lengths.clamp(max=self.capacity - 1)[:, None])[:, 0]
        next_positions = torch.where(lengths < self.lengths, first, self.next_positions)
        return KvCache(self.memory, self.positions, lengths.clone(), next_positions)

    def accept(self, before: Tensor, path: Tensor, counts: Tensor) -> KvCache:
        """Keeps one branch of a tree of drafts and forgets the others; moves it together in this one's memory.

        Args:
            before: ``int64[B]`` on the host: the rows' lengths before the step that brought the tree.
            path: ``int64[B, N]`` on the host: the branch, as ascending indices of that step's tokens.
            counts: ``int64[B]`` on the host: how many of a row's indices are real; 0 keeps none.
        """
        kept = self.crop(before + counts)
        N = path.shape[1]
        path = torch.where(torch.arange(N) < counts[:, None], path, 0)
        source, target = before[:, None] + path, before[:, None] + torch.arange(N)
        rows = torch.arange(len(before))[:, None]
        last = self.positions[rows, source].gather(1, (counts - 1).clamp(min=0)[:, None])[:, 0]
        # A row that keeps fewer than N has that step's other slots there, and what lands in them does not matter.
        self.positions[rows, target] = self.positions[rows, source]
        at, source, target = (index.to(self.memory.device) for index in (rows, source, target))
        self.memory[:, :, at, :, target] = self.memory[:, :, at, :, source]
        kept.next_positions = torch.where(counts > 0, last + 1, kept.next_positions)
        return kept

    def evict(self, keep_first: Tensor, start: Tensor) -> KvCache:
        """Drops the old tokens between a prefix and the newest; the result shares no memory with this one.

        Keys stay rotated by the positions at which they were read and positions go on counting, so the tokens that
        are left see each other at the distances that they had. (Xiao et al., "Efficient Streaming Language Models
        with Attention Sinks", arXiv 2309.17453, keep a prefix too, but count positions within the cache.) What a kept
        token took from a dropped one remains in it.

        Args:
            keep_first: ``int64[B]`` on the host: tokens of the prefix, such as a prompt.
            start: ``int64[B]`` on the host: the first slot after the dropped ones, ``keep_first … length``.

        Raises:
            ValueError: A span does not lie within its row.
        """
        if bool((keep_first < 0).any() or (start < keep_first).any() or (start > self.lengths).any()):
            raise ValueError(
                f"slots {keep_first.tolist()} to {start.tolist()} cannot be dropped from rows of"
                f" {self.lengths.tolist()} tokens"
            )
        slot, dropped = torch.arange(self.capacity), start - keep_first
        index = torch.where(slot < keep_first[:, None], slot, slot + dropped[:, None]).clamp(max=self.capacity - 1)
        L, two, B, H, C, D = self.memory.shape
        in_memory = index.to(self.memory.device).view(1, 1, B, 1, C, 1).expand(L, two, B, H, C, D)
        return KvCache(
            memory=self.memory.gather(4, in_memory),
            positions=self.positions.gather(1, index),
            lengths=self.lengths - dropped,
            next_positions=self.next_positions.clone(),
        )

    def with_room(self, tokens: int) -> KvCache:
        """The same past with room for so many tokens more in every row; in other memory, doubled, if need be."""
        needed, capacity = int(self.lengths.max()) + tokens, max(self.capacity, 1)
        while capacity < needed:
            capacity *= 2
        return self._with_capacity(capacity)

    def _with_capacity(self, capacity: int) -> KvCache:
        more = capacity - self.capacity
        if more <= 0:
            return self
        # Zeros and not whatever was there: a mask cannot hide a NaN.
        memory = F.pad(self.memory, (0, 0, 0, more))
        return KvCache(memory, F.pad(self.positions, (0, more)), self.lengths, self.next_positions)
