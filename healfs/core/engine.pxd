cimport cython

from healfs.core.order cimport Order
from healfs.core.queues cimport Queues
from healfs.core.request cimport Request
from healfs.core.totals cimport Totals
from healfs.core.writelog cimport WriteLog


cdef long long _LOOK_EACH, _LARGE


cdef class Engine:
    cdef public object effects
    cdef object _send_to
    cdef object _done
    cdef public object policy
    cdef public object clock
    cdef public WriteLog log
    cdef public dict frontend
    cdef public double settle
    cdef public bint fence
    cdef public object ambiguous
    cdef public double slow_after
    cdef double _silence
    cdef public object limits
    cdef public object state
    cdef public double since
    cdef public object reason
    cdef public long long size
    cdef public long long align
    cdef public bint can_flush
    cdef long long _order
    cdef object _retries
    cdef public Queues _queues
    cdef public Order _writes
    cdef dict _overlays
    cdef public object _unsettled
    cdef object _fencing
    cdef object _fence_at
    cdef bint _probing
    cdef object _probe_covers
    cdef bint _probe_is_stale
    cdef public object _replay
    cdef public bint _replaying
    cdef bint _was_replaying
    cdef object _replay_at
    cdef double _replay_pause
    cdef public Request _flush
    cdef set _beside
    cdef list _pinned
    cdef object _accept
    cdef bint _drop
    cdef object _acceptor
    cdef object _pause_reason
    cdef public dict _recovered
    cdef public bint link_up
    cdef bint _ever_connected
    cdef object _mismatch
    cdef public object paused_by
    cdef long long _paused_errno
    cdef dict _told
    cdef bint _draining
    cdef double _last_answer
    cdef double _probe_at
    cdef object _alarm
    cdef public object _prober
    cdef public object _outage
    cdef public Totals totals

    cpdef object submit(self, Request request)
    @cython.locals(queues=Queues)
    cdef object _submit(self, Request request)
    @cython.locals(queues=Queues, replaying="bint")
    cpdef object completed(self, Request request, long long errno, object data=*)
    cdef object _wait(self, Request request)
    cdef object _park(self, Request request)
    cdef object _send(self, Request request, double now)
    cdef object _send_flush(self, Request request, double now)
    cdef bint _read_suspects(self, Request request)
    cdef object _flush_log(self)
    cdef object _send_parked(self)
    cdef object _completed_well(self, Request request, long long errno, object data)
    cdef object _answer(self, Request request, long long errno, object data)
    @cython.locals(done=list, waiter=Request)
    cdef object _retire(self, Request request)
    cdef bint _unblocked(self, Request request)
    cdef object _complete_beside_suspects(self, Request request)
    cdef object _wake_at(self, double when)
