cdef class Queues:
    cdef public dict in_flight
    cdef public dict covered
    cdef public object parked
    cdef public dict waiting
    cdef public object no_room
    cdef public dict flushes
    cdef public dict undecided
    cdef public object retries
