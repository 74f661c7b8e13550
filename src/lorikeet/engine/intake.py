"""Which adapters come into the slab next: for whoever's turn it is, ahead of turns, and by hand. No torch."""

from __future__ import annotations

from collections.abc import Iterable

from lorikeet.engine.fairness import FairQueues
from lorikeet.engine.request import Sequence
from lorikeet.engine.residency import Place, Residency
from lorikeet.errors import AdapterError

LOOK_AHEAD = 8  # of so many slots hardly more than one is free after a step: its adapter should be there by then


class AdapterIntake:
    """Asks the slab for adapters on behalf of those that wait in `waiting`, in the order of their turns."""

    def __init__(self, residency: Residency, waiting: FairQueues, *, max_seqs: int) -> None:
        self.residency, self.waiting = residency, waiting
        self.turns_ahead = max(2, max_seqs // LOOK_AHEAD)  # for whose adapters a step looks
        self._ahead: set[str] = set()  # that were brought in before the turn of those that wait for them
        self._by_hand: list[str] = []  # to bring in for no request

    @property
    def pending(self) -> bool:
        """Something is asked for by hand for which room is still being made."""
        return bool(self._by_hand)

    # --- for those that wait --------------------------------------------------------------------------------------

    def place(self, adapter: str, stuck: bool) -> Place:
        """Where an adapter is whose turn has come: asked for now, unless it is `stuck` behind one that waits for room.

        One that is held back counts as LOADING. Raises AdapterError when the pinned ones leave no room for it.
        """
        if self.waiting.held_back(adapter):
            return Place.LOADING
        self._ahead.discard(adapter)
        place = self.residency.place(adapter)
        if place is Place.FULL and not stuck:
            if not self.residency.fits(adapter):
                raise AdapterError("adapter: the pinned ones leave no room for it")
            wanted = self.waiting.wanted()
            self._ahead &= wanted
            place = self.residency.ensure(adapter, keep=wanted - self._ahead)
            if place is Place.FULL:
                self.waiting.make_way(adapter, self.residency.size(adapter), self.residency.movable)
        if place is not Place.FULL:
            self.waiting.made_way(adapter)
        return place

    def look_ahead(self, adapter: str | None) -> bool:
        """Bring in the adapter of one whose turn has not come, in room that nobody else needs. What came so gives way
        to those whose turn it is. False where this step has no more to give."""
        if adapter is None or self.waiting.held_back(adapter) or self.residency.place(adapter) is not Place.FULL:
            return True
        if self.residency.copies_enough or not self.residency.can_hold(adapter, wanted := self.waiting.wanted()):
            return False
        self._ahead.add(adapter)
        return self.residency.ensure(adapter, wanted) is not Place.FULL

    def in_the_way(self, running: Iterable[Sequence]) -> list[Sequence]:
        """Those that use the adapters that are to make way for another one."""
        return [one for one in running if one.adapter and self.waiting.held_back(one.adapter)]

    # --- by hand --------------------------------------------------------------------------------------------------

    def bring_in(self, adapter: str) -> bool:
        """Have a known adapter brought in though no request waits for it; False where those that are in use or wanted
        leave no room for it."""
        wanted = self.waiting.wanted()
        if not self.residency.can_hold(adapter, wanted):
            return False
        if self.residency.ensure(adapter, wanted) is Place.FULL and adapter not in self._by_hand:
            self._by_hand.append(adapter)  # room is being made
        return True

    def go_on(self) -> None:
        """Ask again for what is asked for by hand."""
        wanted = self.waiting.wanted()
        self._by_hand = [one for one in self._by_hand if self.residency.ensure(one, wanted) is Place.FULL]

    def unload(self, adapter: str) -> None:
        """Take an adapter out of the slab. Raises AdapterInUseError."""
        self.residency.unload(adapter)
        self._forget(adapter)

    def failed(self, adapter: str) -> None:
        """The runner could not read it."""
        self.residency.failed(adapter)
        self._forget(adapter)

    def _forget(self, adapter: str) -> None:
        self._by_hand = [one for one in self._by_hand if one != adapter]
