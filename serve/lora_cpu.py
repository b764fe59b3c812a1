"""Multi-LoRA on CPU for vLLM: rows that never see another row's adapter, at a small part of the base model's cost.

Stands alone: torch and vLLM only. Tested and measured with vLLM 0.32.

What vLLM's own CPU wrapper does wrong (`vllm/lora/punica_wrapper/punica_cpu.py`, `vllm/lora/ops/torch_ops`):

- It picks LoRA weights with `weights[indices]`, where rows of the base model have index -1. That is the last slot: in
  a batch that mixes base rows with LoRA rows, base rows get the last slot's adapter.
- It copies A and B once for each row, in every module and whether or not any slot fills that module.
- Around it, vLLM lists all loaded adapters anew for each adapter of each step.

What this wrapper does:

- Rows are grouped by slot, once for each new mapping and not for each module. Base rows are in no group, so nothing is
  read or written for them. No product ever runs over two slots, so no value of one can reach the other's rows.
- Slots with few rows each are one batched product: `[slots, rows of a slot, in] @ A [slots, in, rank] @ B [slots, rank,
  out]`, straight on vLLM's tensors or, where it pays, on a copy that is kept until a slot changes: in float32 (batched
  products of smaller types start slowly), or of slots that lie far apart. Slots of much different rank or row count
  go in batches of their own.
- Long runs of adjacent rows (prompts) are two products each, added in place.
- While they are small, merged projections (q, k, v; gate, up) are one A product and one B product.
- Modules that no slot of the batch fills cost no torch call, nor does a batch of base rows.

Measured with `benchmarks/lora_kernel.py`: 64 requests of 64 prompt and 32 output tokens through `vllm.LLM` on one core,
tokens/s against the same engine answering without adapters, in turns with vLLM's own wrapper. The figures are in
`benchmarks/results/lora_kernel.md`.

`register` is for the entry point group `vllm.general_plugins`. Inside vLLM it would be the platform's wrapper path, a
call of `slot_written` in `LoRAModelManager.activate_adapter`, and `apply_adapters` in `LRUCacheWorkerLoRAManager`. LoRA
on fused mixture-of-experts layers stays unsupported on CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

logger = init_logger(f"vllm.{__name__}")

WRAPPER_PATH = "serve.lora_cpu.IsolatedPunicaWrapperCPU"

# Adjacent rows of one slot from which two plain products in place beat a place in a batched product.
LONG_RUN = 32
# The same for other types than float32, where each product starts much slower.
LONG_RUN_HALF = 256
# Multiply-adds that cost about as much as the torch calls of one more batched product.
CALL_WORK = 500_000
# Weights (elements) that are read in about the time of the torch calls that one joint product saves.
CALL_READ = 75_000
# Rows (padding included) up to which float32 is faster than a smaller type.
FEW_ROWS = 256
# Weights of a slot's B (rank * out) up to which it is faster as [rank, out] than as vLLM has it.
SMALL_B = 6_000
# Copied weights (elements) that a module keeps at most, beside those in use.
COPIED = 2_000_000


class Layout(NamedTuple):
    """What decides how a batch goes through a module: modules with equal layouts share plans."""

    ranks: tuple[tuple[int, ...], ...]
    """Used rank by slice and slot, 0 where the slot leaves the slice alone."""
    width: int
    """Input and output width together."""
    long_run: int
    """Adjacent rows from which a slot goes alone."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Slots that go through a module in one batched product, padded to the same number of rows each."""

    slots: tuple[int, ...]
    """In the order of the product. Where ``in_place``, all between the first and the last, used or not."""
    in_place: bool
    """Whether vLLM's own tensors serve; else slots lie too far apart, and are copied."""
    length: int
    """Rows of each slot, padding included."""
    gather: Tensor | slice
    """The rows of x in the order of the product, int64 [groups * length]; padding repeats a row."""
    place: Tensor | None
    """Where in the product each of ``rows`` is, int64 [rows]; None where the product is in their order."""
    rows: Tensor | slice
    """The rows of y, ascending: int64 [rows], or a slice."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How one batch of rows goes through modules of one layout."""

    runs: tuple[tuple[int, int, int], ...]
    """(slot, first row, last row plus one) of runs long enough to go alone."""
    batches: tuple[tuple[Batch, tuple[int, ...]], ...]
    """With the largest rank by slice, 0 where none of the slots fills it."""


