/* Many clients' userfaultfds at once: what faults.py has a lane do for one.
 *
 * For: Faults.bring_many. An errand is one client's: calls of ioctl_userfaultfd(2) in order, up to
 * the first that fails. Each thread that comes here takes errands from a common counter until there
 * are no more; one that hangs, for a client hangs with its mmap_lock held, leaves the rest to others.
 *
 * Promises: an errand is PENDING until it has been done, and its calls are made by one thread. Waits
 * without the interpreter's lock. Leaves out: threads, and how long to wait for them.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#ifdef __x86_64__

#include <errno.h>
#include <linux/userfaultfd.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <time.h>

#define PENDING -4
#define TRIES 20
#define PAUSE 200000 /* nanoseconds; an address space that is just changing is left alone for so long */

struct errand {
	_Atomic int32_t status; /* PENDING, 0, or the errno of the call that failed */
	uint32_t first, count;	/* its calls */
	uint32_t failed;	/* which of all calls */
};

enum kind { REGISTER = 1, PROTECT = 2, UNREGISTER = 3 };

struct errand_call {
	int32_t fd;
	uint32_t kind;
	uint64_t start, size;
	uint64_t mode; /* of REGISTER; of UNREGISTER, whether to wake who waits there */
};

/* (Un)registering says ENOMEM of an address space that has ended; protecting nothing tells. */
static bool has_ended(int fd)
{
	struct uffdio_writeprotect nothing = {.range = {1 << 16, 4096}};

	return ioctl(fd, UFFDIO_WRITEPROTECT, &nothing) && errno == ESRCH;
}

static int once(const struct errand_call *call)
{
	struct uffdio_range range = {call->start, call->size};
	struct uffdio_register registration = {.range = range, .mode = call->mode};
	struct uffdio_writeprotect protection = {.range = range, .mode = UFFDIO_WRITEPROTECT_MODE_WP};
	int failed;

	switch (call->kind) {
	case REGISTER:
		failed = ioctl(call->fd, UFFDIO_REGISTER, &registration);
		break;
	case PROTECT:
		failed = ioctl(call->fd, UFFDIO_WRITEPROTECT, &protection);
		break;
	default: /* memory that is not watched any more is as good as watched no more */
		failed = ioctl(call->fd, UFFDIO_UNREGISTER, &range);
		if (failed && errno != ENOENT && errno != EINVAL && errno != EPERM &&
		    errno != EBUSY && errno != EEXIST)
			break;
		failed = call->mode ? ioctl(call->fd, UFFDIO_WAKE, &range) : 0;
	}
	if (failed && errno == ENOMEM)
		return has_ended(call->fd) ? ESRCH : ENOMEM;
	return failed ? errno : 0;
}

static int patiently(const struct errand_call *call)
{
	struct timespec pause = {0, PAUSE};
	int error;

	for (int tries = 0; (error = once(call)) == EAGAIN && tries < TRIES; tries++)
		nanosleep(&pause, NULL);
	return error;
}

static void do_errand(struct errand *errand, const struct errand_call *calls)
{
	int status = 0;

	for (uint32_t i = errand->first; !status && i < errand->first + errand->count; i++) {
		errand->failed = i;
		status = patiently(&calls[i]);
	}
	atomic_store(&errand->status, status);
}

static bool errands_make_sense(const Py_buffer *counter, const Py_buffer *errands,
			       const Py_buffer *calls)
{
	Py_ssize_t count = errands->len / (Py_ssize_t)sizeof(struct errand);
	const struct errand *errand = errands->buf;

	if (counter->len != sizeof(uint64_t) || errands->len % (Py_ssize_t)sizeof *errand ||
	    calls->len % (Py_ssize_t)sizeof(struct errand_call))
		return false;
	for (Py_ssize_t i = 0; i < count; i++)
		if ((uint64_t)errand[i].first + errand[i].count >
		    (uint64_t)calls->len / sizeof(struct errand_call))
			return false;
	return true;
}

PyObject *carry_out_many(PyObject *module, PyObject *args)
{
	Py_buffer counter, errands, calls;
	PyObject *result = NULL;
	uint64_t count, index;

	(void)module;
	if (!PyArg_ParseTuple(args, "w*w*y*", &counter, &errands, &calls))
		return NULL;
	count = (uint64_t)errands.len / sizeof(struct errand);
	if (!errands_make_sense(&counter, &errands, &calls)) {
		PyErr_SetString(PyExc_ValueError, "counter, errands or calls out of range");
	} else {
		Py_BEGIN_ALLOW_THREADS
		while ((index = atomic_fetch_add((_Atomic uint64_t *)counter.buf, 1)) < count)
			do_errand((struct errand *)errands.buf + index, calls.buf);
		Py_END_ALLOW_THREADS
		result = Py_NewRef(Py_None);
	}
	PyBuffer_Release(&counter);
	PyBuffer_Release(&errands);
	PyBuffer_Release(&calls);
	return result;
}

#endif
