"""Adding LoRA to the rows of a batch, each row from its own slot only. Plain torch, no vLLM.

Two ways of computing the same sum, chosen by cost for each module and batch:

* grouped: each slot's rows through that slot's A and B (long prompts, few adapters);
* masked: all rows through the A matrices of all filled slots at once, foreign blocks zeroed, then through all B
  matrices (short batches of many adapters, where the cost of calling torch dominates).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

# Work, in multiply-adds, that costs about as much as the torch calls of one more group.
GROUP_OVERHEAD = 600_000


@dataclass(frozen=True, slots=True)
class RowGroups:
    """The rows of a batch by LoRA slot.

    ``slots`` is the slot of each row, shape [rows], -1 for the base model. ``groups`` holds (slot, rows,
    number of rows), where rows is a slice when they are adjacent, else an index tensor. Rows of the base model are in
    no group.
    """

    slots: torch.Tensor
    groups: tuple[tuple[int, slice | torch.Tensor, int], ...]
    masks: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, slots: torch.Tensor) -> RowGroups:
        """Groups the rows of ``slots`` (int64 [rows])."""
        slots = slots.clone()
        groups: list[tuple[int, slice | torch.Tensor, int]] = []
        for slot in torch.unique(slots).tolist():
            if slot < 0:
                continue
            rows = torch.nonzero(slots == slot).squeeze(1)
            count = rows.numel()
            first, last = int(rows[0]), int(rows[-1])
            groups.append((slot, slice(first, last + 1) if last - first + 1 == count else rows, count))
        return cls(slots, tuple(groups))

    def foreign(self, ranks: tuple[int, ...]) -> torch.Tensor:
        """Bool [rows, sum(ranks)]: True where the column belongs to another slot than the row's. ``ranks`` by slot."""
        mask = self.masks.get(ranks)
        if mask is None:
            owner = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks))
            mask = self.slots.unsqueeze(1) != owner.unsqueeze(0)
            self.masks[ranks] = mask
        return mask


@dataclass(frozen=True, slots=True)
class SlotWeights:
    """The filled part of one module's LoRA slots, packed.

    ``ranks``: used rank by slot, 0 for a slot that leaves this module alone. ``a`` [sum(ranks), in] and
    ``b`` [sum(ranks), out] hold the slots' blocks one after the other, ``starts`` their first rows.
    """

    ranks: tuple[int, ...]
    starts: tuple[int, ...]
    a: torch.Tensor
    b: torch.Tensor
    finite: bool

    @classmethod
    def pack(cls, stacked_a: torch.Tensor, stacked_b: torch.Tensor) -> SlotWeights:
        """Packs vLLM's ``stacked_a`` [slots, 1, max rank, in] and ``stacked_b`` [slots, 1, out, max rank]."""
        a_all, b_all = stacked_a.flatten(0, -3), stacked_b.flatten(0, -3)
        max_rank = a_all.shape[1]
        # An A row of zeros adds nothing, so the last row that is not zero bounds the rank.
        used = a_all.abs().amax(dim=2) != 0
        positions = torch.arange(1, max_rank + 1)
        ranks = tuple(int(rank) for rank in (used * positions).amax(dim=1).tolist())
        starts, total = [], 0
        for rank in ranks:
            starts.append(total)
            total += rank
        if total == 0:
            return cls(ranks, tuple(starts), a_all.new_empty(0), b_all.new_empty(0), True)
        a = torch.cat([a_all[slot, :rank] for slot, rank in enumerate(ranks)])
        b = torch.cat([b_all[slot, :, :rank].T for slot, rank in enumerate(ranks)])
        finite = bool(torch.isfinite(a).all() and torch.isfinite(b).all())
        return cls(ranks, tuple(starts), a, b, finite)

    def block(self, slot: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(A [rank, in], B [rank, out]) of ``slot``, or None when it leaves the module alone."""
        rank = self.ranks[slot]
        if rank == 0:
            return None
        start = self.starts[slot]
        return self.a[start : start + rank], self.b[start : start + rank]


def check_rows(groups: RowGroups, x: torch.Tensor) -> None:
    """Raises ValueError unless ``x`` has one row for each of the batch's."""
    if groups.slots.numel() != x.shape[0]:
        raise ValueError(f"LoRA mapping has {groups.slots.numel()} rows, the batch has {x.shape[0]}")


def add_lora(y: torch.Tensor, x: torch.Tensor, weights: SlotWeights, groups: RowGroups, scale: float) -> None:
    """Adds each row's LoRA to ``y`` [rows, out] in place, from ``x`` [rows, in]."""
    busy = [(slot, rows, count) for slot, rows, count in groups.groups if weights.ranks[slot]]
    if not busy:
        return
    x = x.to(weights.a.dtype)
    own = sum(count * weights.ranks[slot] for slot, _, count in busy)
    wasted = (x.shape[0] * weights.a.shape[0] - own) * (weights.a.shape[1] + weights.b.shape[1])
    # A zero times another slot's infinity is not a number, so only finite weights may be summed over.
    if len(busy) > 1 and weights.finite and wasted < GROUP_OVERHEAD * len(busy):
        hidden = x @ weights.a.T
        hidden.masked_fill_(groups.foreign(weights.ranks), 0)
        accumulate(y, slice(None), hidden, weights.b, scale)
        return
    for slot, rows, _ in busy:
        block = weights.block(slot)
        if block is not None:
            accumulate(y, rows, x[rows] @ block[0].T, block[1], scale)


def expand(y: torch.Tensor, x: torch.Tensor, stacked_b: torch.Tensor, groups: RowGroups) -> None:
    """Adds ``x`` [rows, max rank] through the B of each row's slot to ``y`` [rows, out] in place."""
    b_all = stacked_b.flatten(0, -3)
    for slot, rows, _ in groups.groups:
        b = b_all[slot]
        accumulate(y[:, : b.shape[0]], rows, x[rows].to(b.dtype), b.T, 1.0)


def accumulate(
    y: torch.Tensor, rows: slice | torch.Tensor, hidden: torch.Tensor, b: torch.Tensor, scale: float
) -> None:
    """y[rows] += scale * hidden @ b, with ``hidden`` [rows, rank] and ``b`` [rank, at least out]."""
    b = b[:, : y.shape[1]]
    if isinstance(rows, torch.Tensor):
        y.index_add_(0, rows, (hidden @ b).to(y.dtype), alpha=scale)
    elif y.dtype == b.dtype:
        y[rows].addmm_(hidden, b, alpha=scale)
    else:
        y[rows].add_((hidden @ b).to(y.dtype), alpha=scale)