class RowSlots:
    """The rows of a batch by LoRA slot: ``runs`` of adjacent rows as (slot, first row, last row plus one).

    Base rows are in no run.
    """

    def __init__(self, slots: np.ndarray) -> None:
        """``slots``: int64 [rows], -1 for the base model."""
        self.count = int(slots.size)
        edges = [0, *(np.flatnonzero(np.diff(slots)) + 1).tolist(), self.count] if self.count else [0]
        firsts = slots[edges[:-1]].tolist()
        self.runs = [run for run in zip(firsts, edges[:-1], edges[1:], strict=True) if run[0] >= 0]
        self._plans: dict[Layout, Plan] = {}
        self._batches: dict[tuple[tuple[int, int], ...], Batch] = {}

    def plan(self, layout: Layout) -> Plan:
        """The cheapest way through modules of ``layout``."""
        found = self._plans.get(layout)
        if found is None:
            found = self._plans[layout] = self._make(layout)
        return found

    def _make(self, layout: Layout) -> Plan:
        rank_of = [sum(ranks) for ranks in zip(*layout.ranks, strict=True)]
        long: list[tuple[int, int, int]] = []
        rows_of: dict[int, list[int]] = {}
        for run in self.runs:
            slot, first, last = run
            if rank_of[slot] and last - first >= layout.long_run:
                long.append(run)
            elif rank_of[slot]:
                rows_of.setdefault(slot, []).extend(range(first, last))
        groups: list[list[int]] = []
        most_rows = most_rank = own = 0
        for slot in sorted(rows_of, key=lambda slot: (-rank_of[slot], -len(rows_of[slot]))):
            rows, rank = max(most_rows, len(rows_of[slot])), max(most_rank, rank_of[slot])
            own += len(rows_of[slot]) * rank_of[slot]
            if groups and (rows * rank * (len(groups[-1]) + 1) - own) * layout.width <= CALL_WORK:
                groups[-1].append(slot)
            else:
                groups.append([slot])
                rows, rank = len(rows_of[slot]), rank_of[slot]
                own = rows * rank
            most_rows, most_rank = rows, rank
        batches = []
        for group in groups:
            # One slot's rows are the same in any batch of these slots, unless some of its runs went alone.
            key = tuple((slot, len(rows_of[slot])) for slot in sorted(group))
            batch = self._batches.get(key)
            if batch is None:
                chosen = {slot: rows_of[slot] for slot, _ in key}
                batch = self._batches[key] = _batch(chosen, len(rank_of))
            batches.append((batch, tuple(max(by_slot[slot] for slot in group) for by_slot in layout.ranks)))
        return Plan(tuple(long), tuple(batches))


def _batch(rows_of: Mapping[int, list[int]], slots: int) -> Batch:
    """The batch of the slots of ``rows_of``, which are ascending, with the rows of each. ``slots``: how many exist."""
    used = tuple(rows_of)
    first, last = used[0], used[-1] + 1
    if 4 * len(used) >= 3 * slots:
        # The same for every batch that uses nearly all, so that copies last.
        first, last = 0, slots
    in_place = 2 * (last - first) <= 3 * len(used)
    length = max(len(rows) for rows in rows_of.values())
    groups = tuple(range(first, last)) if in_place else used
    gather: list[int] = []
    places: list[tuple[int, int]] = []
    for slot in groups:
        rows = rows_of.get(slot, [])
        places.extend((row, len(gather) + index) for index, row in enumerate(rows))
        gather.extend(rows)
        gather.extend([rows[0] if rows else rows_of[used[0]][0]] * (length - len(rows)))
    in_order = sorted(places)
    return Batch(
        groups,
        in_place,
        length,
        _index(gather),
        None if len(places) == len(gather) and in_order == places else torch.tensor([place for _, place in in_order]),
        _index([row for row, _ in in_order]),
    )


def _index(rows: list[int]) -> Tensor | slice:
    """``rows`` as a slice where they are adjacent, else as an index."""
    whole = range(rows[0], rows[0] + len(rows))
    return slice(whole.start, whole.stop) if rows == list(whole) else torch.tensor(rows)


