# cython: annotation_typing=False
"""syscalls.py for a C compiler, and the Writer."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport errno as c_errno

import os

cdef extern from "sys/socket.h":
    int MSG_DONTWAIT
    ssize_t recv(int, void *, size_t, int)

cdef extern from *:
    """
    #include <errno.h>
    #include <linux/futex.h>
    #include <pthread.h>
    #include <sched.h>
    #include <signal.h>
    #include <stdint.h>
    #include <stdlib.h>
    #include <sys/syscall.h>
    #include <time.h>
    #include <unistd.h>

    #ifndef SYS_io_uring_enter
    #define SYS_io_uring_enter 426
    #endif

    struct healfs_write {
        int fd;
        void *address;          /* NULL: fdatasync */
        size_t length;
        off_t offset;
        long long result;
    };

    /* A ring of writes with one producer, the event loop, and one consumer, the thread. Positions
       only grow; a position modulo `entries` is the place. */
    struct healfs_writer {
        struct healfs_write *writes;
        uint32_t entries;       /* a power of two */
        uint32_t pushed;        /* the loop's own */
        uint32_t taken;         /* the loop's own: results up to here were taken */
        uint32_t tail;          /* what the thread may do */
        uint32_t done;          /* what it has done */
        uint32_t asleep;        /* the futex that it sleeps on */
        uint32_t told;          /* `event` was written, and not read since */
        uint32_t attended;      /* nobody needs to be told */
        int cancelled, ended, event;
        pthread_t thread;
    };

    #define HEALFS_SPIN 50000   /* ns */
    #define HEALFS_LOAD(x) __atomic_load_n(&(x), __ATOMIC_SEQ_CST)
    #define HEALFS_STORE(x, value) __atomic_store_n(&(x), (value), __ATOMIC_SEQ_CST)
    #define HEALFS_SWAP(x, value) __atomic_exchange_n(&(x), (value), __ATOMIC_SEQ_CST)

    static long long healfs_nanoseconds(void)
    {
        struct timespec now;

        clock_gettime(CLOCK_MONOTONIC, &now);
        return now.tv_sec * 1000000000LL + now.tv_nsec;
    }

    /* Who is woken misses some 50 us: so it looks for as long before it sleeps, and lets others
       have the processor meanwhile. */
    static void healfs_wait(struct healfs_writer *w, uint32_t done)
    {
        long long until = healfs_nanoseconds() + HEALFS_SPIN;

        while (HEALFS_LOAD(w->tail) == done && !HEALFS_LOAD(w->ended)) {
            if (healfs_nanoseconds() < until) {
                sched_yield();
                continue;
            }
            HEALFS_STORE(w->asleep, 1);
            if (HEALFS_LOAD(w->tail) == done && !HEALFS_LOAD(w->ended))
                syscall(SYS_futex, &w->asleep, FUTEX_WAIT_PRIVATE, 1, NULL, NULL, 0);
            HEALFS_STORE(w->asleep, 0);
        }
    }

    static void healfs_tell(struct healfs_writer *w)
    {
        const uint64_t one = 1;

        if (!HEALFS_SWAP(w->told, 1) && write(w->event, &one, sizeof one) < 0)
            abort(); /* an eventfd takes it */
    }

    static void *healfs_write_all(void *argument)
    {
        struct healfs_writer *w = argument;
        uint32_t done = 0, tail;

        for (;;) {
            healfs_wait(w, done);
            tail = HEALFS_LOAD(w->tail);
            if (tail == done)
                return NULL; /* ended */
            while (done != tail) {
                struct healfs_write *at = &w->writes[done & (w->entries - 1)];
                ssize_t count = -1;

                if (HEALFS_LOAD(w->cancelled))
                    errno = ECANCELED;
                else if (at->address)
                    count = pwrite(at->fd, at->address, at->length, at->offset);
                else
                    count = fdatasync(at->fd);
                at->result = count < 0 ? -errno : count;
                HEALFS_STORE(w->done, ++done);
                if (!HEALFS_LOAD(w->attended))
                    healfs_tell(w);
            }
        }
    }

    static void healfs_wake(struct healfs_writer *w)
    {
        if (HEALFS_SWAP(w->asleep, 0))
            syscall(SYS_futex, &w->asleep, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
    }

    static void healfs_free(struct healfs_writer *w)
    {
        if (w)
            free(w->writes);
        free(w);
    }

    /* NULL: see errno. */
    static struct healfs_writer *healfs_start(uint32_t entries, int event)
    {
        struct healfs_writer *w = calloc(1, sizeof *w);
        sigset_t all, before;

        if (w && (w->writes = calloc(entries, sizeof *w->writes))) {
            w->entries = entries;
            w->event = event;
            sigfillset(&all); /* signals are for the loop's thread */
            pthread_sigmask(SIG_SETMASK, &all, &before);
            errno = pthread_create(&w->thread, NULL, healfs_write_all, w);
            pthread_sigmask(SIG_SETMASK, &before, NULL);
            if (!errno)
                return w;
        }
        healfs_free(w);
        return NULL;
    }

    static void healfs_push(
        struct healfs_writer *w, int fd, void *address, size_t length, off_t offset)
    {
        w->writes[w->pushed++ & (w->entries - 1)] =
            (struct healfs_write){ fd, address, length, offset, 0 };
    }

    static void healfs_submit(struct healfs_writer *w)
    {
        HEALFS_STORE(w->tail, w->pushed);
        healfs_wake(w);
    }

    /* How many results there are to take. The thread first counts, then tells: so what is done
       after `told` was cleared is told of again. */
    static uint32_t healfs_ready(struct healfs_writer *w)
    {
        uint64_t count;

        if (HEALFS_LOAD(w->told) && read(w->event, &count, sizeof count) > 0)
            HEALFS_STORE(w->told, 0); /* else it is about to be written */
        return HEALFS_LOAD(w->done) - w->taken;
    }

    /* The thread first counts, then looks whether it has to tell; here it is the other way round. So
       what is done meanwhile is told of by one of both. */
    static void healfs_attend(struct healfs_writer *w, uint32_t attended)
    {
        HEALFS_STORE(w->attended, attended);
        if (!attended && HEALFS_LOAD(w->done) != w->taken)
            healfs_tell(w);
    }

    static long long healfs_take(struct healfs_writer *w)
    {
        return w->writes[w->taken++ & (w->entries - 1)].result;
    }

    static void healfs_cancel(struct healfs_writer *w)
    {
        HEALFS_STORE(w->cancelled, 1);
    }

    static void healfs_end(struct healfs_writer *w)
    {
        HEALFS_STORE(w->ended, 1);
        healfs_wake(w);
        pthread_join(w->thread, NULL);
        healfs_free(w);
    }
    """
    healfs_writer *healfs_start(unsigned int, int)
    void healfs_push(healfs_writer *, int, void *, size_t, long long)
    void healfs_submit(healfs_writer *)
    unsigned int healfs_ready(healfs_writer *)
    void healfs_attend(healfs_writer *, unsigned int)
    long long healfs_take(healfs_writer *)
    void healfs_cancel(healfs_writer *)
    void healfs_end(healfs_writer *) nogil
    long syscall(long, ...)
    long SYS_io_uring_enter


cpdef unsigned long long address_of(object data) except? 0:
    cdef Py_buffer buffer
    PyObject_GetBuffer(data, &buffer, PyBUF_SIMPLE)
    cdef unsigned long long address = 0 if buffer.readonly else <unsigned long long>buffer.buf
    PyBuffer_Release(&buffer)
    return address


cpdef long long enter(long long fd, long long submissions):
    cdef long taken = syscall(SYS_io_uring_enter, <int>fd, <unsigned int>submissions, 0, 0, NULL, 0)
    return taken if taken >= 0 else -c_errno


cpdef long long receive(
    long long fd, object memory, long long at, long long room
) except? -1000000:
    cdef Py_buffer buffer
    cdef ssize_t count = 0
    cdef int error = 0
    PyObject_GetBuffer(memory, &buffer, PyBUF_WRITABLE)
    if at < 0 or at > buffer.len:
        room = -1
    elif room > buffer.len - at:
        room = buffer.len - at
    if room >= 0:
        count = recv(<int>fd, <char *>buffer.buf + at, room, MSG_DONTWAIT)
        error = c_errno
    PyBuffer_Release(&buffer)
    if room < 0:
        raise ValueError("outside the memory")
    return count if count >= 0 else -error


cdef class Writer:
    def __init__(self, entries):
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._writer = healfs_start(entries, self.fd)
        if self._writer == NULL:
            error = c_errno
            os.close(self.fd)
            raise OSError(error, os.strerror(error))

    cpdef object push(
        self, long long fd, unsigned long long address, long long length, long long offset
    ):
        healfs_push(self._writer, <int>fd, <void *>address, length, offset)

    cpdef object submit(self):
        healfs_submit(self._writer)

    cpdef long long ready(self):
        return healfs_ready(self._writer)

    cpdef object attend(self, bint attended):
        if self._writer != NULL:
            healfs_attend(self._writer, attended)

    cpdef long long take(self):
        return healfs_take(self._writer)

    cpdef object cancel(self):
        healfs_cancel(self._writer)

    cpdef object close(self):
        cdef healfs_writer *writer = self._writer
        if writer == NULL:
            return
        self._writer = NULL
        with nogil:
            healfs_end(writer)
        os.close(self.fd)


def start_writer(entries):
    return Writer(entries)
