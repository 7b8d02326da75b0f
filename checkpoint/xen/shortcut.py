# SPDX-License-Identifier: Apache-2.0
"""A standstill of which the ordinary course is native code.

Nearly all checkpoints of a guest have the same course: it is at a point from which it can go on,
backends have answered, it has the event channels and grants that it had, the log is not cleaned.
In a slow Dom0 Python takes longer for that than all that is done there.  So
``checkpoint/_standstill.h`` does it, step by step; a step in which it meets anything else is left
to :class:`Standstill`, which begins it anew.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from functools import lru_cache
from importlib.resources import files
from typing import Any, Final

from checkpoint import native
from checkpoint.driver import Staging
from checkpoint.errors import HypervisorError
from checkpoint.xen.dirty import MARK_FRAME
from checkpoint.xen.libs import ffi, libraries
from checkpoint.xen.mapping import GrantFrames
from checkpoint.xen.rings import Kind, Ring
from checkpoint.xen.standstill import Standstill
from checkpoint.xen.state import MachineState

#: What the functions return, besides 0 (``standstill.h``).
_TOO_MUCH: Final = 2
_UNUSUAL: Final = (1 << 64) - 1


@lru_cache(maxsize=1)
def _load() -> Any:
    """The native steps."""
    from checkpoint import _native

    ffi.cdef(files(__package__).joinpath("standstill.h").read_text())
    return ffi.dlopen(_native.__file__)


def implementation() -> type[Standstill]:
    """What is there of it; takes a while the first time."""
    if native.BACKEND != "native":
        return Standstill
    _load()
    return ShortStandstill


class ShortStandstill(Standstill):
    """See the module's text; for parameters and errors see the class that it is one of."""

    _core: Any
    _plan: Any
    #: whether the plan is of the guest as it is
    _valid = False
    #: which parts of this standstill's course were ordinary, so that the plan has what was learned
    _rests = _copied = False

    # ---- Section: while the guest runs ----

    def _map_grants(self, grants: GrantFrames) -> None:
        super()._map_grants(grants)
        self._valid = False

    def prepare(
        self, shared: Sequence[int], shared_rings: Sequence[Ring], holes: Collection[int]
    ) -> None:
        super().prepare(shared, shared_rings, holes)
        self._rings = shared_rings
        self._valid = False

    def get_ready(self) -> None:
        if not self._valid:
            self._write_plan()

    def _write_plan(self) -> None:
        self._core, self._plan = _load(), ffi.new("struct standstill *")
        #: what the plan points to
        self._pointed: list[object] = []
        self._staging: Staging | None = None
        self._point_to_xen()
        self._point_to_guest()
        self._valid = True

    def _point_to_xen(self) -> None:
        plan, libs, moment, going = self._plan, libraries(), self._moment, self._resumption
        plan.multicall = ffi.cast("multicall", libs.pointer(libs.call, "xencall2"))
        plan.log_control = ffi.cast("log_control", libs.pointer(libs.xc, "xc_logdirty_control"))
        plan.multicall_handle, plan.log_handle = libs.callh, libs.xch
        for trip, made, entries in ((plan.stop, moment, moment.count), (plan.go, going, 2)):
            trip.buffer = ffi.cast("uint8_t *", made.address)
            trip.request = self._at(made.request, "const uint8_t *")
            trip.bytes, trip.entries = len(made.request), entries
        plan.used_at, plan.context_at = moment.size_at, moment.context_at
        plan.answers_at = moment.answers.start
        self._set(plan.answers, array("Q", moment.known))
        plan.domid, plan.log_buffer = self._domid, self._log.buffer
        plan.bitmap = self._at(self._log.bitmap, "uint8_t *")
        plan.mark = MARK_FRAME

    def _point_to_guest(self) -> None:
        plan, rest = self._plan, self._rest
        plan.ram, plan.pages = self._at(self._ram, "const uint8_t *"), self._pages
        plan.context_size = rest.context_size
        self._set(plan.pointers_at, array("Q", rest.pointers_at))
        self._set(plan.clock_code, array("Q", rest.clock_code))
        self._set(plan.rereads, array("Q", rest.rereads))
        self._set(plan.conditions, rest.conditions)
        awaited = [ring.gfn for ring in self._rings if ring.kind is not Kind.RECEIVE]
        self._set(plan.awaited, array("Q", awaited))
        self._outside_copy = self._set_copied(plan.outside, self._outside.view)
        self._entries_copy = self._set_copied(plan.grants, self._grants.view)
        plan.granted = self._at(self._granted, "uint64_t *")
        self._set(plan.shared, self._shared)
        self._set(plan.receiving, array("Q", (place for place, _page in self._receiving)))
        self._set(plan.absent, self._absent)
        self._set(plan.left_out, self._left_out)

    def _at(self, memory: Any, pointer: str) -> Any:
        """Where ``memory`` is, which stays there as long as the plan points to it."""
        # Not exported for as long: what is mapped must be released before it is unmapped.
        self._pointed.append(memory)
        with ffi.from_buffer(memory) as raw:
            return ffi.cast(pointer, raw)

    def _set(self, words: Any, numbers: array[int]) -> None:
        words.at, words.count = self._at(numbers, "const uint64_t *"), len(numbers)

    def _set_copied(self, copied: Any, view: memoryview) -> bytearray:
        """Room for a copy of ``view``."""
        room = bytearray(len(view))
        copied.of, copied.to = self._at(view, "const uint8_t *"), self._at(room, "uint8_t *")
        copied.bytes = len(view)
        return room

    # ---- Section: while it stands still ----

    def stop(self, *, pause: bool) -> None:
        self._rests = self._copied = False
        result = self._core.kemari_stop(self._plan, pause)
        if result < 0:
            raise HypervisorError("multicall", -result)
        if result and pause:
            self._moment.check_paused()
        self._rests = result == 0

    def judge(self) -> None:
        if not self._rests:
            super().judge()
            self._valid = self._plan.context_size == self._rest.context_size

    def await_backends(self) -> None:
        if not self._rests:
            super().await_backends()

    def copy_shared(self, staging: Staging) -> None:
        if self._staging is not staging:
            self._staging = staging
            self._plan.gfns = self._at(staging.gfns, "uint64_t *")
            self._plan.data = self._at(staging.data, "uint8_t *")
            self._plan.capacity = staging.capacity
        if self._core.kemari_copy_shared(self._plan) == 0:
            staging.count, self._under_grants = len(self._shared), self._plan.under_grants
            self._copied = True
            return
        self._take_over_judged()  # the buffer that it is in may be given up
        super().copy_shared(staging)
        self._valid = False

    def read_log(self, keep: int) -> None:
        if keep <= 0 or not self._log.ours:
            super().read_log(keep)
            return
        result = self._core.kemari_read_log(self._plan, keep)
        if result == _TOO_MUCH:
            self._log.clean()
        elif result:
            super().read_log(keep)
        self._log_was_read = True

    def copy_dirty(self, staging: Staging) -> None:
        if self._copied and self._carried is None:
            count = self._core.kemari_copy_dirty(self._plan, staging.count)
            if count != _UNUSUAL:
                staging.count = count
                return
        super().copy_dirty(staging)

    def let_go(self) -> None:
        result = self._core.kemari_let_go(self._plan)
        if result < 0:
            raise HypervisorError("multicall", -result)
        if result:
            self._resumption.check_unpaused()

    # ---- Section: afterwards ----

    def state(self, params: dict[int, int], store: dict[str, str]) -> MachineState:
        self._take_over_judged()
        if self._copied:
            self._events = self._moment.events
            self._entries = bytes(self._entries_copy)
        return super().state(params, store)

    def _take_over_judged(self) -> None:
        if self._rests:
            self._rests = False
            self._context = self._moment.context()
            self._copies = self._split(bytes(self._outside_copy))
