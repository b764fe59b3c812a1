"""Which passages, how many together, and which questions: one passage an adapter first, then several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from hypernet.adaptation.questions import Asked


@dataclass(frozen=True)
class Group:
    """Passages whose adapters are joined, and the questions put to the joined one, each with its passage's place."""

    passages: tuple[Asked, ...]
    questions: tuple[tuple[int, int], ...]


class GroupSampler:
    """Draws groups in an order that depends on the seed and the position alone, so a resumed run sees the same ones.

    Each epoch goes through all passages in a new order. Where several are joined, the following ones of the same
    document come along, or else random others.
    """

    def __init__(self, passages: Sequence[Asked], seed: int, questions: int) -> None:
        """`questions`: how many are asked of a group at most."""
        self._passages = list(passages)
        self._seed, self._questions = seed, questions
        self.epoch, self.at = 0, 0
        self._order = self._shuffled()

    def _shuffled(self) -> list[int]:
        order = list(range(len(self._passages)))
        Random(f"{self._seed}-order-{self.epoch}").shuffle(order)
        return order

    @property
    def position(self) -> dict[str, int]:
        """Where the sampler stands."""
        return {"epoch": self.epoch, "at": self.at}

    def seek(self, position: dict[str, int]) -> None:
        """Go on from where `position` was read."""
        self.epoch, self.at = position["epoch"], position["at"]
        self._order = self._shuffled()

    def chunks(self, progress: float, single_share: float, most: int) -> int:
        """Passages of the next groups; `progress` from 0 to 1. Half of the later ones keep to one."""
        rng = Random(f"{self._seed}-chunks-{self.epoch}-{self.at}")
        if progress < single_share or most < 2 or rng.random() < 0.5:
            return 1
        return rng.randint(2, most)

    def draw(self, count: int, chunks: int) -> list[Group]:
        """The next `count` groups of `chunks` passages each."""
        return [self._next(chunks) for _ in range(count)]

    def _next(self, chunks: int) -> Group:
        rng = Random(f"{self._seed}-{self.epoch}-{self.at}")
        first = self._order[self.at]
        numbers = [first]
        document = self._passages[first].passage.document
        while len(numbers) < chunks:
            after = numbers[-1] + 1
            if after < len(self._passages) and self._passages[after].passage.document == document:
                numbers.append(after)
            else:
                others = [i for i in range(len(self._passages)) if i not in numbers]
                numbers.append(rng.choice(others or numbers))
                document = self._passages[numbers[-1]].passage.document
        chosen = tuple(self._passages[number] for number in numbers)
        every = [(place, i) for place, asked in enumerate(chosen) for i in range(len(asked.questions))]
        self.at += 1
        if self.at == len(self._order):
            self.epoch, self.at = self.epoch + 1, 0
            self._order = self._shuffled()
        return Group(chosen, tuple(rng.sample(every, min(len(every), self._questions))))