class Product(NamedTuple):
    """``x @ a @ b`` for some columns of y; without ``a`` the first ``rank`` columns of x, without ``b`` ``x @ a``."""

    columns: slice | None
    """None for all."""
    rank: int
    dtype: torch.dtype
    a: Tensor | None
    b: Tensor | None

    def size(self) -> int:
        """Weights, in elements."""
        return sum(part.numel() for part in (self.a, self.b) if part is not None)


class Module:
    """The slots of one LoRA module, and the products that take a batch of rows through them.

    ``a``: for each slice vLLM's [slots, 1, max rank, in]; ``b``: for each slice [slots, 1, out, max rank]. One of the
    two may be empty, for callers that want half of the sum.
    """

    def __init__(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
        self.tensors = (*a, *b)
        self.dtype = self.tensors[0].dtype
        # Such tensors do not count writes.
        self.counts = not any(tensor.is_inference() for tensor in self.tensors)
        self.stamp: object = None
        self.serial = 0
        self.rows: RowSlots | None = None
        self.runs: list[tuple[int, int, list[Product]]] = []
        self.batches: list[tuple[Batch, list[Product]]] = []
        self._a, self._b = [stack.flatten(0, -3) for stack in a], [stack.flatten(0, -3) for stack in b]
        self._slices = len(a) or len(b)
        widths = [stack.shape[1] for stack in self._b] or [0] * self._slices
        self._ends = np.cumsum([0, *widths]).tolist()
        self._width = (self._a[0].shape[2] if self._a else 0) + self._ends[-1]
        self.slots = (self._a or self._b)[0].shape[0]
        self._ranks = [[0] * self.slots for _ in range(self._slices)]
        self._long_run = LONG_RUN if self.dtype == torch.float32 else LONG_RUN_HALF
        self._layout = Layout((), 0, 0)
        self._views: dict[tuple[int, int, int, int], Product] = {}
        self._copies: dict[tuple[tuple[int, ...], tuple[int, ...], bool], list[Product]] = {}

    def read(self, slots: Iterable[int]) -> None:
        """Finds anew which ranks of ``slots`` are used."""
        chosen = sorted(slots)
        for index in range(self._slices):
            # A row of A that is zero adds nothing, so the last one that is not bounds the rank.
            stack, axis = (self._a[index], 2) if self._a else (self._b[index], 1)
            used = ((stack if len(chosen) == self.slots else stack[chosen]) != 0).any(axis).numpy()
            last = np.where(used.any(1), used.shape[1] - used[:, ::-1].argmax(1), 0)
            for slot, rank in zip(chosen, last.tolist(), strict=True):
                self._ranks[index][slot] = rank
        self._layout = Layout(tuple(tuple(ranks) for ranks in self._ranks), self._width, self._long_run)
        self._copies.clear()
        self.rows = None

    def prepare(self, rows: RowSlots) -> None:
        """Sets ``runs`` and ``batches`` for ``rows``."""
        plan = rows.plan(self._layout)
        self.runs = []
        for slot, first, last in plan.runs:
            filled = [(index, ranks[slot]) for index, ranks in enumerate(self._ranks) if ranks[slot]]
            products = [self._view(index, slot, slot + 1, rank) for index, rank in filled]
            flat = [p._replace(a=None if p.a is None else p.a[0], b=None if p.b is None else p.b[0]) for p in products]
            self.runs.append((first, last, flat))
        self.batches = [(batch, self._products(batch, ranks)) for batch, ranks in plan.batches]
        self.rows = rows

    def _products(self, batch: Batch, ranks: tuple[int, ...]) -> list[Product]:
        few = len(batch.slots) * batch.length <= FEW_ROWS
        key = (batch.slots, ranks, few)
        found = self._copies.get(key)
        if found is not None:
            return found
        filled = [index for index, rank in enumerate(ranks) if rank]
        sizes = [ranks[index] * (self._ends[index + 1] - self._ends[index]) for index in filled]
        width = self._ends[filled[-1] + 1] - self._ends[filled[0]]
        # A joint product reads all zeros beside the diagonal.
        waste = len(batch.slots) * (sum(ranks) * width - sum(sizes))
        joint = len(filled) > 1 and waste <= CALL_READ * (len(filled) - 1)
        size = len(batch.slots) * (sum(ranks) * (self._width - self._ends[-1]) + sum(sizes)) + joint * waste
        small = few and size <= COPIED and (self.dtype != torch.float32 or max(sizes) <= SMALL_B)
        if batch.in_place and not joint and not small:
            first, last = batch.slots[0], batch.slots[-1] + 1
            return [self._view(index, first, last, ranks[index]) for index in filled]
        kept = sum(product.size() for made in self._copies.values() for product in made)
        while self._copies and kept + size > COPIED:
            kept -= sum(product.size() for product in self._copies.pop(next(iter(self._copies))))
        dtype = torch.float32 if few else self.dtype
        copies = [self._copy(batch, index, ranks[index], dtype) for index in filled]
        made = self._copies[key] = [self._join(copies, filled)] if joint else copies
        return made

    def _view(self, index: int, first: int, last: int, rank: int) -> Product:
        """The product of slice ``index`` on vLLM's own tensors, slots ``first`` to ``last``."""
        key = (index, first, last, rank)
        found = self._views.get(key)
        if found is None:
            if len(self._views) > 1000:
                self._views.clear()
            a = self._a[index][first:last, :rank].transpose(1, 2) if self._a else None
            b = self._b[index][first:last, :, :rank].transpose(1, 2) if self._b else None
            found = self._views[key] = Product(self._columns(index, index, rank), rank, self.dtype, a, b)
        return found

    def _copy(self, batch: Batch, index: int, rank: int, dtype: torch.dtype) -> Product:
        """The product of slice ``index`` on copies of the slots of ``batch``."""
        first, last = batch.slots[0], batch.slots[-1] + 1
        slots = slice(first, last) if batch.in_place else list(batch.slots)
        a = self._a[index][slots, :rank].to(dtype, copy=True).transpose(1, 2) if self._a else None
        b = self._b[index][slots, :, :rank].to(dtype, copy=True).transpose(1, 2) if self._b else None
        if b is not None and rank * b.shape[2] <= SMALL_B:
            b = b.contiguous()
        return Product(self._columns(index, index, rank), rank, dtype, a, b)

    def _join(self, parts: list[Product], filled: list[int]) -> Product:
        """One product for all ``filled`` slices: their A side by side, their B on the diagonal."""
        first, last = filled[0], filled[-1]
        rank = sum(part.rank for part in parts)
        a = torch.cat([part.a for part in parts if part.a is not None], 2)
        b = a.new_zeros(a.shape[0], rank, self._ends[last + 1] - self._ends[first])
        start = 0
        for index, part in zip(filled, parts, strict=True):
            offset = self._ends[index] - self._ends[first]
            if part.b is not None:
                b[:, start : start + part.rank, offset : offset + part.b.shape[2]] = part.b
            start += part.rank
        return Product(self._columns(first, last, rank), rank, a.dtype, a, b)

    def _columns(self, first: int, last: int, rank: int) -> slice | None:
        """The columns of y that slices ``first`` to ``last`` add to."""
        if not self._b:
            return slice(0, rank)
        return None if last - first + 1 == self._slices else slice(self._ends[first], self._ends[last + 1])


def add_rows(y: Tensor, x: Tensor, module: Module, rows: RowSlots, scale: float) -> None:
    """Adds to each row of ``y`` [rows, out] the sum of its own slot of ``module`` and no other, in place.

    ``x``: [rows, in]. Raises ValueError where ``rows`` describes another number of rows.
    """
    if rows.count != x.shape[0]:
        raise ValueError(f"LoRA mapping has {rows.count} rows, the batch has {x.shape[0]}")
    if module.rows is not rows:
        module.prepare(rows)
    if not module.runs and not module.batches:
        return
    if x.dtype != module.dtype:
        x = x.to(module.dtype)
    for first, last, products in module.runs:
        part, target = x[first:last], y[first:last]
        for columns, rank, _, a, b in products:
            into = target if columns is None else target[:, columns]
            hidden = part[:, :rank] if a is None else torch.mm(part, a)
            if b is not None and y.dtype == b.dtype:
                into.addmm_(hidden, b, alpha=scale)
            else:
                into.add_(hidden if b is None else torch.mm(hidden, b), alpha=scale)
    for batch, products in module.batches:
        gather, selected = batch.gather, batch.rows
        part = x[gather] if isinstance(gather, slice) else x.index_select(0, gather)
        part = part.reshape(-1, batch.length, part.shape[1])
        for columns, rank, dtype, a, b in products:
            part = part.to(dtype)
            hidden = part[:, :, :rank] if a is None else torch.bmm(part, a)
            added = (hidden if b is None else torch.bmm(hidden, b)).flatten(0, 1).to(y.dtype)
            if batch.place is not None:
                added = added.index_select(0, batch.place)
            into = y if columns is None else y[:, columns]
            if isinstance(selected, slice):
                into[selected].add_(added, alpha=scale)
            else:
                into.index_add_(0, selected, added, alpha=scale)


class IsolatedPunicaWrapperCPU(PunicaWrapperBase):
    """vLLM's LoRA wrapper for CPU, with the sums of this module in every place that applies an adapter."""

    def __init__(
        self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: Any
    ) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        # The embedding layer adds them to its tokens even before the first mapping.
        self._embeddings_indices.zero_()
        self._tokens = self._samples = RowSlots(np.empty(0, dtype=np.int64))
        self._modules: dict[tuple[int, int], Module] = {}
        self._written: dict[int, int] = {}
        self._serial = 0
        self._told = follow_manager()

    def slot_written(self, slot: int) -> None:
        """Told by the model manager after it wrote an adapter into ``slot`` of all modules."""
        self._serial += 1
        self._written[slot] = self._serial

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        """Takes over the slot of each row of the coming batches. vLLM calls it when mapping or slots have changed."""
        slot_of = {lora_id: slot for slot, lora_id in enumerate(lora_index_to_id) if lora_id is not None}
        tokens, samples = _slots(mapping.index_mapping, slot_of), _slots(mapping.prompt_mapping, slot_of)
        self._token_lora_indices[: tokens.size].copy_(torch.from_numpy(tokens))
        self._sampler_indices[: samples.size].copy_(torch.from_numpy(samples))
        # The embedding layer looks A up for every row. Base rows get slot 0's, and nothing comes of it.
        self._embeddings_indices[: tokens.size].copy_(torch.from_numpy(tokens.clip(0) * vocab_size))
        self.indices_len[:] = [tokens.size, samples.size, samples.size, tokens.size]
        self.is_prefill = mapping.is_prefill
        self._tokens, self._samples = RowSlots(tokens), RowSlots(samples)
        self.no_lora = not self._tokens.runs

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[Tensor, ...] | None = None,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """Adds each row's own LoRA to ``y`` [rows, sum(output_slices)] in place, slice by slice (q, k, v; gate, up)."""
        if not add_inputs:
            y.zero_()
        if self._tokens.runs:
            add_rows(y, x, self._module(lora_a_stacked, lora_b_stacked), self._tokens, scale)

    def add_lora_logits(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Tensor,
        lora_b_stacked: Tensor,
        scale: float,
        *,
        buffer: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds each request's own LoRA of the output head to the logits ``y`` [rows, vocabulary] in place."""
        rows = self._samples
        if not rows.runs:
            return
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        if rows.count != x.shape[0]:
            # Prompt log-probabilities: vLLM does not say whose rows these are, and raising would end the engine.
            logger.warning_once("Prompt log-probabilities leave out the LoRA of the output head.")
            return
        # The base may pad its vocabulary differently from the adapter.
        width = lora_b_stacked.shape[-2]
        module = self._module((lora_a_stacked,), (lora_b_stacked,))
        if width <= y.shape[1]:
            add_rows(y[:, :width], x, module, rows, scale)
        else:
            added = torch.zeros(y.shape[0], width, dtype=y.dtype)
            add_rows(added, x, module, rows, scale)
            y.add_(added[:, : y.shape[1]])

    def add_lora_embedding(
        self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """Adds ``x`` [rows, max rank] through each row's own B to the embeddings ``y`` [rows, width] in place."""
        if not add_inputs:
            y.zero_()
        if self._tokens.runs:
            add_rows(y, x, self._module((), (lora_b_stacked,)), self._tokens, 1.0)

    def add_shrink(
        self,
        y: tuple[Tensor, ...] | Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        """Writes each row's x @ A.T * scale into ``y[i]`` [rows, max rank]; zero for base rows."""
        x = x.view(-1, x.shape[-1])
        for index, stack in enumerate(lora_a_stacked):
            out = y[index].view(-1, y[index].shape[-1])
            out.zero_()
            if self._tokens.runs:
                add_rows(out, x, self._module((stack,), ()), self._tokens, scale)

    def add_expand(
        self,
        y: Tensor,
        x: tuple[Tensor, ...] | Tensor,
        lora_b_stacked: tuple[Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """Adds each row's ``x[i]`` @ B.T to its slice of ``y`` [rows, width] in place; nothing for base rows."""
        y = y.view(-1, y.shape[-1])
        offset = offset_start
        for index, (stack, width) in enumerate(zip(lora_b_stacked, output_slices, strict=True)):
            part = y[:, offset : offset + width]
            if not add_inputs:
                part.zero_()
            if self._tokens.runs:
                add_rows(part, x[index], self._module((), (stack,)), self._tokens, 1.0)
            offset += width

    def apply_lora_full_linear(
        self, y: Tensor, x: Tensor, weight_stacked: Tensor, bias_stacked: Tensor, module_enabled: Tensor
    ) -> None:
        """Replaces ``y`` [rows, labels] by the row's own full classification head, where its slot has one."""
        if self._samples.count != y.shape[0]:
            raise ValueError(f"LoRA mapping has {self._samples.count} rows, the batch has {y.shape[0]}")
        for slot, first, last in self._samples.runs:
            if module_enabled[slot]:
                weight = weight_stacked[slot, 0]
                y[first:last] = (x[first:last].to(weight.dtype) @ weight.T).to(y.dtype) + bias_stacked[slot].to(y.dtype)

    def _module(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Module:
        """What is known of a module's slots, found anew where vLLM wrote into them."""
        key = (id(a[0]) if a else 0, id(b[0]) if b else 0)
        module = self._modules.get(key)
        if module is None:
            module = self._modules[key] = Module(a, b)
        stamp: object
        if module.counts:
            stamp = sum([tensor._version for tensor in module.tensors])
        else:
            stamp = self._serial if self._told else object()
        if stamp != module.stamp:
            known = module.stamp is not None
            slots = [slot for slot, serial in self._written.items() if serial > module.serial and known]
            # A write that nobody told of may be anywhere.
            module.read(slots or range(module.slots))
            module.stamp, module.serial = stamp, self._serial
        return module


def _slots(ids: Sequence[int], slot_of: Mapping[int, int]) -> np.ndarray:
    """The slot of each LoRA id as int64 [rows], -1 for ids that name no adapter. Raises KeyError for unknown ones."""
    found = np.fromiter(ids, np.int64, len(ids))
    distinct, places = np.unique(found, return_inverse=True)
    return np.array([slot_of[lora_id] if lora_id > 0 else -1 for lora_id in distinct.tolist()], np.int64)[places]


@functools.cache
def follow_manager() -> bool:
    """Makes vLLM's LoRA managers tell wrappers of written slots, and touch loaded adapters without listing all."""
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    activate, apply = LoRAModelManager.activate_adapter, LRUCacheWorkerLoRAManager._apply_adapters

    @functools.wraps(activate)
    def activate_adapter(self: LoRAModelManager, lora_id: int) -> bool:
        written = activate(self, lora_id)
        if written:
            slot = self.lora_index_to_id.index(lora_id)
            for wrapper in self.punica_wrapper_mapping.values():
                if isinstance(wrapper, IsolatedPunicaWrapperCPU):
                    wrapper.slot_written(slot)
        return written

    @functools.wraps(apply)
    def apply_adapters(self: LRUCacheWorkerLoRAManager, lora_requests: set[Any]) -> None:
        manager = self._adapter_manager
        registered, active = manager._registered_adapters, manager._active_adapters
        requests = {request.lora_int_id: request for request in lora_requests if request}
        if len(requests) > manager.lora_slots:
            # Raises.
            apply(self, lora_requests)
        missing = []
        for lora_id, request in requests.items():
            if lora_id in active and lora_id in registered and not request.load_inplace:
                registered.touch(lora_id)
                active.touch(lora_id)
            else:
                missing.append(request)
        for request in missing:
            self.add_adapter(request)

    LoRAModelManager.activate_adapter = activate_adapter
    LRUCacheWorkerLoRAManager._apply_adapters = apply_adapters
    return True


def register() -> None:
    """Makes vLLM's CPU platform use the wrapper above; elsewhere LoRA is left alone. May run repeatedly."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        platform = type(current_platform)
        platform.get_punica_wrapper = classmethod(lambda cls: WRAPPER_PATH)
