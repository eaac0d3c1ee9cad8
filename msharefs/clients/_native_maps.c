/* What many processes have mapped of one filesystem: what procmap.py asks of one.
 *
 * For: roster.py and census.py, which look at every client of a region, or at every process, on
 * behalf of somebody who waits. Only shared mappings of files, by PROCMAP_QUERY.
 *
 * Promises: reads only, without the interpreter's lock; one process's answer is not another's affair.
 * Leaves out: what procmap.py does where the kernel has no such query; what the answers mean.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#ifdef __x86_64__

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

/* linux/fs.h, which is younger than the headers may be. */
struct query {
	uint64_t size, flags, address;
	uint64_t start, end, vma_flags, page_size, offset, inode;
	uint32_t major, minor, name_size, build_id_size;
	uint64_t name, build_id;
};

#define PROCMAP_QUERY _IOC(_IOC_READ | _IOC_WRITE, 'f', 17, sizeof(struct query))
#define SHARED_FILES_FROM_HERE (0x08 | 0x10 | 0x20) /* shared, covering or next, file-backed */

/* One mapping, as procmap.py unpacks it. */
struct mapped {
	uint64_t start, end, prot, offset, inode;
};

struct answers {
	struct mapped *all;
	size_t count, room;
	uint32_t major, minor;
};

/* One process's part of the answers, or why there is none. */
struct answer {
	size_t first, count;
	int error;
};

static bool note(struct answers *answers, const struct query *query)
{
	struct mapped *more;

	if (answers->count == answers->room) {
		more = realloc(answers->all, (answers->room * 2 + 64) * sizeof *more);
		if (!more)
			return false;
		answers->all = more;
		answers->room = answers->room * 2 + 64;
	}
	answers->all[answers->count++] = (struct mapped){
		query->start, query->end, query->vma_flags & 7, query->offset, query->inode};
	return true;
}

static void look_at(struct answers *answers, struct answer *answer, int maps)
{
	uint64_t at = 0;

	answer->first = answers->count;
	for (;;) {
		struct query query = {.size = sizeof query, .flags = SHARED_FILES_FROM_HERE, .address = at};

		if (ioctl(maps, PROCMAP_QUERY, &query)) {
			answer->error = errno == ENOENT ? 0 : errno;
			break;
		}
		at = query.end;
		if (query.major == answers->major && query.minor == answers->minor &&
		    !note(answers, &query)) {
			answer->error = ENOMEM;
			break;
		}
	}
	answer->count = answers->count - answer->first;
}

/* One without memory: a kernel thread, or a process whose first thread has ended before the others. */
static bool has_other_threads(int proc, int pid)
{
	struct stat task;
	char name[32];

	snprintf(name, sizeof name, "%d/task", pid);
	return !fstatat(proc, name, &task, 0) && task.st_nlink > 3;
}

static void look_at_process(struct answers *answers, struct answer *answer, int proc, int pid)
{
	char name[32];
	int maps;

	snprintf(name, sizeof name, "%d/maps", pid);
	maps = openat(proc, name, O_RDONLY | O_CLOEXEC);
	if (maps < 0) {
		*answer = (struct answer){.error = errno == ESRCH ? ENOENT : errno};
		return;
	}
	look_at(answers, answer, maps);
	close(maps);
	if (answer->error == ESRCH && !has_other_threads(proc, pid))
		answer->error = ENOENT;
}

static PyObject *as_list(const struct answers *answers, const struct answer *each, Py_ssize_t count)
{
	PyObject *list = PyList_New(count), *item;

	for (Py_ssize_t i = 0; list && i < count; i++) {
		if (each[i].error)
			item = PyLong_FromLong(each[i].error);
		else
			item = PyBytes_FromStringAndSize((const char *)(answers->all + each[i].first),
							 (Py_ssize_t)(each[i].count * sizeof *answers->all));
		if (item)
			PyList_SET_ITEM(list, i, item);
		else
			Py_CLEAR(list);
	}
	return list;
}

PyObject *look_at_many(PyObject *module, PyObject *args)
{
	struct answers answers = {0};
	struct answer *each;
	PyObject *result;
	Py_ssize_t count;
	Py_buffer whom;
	int proc;

	(void)module;
	if (!PyArg_ParseTuple(args, "y*iII", &whom, &proc, &answers.major, &answers.minor))
		return NULL;
	count = whom.len / (Py_ssize_t)sizeof(int);
	each = calloc((size_t)count + 1, sizeof *each);
	if (!each) {
		PyBuffer_Release(&whom);
		return PyErr_NoMemory();
	}
	Py_BEGIN_ALLOW_THREADS
	for (Py_ssize_t i = 0; i < count; i++) {
		int one = ((const int *)whom.buf)[i];

		if (proc < 0)
			look_at(&answers, &each[i], one);
		else
			look_at_process(&answers, &each[i], proc, one);
	}
	Py_END_ALLOW_THREADS
	result = as_list(&answers, each, count);
	free(each);
	free(answers.all);
	PyBuffer_Release(&whom);
	return result;
}

#endif
