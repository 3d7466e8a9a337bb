"""Which parameters have states, and where: the buckets of an optimizer, behind its ``optimizer.state``."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..formats import Geometry
from ..rules import Rule
from ..validate import number
from .bucket import Bucket, Kind
from .checkpoint import MOST_STEPS, SavedState, decode, flatten, is_own_key, read_state, stem_of
from .watched import Entry, States


class Wanted(NamedTuple):
    """What a parameter's groups, options and overrides ask for.

    Attributes:
        param: The parameter.
        kind: Of its bucket.
        numbers: Which states of the rule stand under each number in the keys of its entry.
        initial: What its states begin with, for each, see `State.initial`; empty for zeros.
        max_unorm: Limit of the trust ratio.
        percentile: Percentile clipping.
        geometry: Which elements of a whole tensor this process has; None if all of an ordinary one.
    """

    param: Tensor
    kind: Kind
    numbers: tuple[tuple[int, ...], ...]
    initial: tuple[float | str, ...]
    max_unorm: float
    percentile: int
    geometry: Geometry | None = None


class Place(NamedTuple):
    """Where a parameter's state is."""

    bucket: Bucket
    k: int  # which of the bucket's parameters


class Structure:
    """The buckets, and what is known of the parameters in them.

    It belongs to an ``optimizer.state``: if that is replaced, the new one has a structure of its own, and the
    old one comes back with it. It is the `Listener` of its entries.

    Attributes:
        buckets: All of them.
        places: By id of the parameter, which its bucket keeps alive.
        wanted: What each parameter with a place was given it for, by id.
        links: Tensors of a mapping that replaced ``optimizer.state``: views of the arenas, and the tensors
            that are copied in before a step and out after it, so that they stay the state.
        touched: Ids of parameters whose entries a user has written to, so that the next look takes them over.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        """`names`: what some keys of an entry are called instead."""
        self.buckets: list[Bucket] = []
        self.places: dict[int, Place] = {}
        self.wanted: dict[int, Wanted] = {}
        self.links: list[tuple[Tensor, Tensor]] = []
        self.touched: set[int] = set()
        self._names = names
        self._of_entry: dict[int, Place] = {}  # by id of the entry
        self._states: Any = lambda: None

    def new_states(self, entries: Mapping[Any, Any]) -> States:
        """The ``optimizer.state`` of this structure, with entries that parameters will be given."""
        states = States(self)
        self._states = weakref.ref(states)
        for param, entry in entries.items():
            states.keep(param, entry)
        return states

    @property
    def states(self) -> States:
        """The ``optimizer.state`` of this structure."""
        return self._states()

    # Forming buckets.

    def fits(self, wanted: Iterable[Wanted]) -> bool:
        """Whether every parameter has the place that is wanted, and every other one is idle."""
        current = set()
        for w in wanted:
            place = self.places.get(id(w.param))
            if place is None or not self._is_for(place, w):
                return False
            if place.k in place.bucket.idle:
                return False
            current.add(id(w.param))
        return all(
            key in current
            or (
                place.k in place.bucket.idle
                and not self._changed(place)
                and place.bucket.params[place.k] in self.states
            )
            for key, place in self.places.items()
        )

    def _is_for(self, place: Place, w: Wanted) -> bool:
        return (
            place.bucket.kind == w.kind
            and not self._moved(place)
            and self.wanted[id(w.param)].geometry == w.geometry
        )

    @staticmethod
    def _moved(place: Place) -> bool:
        bucket, k = place
        return bucket.params[k].shape != bucket.shapes[k]

    @staticmethod
    def _changed(place: Place) -> bool:
        """Whether a parameter is no longer for its bucket."""
        param, kind = place.bucket.params[place.k], place.bucket.kind
        return Structure._moved(place) or param.dtype != kind.dtype or param.device != kind.device

    def form(self, wanted: Sequence[Wanted], link: bool = False) -> None:
        """Give every parameter its place; states are kept, and converted where they must be.

        Args:
            wanted: What is wanted of all parameters that a step may update. The others that have a place keep
                it while ``optimizer.state`` has them, and are idle.
            link: Whether entries that are given stay the state.
        """
        by_id = {id(w.param): w for w in wanted}
        outdated = {
            place.bucket
            for key, place in self.places.items()
            if (key in by_id and not self._is_for(place, by_id[key]))
            or (
                key not in by_id and (self._changed(place) or place.bucket.params[place.k] not in self.states)
            )
        }
        saved = self._take_out(outdated, by_id)
        new = [w for key, w in by_id.items() if key not in self.places]
        new += [self.wanted[key] for key in saved if key not in by_id]  # idle ones that lost their bucket
        by_kind: dict[Kind, list[Wanted]] = defaultdict(list)
        for w in new:
            by_kind[w.kind].append(w)
        for kind, members in by_kind.items():
            geometry = [w.geometry for w in members if w.geometry is not None]
            bucket = Bucket(
                kind, [w.param for w in members], members[0].numbers, self, self._names, geometry or None
            )
            self.buckets.append(bucket)
            for k, w in enumerate(members):
                self._settle(Place(bucket, k), w, saved.get(id(w.param)), link)
        self.wanted.update(by_id)
        for bucket in self.buckets:
            bucket.idle = frozenset(k for k, param in enumerate(bucket.params) if id(param) not in by_id)
        self.touched.clear()

    def _take_out(self, outdated: set[Bucket], by_id: dict[int, Wanted]) -> dict[int, SavedState | None]:
        """Remove buckets; returns the states of their parameters that go on, None where one begins anew."""
        saved: dict[int, SavedState | None] = {}
        for bucket in outdated:
            for k, param in enumerate(bucket.params):
                key = id(param)
                self._of_entry.pop(id(bucket.entries[k]), None)
                changed = self._changed(self.places.pop(key))
                if changed and key not in by_id:
                    # Its state has no place until a group has it again.
                    bucket.entries[k].detach()
                    self.wanted.pop(key)
                    if param.shape != bucket.shapes[k]:
                        self.states.pop(param, None)
                elif key in by_id or param in self.states:
                    rule = by_id[key].kind.op.rule if key in by_id else bucket.op.rule
                    fits = param in self.states and not self._moved(Place(bucket, k))
                    saved[key] = (
                        _carried(bucket.saved(k), bucket.op.rule, rule, bucket.local[k]) if fits else None
                    )
                else:
                    self.wanted.pop(key, None)
        self.buckets = [bucket for bucket in self.buckets if bucket not in outdated]
        return saved

    def _settle(self, place: Place, w: Wanted, saved: SavedState | None, link: bool) -> None:
        """Fill a new place, and show it in ``optimizer.state``."""
        bucket, k = place
        given = self.states.get(w.param)
        if given and not self._is_own(given):
            read = self._read(place, given)
            bucket.write(k, read)
            if link:
                self._link(place, read, given)
        elif saved is not None:
            bucket.write(k, saved)
        elif any(w.initial):
            bucket.begin(k, w.initial)
        self.places[id(w.param)] = place
        self.wanted[id(w.param)] = w
        self._show(place, given)

    def _is_own(self, entry: Any) -> bool:
        """Whether an entry shows the arenas, or showed those that its values have been saved from."""
        return isinstance(entry, Entry) and entry.listener is self and not entry.replaced

    def _show(self, place: Place, given: Any) -> None:
        """Make an entry the views of its place; what a user has put beside them stays."""
        bucket, k = place
        current = self.states.get(bucket.params[k])
        if isinstance(current, Entry) and current.listener is self:
            bucket.entries[k] = current
        entry = bucket.entries[k]
        self._of_entry[id(entry)] = place
        entry.keep(bucket.views(k), {key: x for key, x in (given or {}).items() if not is_own_key(key)})
        self.states.keep(bucket.params[k], entry)

    def _link(self, place: Place, read: SavedState, given: Mapping[str, Any]) -> None:
        for key, view in place.bucket.views(place.k).items():
            tensor = flatten(given).get(key)
            if not isinstance(tensor, Tensor) or tensor.shape != view.shape or key.startswith("qmap"):
                continue
            if key == "step" or tensor.dtype == view.dtype:
                self.links.append((view, tensor))

    def _read(self, place: Place, state: Any, key: Any = "assigned", check: bool = True) -> SavedState:
        bucket, k = place
        return read_state(
            bucket.op.rule, bucket.numbers, key, bucket.local[k], self.renamed(state), check=check
        )

    def renamed(self, state: Any) -> Any:
        """An entry with bitsandbytes' usual keys."""
        if not self._names or not isinstance(state, Mapping):
            return state
        usual = {theirs: key for key, theirs in self._names.items()}
        renamed = {usual.get(key, key): value for key, value in state.items()}
        return {"step": 1, **renamed} if renamed else renamed  # with such names bitsandbytes does not count

    def load(self, param: Tensor, saved: SavedState | None) -> None:
        """Give a parameter a saved state, in place; None to begin anew.

        Args:
            param: The parameter; if it has no place yet, the state waits in ``optimizer.state``.
            saved: Its state, of tensors that are not views of the arenas.
        """
        place = self.places.get(id(param))
        if place is None:
            if saved is not None:
                self.states.keep(param, {**saved.entry, "step": saved.step})
                self.touched.add(id(param))
            return
        self.begin(place)
        if saved is not None:
            place.bucket.write(place.k, saved)
        self._show(place, {} if saved is None else saved.entry)

    def begin(self, place: Place) -> None:
        """Give a parameter the states of one that has taken no step."""
        place.bucket.begin(place.k, self.wanted[id(place.bucket.params[place.k])].initial)

    def take_over(self, current: Container[int]) -> bool:
        """Bring what users have written to entries into the arenas, where that has not been done at once.

        Args:
            current: Ids of the parameters that are in a group now.

        Returns:
            bool: Whether that was all; False if a parameter that is in no group has lost its state, so that
                it
            must lose its place too.

        Raises:
            ValueError: If an entry does not fit to its parameter.
        """
        for key in list(self.touched):
            place = self.places.get(key)
            if place is not None:
                param = place.bucket.params[place.k]
                if key not in current and param not in self.states:
                    continue
                given = self.states.get(param)
                if given and not self._is_own(given):
                    place.bucket.write(place.k, self._read(place, given))
                self._show(place, given)
            self.touched.discard(key)
        return not self.touched

    # As the listener of entries.

    def entry_written(self, entry: Entry, key: str, value: Any) -> bool:
        """See `Listener`."""
        place = self._of_entry.get(id(entry))
        if place is None:
            return False
        bucket, k = place
        if value is None and key not in entry:  # it was removed
            if not entry:
                self.begin(place)
            else:
                entry.replaced = True
            self.touched.add(id(bucket.params[k]))
            return True
        view = bucket.views(k).get(key)
        if view is None:
            if is_own_key(key):
                # Of another format: it stands for the state until it is taken over, and is not shown then.
                number = key[len(stem_of(key)) :]
                for other in [k for k in entry if is_own_key(k) and k[len(stem_of(k)) :] == number]:
                    if number:
                        dict.__delitem__(entry, other)
                entry.replaced = True
                self.touched.add(id(bucket.params[k]))
            return False
        if not entry.replaced and self._copied(place, key, view, value):
            return True
        entry.replaced = True
        self.touched.add(id(bucket.params[k]))
        return False

    def _copied(self, place: Place, key: str, view: Tensor, value: Any) -> bool:
        """Whether a value fits into a view, and has been copied."""
        bucket, k = place
        if key == "step":
            steps = number("step", value)
            if not 0 <= steps <= MOST_STEPS:
                raise ValueError(f"Invalid step: {steps}, must be in [0, {MOST_STEPS}]")
            view.fill_(int(steps))
            return True
        if not isinstance(value, Tensor) or value.shape != view.shape:
            return False
        if key.startswith("qmap"):
            return bool((value.to(view) == view).all())
        if value.dtype == view.dtype:
            view.copy_(value)
            return True
        if value.is_floating_point() and key.startswith("state"):
            bucket.write(k, self._read(place, {**bucket.saved(k).entry, "step": bucket.step[k], key: value}))
            return True
        return False

    def state_assigned(self, param: Tensor, state: Any) -> Any:
        """See `Listener`."""
        place = self.places.get(id(param))
        if place is None:
            self.touched.add(id(param))
            return state
        bucket, k = place
        if state is bucket.entries[k]:
            return state
        read = self._read(place, state) if state else None
        self._release(place)
        if read is None:
            self.begin(place)
            self.touched.add(id(param))
            return state
        bucket.write(k, read)
        bucket.entries[k] = Entry(self)
        self._show(place, dict(state))
        return bucket.entries[k]

    def state_removed(self, param: Tensor) -> None:
        """See `Listener`."""
        place = self.places.get(id(param))
        if place is not None:
            self._release(place)
            self.begin(place)
        self.touched.add(id(param))

    def _release(self, place: Place) -> None:
        """The entry that a user may hold keeps its values; the place gets another one."""
        bucket, k = place
        self._of_entry.pop(id(bucket.entries[k]), None)
        bucket.entries[k].detach()
        bucket.entries[k] = Entry(self)
        self._of_entry[id(bucket.entries[k])] = place


def _carried(saved: SavedState, old: Rule, new: Rule, param: Tensor) -> SavedState | None:
    """A state for another rule: states of the same names go on; None if there is none."""
    if old is new:
        return saved
    names = {state.name: k for k, state in enumerate(old.states)}
    if not any(state.name in names for state in new.states):
        return None
    entry: dict[str, Any] = {}
    for k, state in enumerate(new.states):
        if state.name in names:
            values = decode(saved.entry, names[state.name], param.numel(), old.states)
        else:
            values = param.new_zeros(param.numel()).float()
        entry[f"state{k + 1}"] = values.view(param.shape)
    return saved._replace(entry=entry, states=new.states)
