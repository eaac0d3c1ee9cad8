/* Many clients at once: what borrow.py does for one thread, by a few threads without Python.
 *
 * For: many.py and lay_many.py. A change of a region takes the same few system calls in each of its
 * clients; pure Python spends several times as long on each as the kernel does. Here only the usual client is
 * dealt with: a process of one thread, of 64-bit code, without seccomp, in no signal's way. Whatever
 * else is met is left as it was found, for borrow.py: its job is SLOW.
 *
 * Promises: what borrow.py promises about the threads that are borrowed (exactly as they were:
 * registers, signals, stops, interrupted calls), with the same rules, which stand and are explained
 * there and in arch.py. Returns within the limit and a moment, whatever the clients do. A thread of
 * ours that cannot let go of a client then (it is within a call that we had it make) is left behind
 * and does so as soon as that call returns; it has its memory for itself.
 *
 * Leaves out: why (batch.py), which calls (replica.py), which client (roster.py).
 *
 * ptrace(2) binds a tracee to a thread, so each thread here has its own: it takes jobs that nobody
 * has taken, some WINDOW of them at a time, and sleeps in waitpid(2) until one of its tracees
 * stops. A timer wakes it every now and then to look at the clock.
 *
 * Half of the time goes by with threads that wake one another, and from one processor to another
 * that takes twice as long as on the same. So where there are few processors each gets a thread of
 * ours, which stays there and begins with the clients that were last seen there.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#ifdef __x86_64__

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/sysmacros.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

/* Statuses of a job besides 0, done, and the errno of a call. */
enum { SLOW = -1, GONE = -2, STUCK = -3, PENDING = -4 };

struct job {
	int32_t tid;
	int32_t status;
	uint64_t instruction; /* a `syscall` in its code, for a thread that is in no call; 0: unknown */
	uint32_t first, count; /* its calls */
	uint32_t disturbed;    /* set: the program sees that its call was interrupted */
	int32_t maps;	       /* /proc/TID/maps, opened when it was the program meant; or -1 */
	int32_t cpu;	       /* where it ran last, if that is known, and is known now; or -1 */
	uint32_t known;	       /* set: it had no seccomp filter before, and is not asked again */
	uint32_t failed;       /* of its calls the one whose errno is the status */
	uint32_t pad;
	int64_t kept[2];       /* what it still has of its calls' results; -1: nothing */
};

struct call {
	uint64_t number, arguments[6];
	uint64_t inode;		/* a file of ours that it may open and map meanwhile, and how; 0: none */
	uint32_t flags;
	uint32_t text, length;	/* of the texts: written to where its result points */
	uint8_t from, which;	/* kept value (1, 2; 0: none) that is added to this argument */
	uint8_t keep;		/* its result is kept as that value; 0: is not */
	uint8_t always;		/* gives back the value that it uses: made as long as there is one,
				 * after a failure too, and its own does not matter */
};

#define WINDOW 24	     /* clients that a thread has in hand, but for those that are slow to stop */
#define MOST_THREADS 8
#define TICK 10000000	     /* nanoseconds between looks at the clock */
#define GRACE 500000000	     /* nanoseconds after the limit for the threads to notice */
#define STACK (256 << 10)
#define TRIES 16	     /* of a call that is interrupted for no reason of its own */
#define MOST_DOORS 1024
#define TIMER_SIGNAL (SIGRTMAX - 3)

#define OPTIONS (PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACEEXEC)
#define SYSCALL_STOP (SIGTRAP | 0x80)
#define EVENT_STOP 128 /* PTRACE_EVENT_STOP, which not all headers have */
#define SYSCALL_INSTRUCTION 0x050f

/* What an interrupted call shows to a tracer; see arch.py. */
#define ERESTARTSYS 512
#define ERESTARTNOINTR 513
#define ERESTARTNOHAND 514
#define ERESTART_RESTARTBLOCK 516

static int64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static struct timespec timespec(int64_t nanoseconds)
{
	return (struct timespec){nanoseconds / 1000000000, nanoseconds % 1000000000};
}

/* -- the batch: shared by the threads and whoever waits for them; the last one frees it */

struct batch {
	int told; /* a BPF map, by thread, that is told whom we have in hand; a descriptor of our own,
		   * for threads that are left behind; or -1 */
	pthread_mutex_t lock;
	pthread_cond_t reported;
	unsigned running; /* threads that have not reported yet */
	unsigned users;
	atomic_bool *taken; /* by job: a thread has it, or had */
	uint32_t count;
	int64_t deadline;
	uint64_t own_device;
	struct call *calls;
	char *texts;
	struct job jobs[];
};

static void let_go_of_batch(struct batch *batch)
{
	bool last;

	pthread_mutex_lock(&batch->lock);
	last = !--batch->users;
	pthread_mutex_unlock(&batch->lock);
	if (last) {
		pthread_cond_destroy(&batch->reported);
		pthread_mutex_destroy(&batch->lock);
		if (batch->told >= 0)
			close(batch->told);
		free(batch);
	}
}

/* -- one tracee */

enum state {
	STOPPING, /* seized, asked to stop */
	ENTERING, /* on its way to the entry of our call */
	LEAVING,  /* in our call */
};

struct slot {
	pid_t tid;
	enum state state;
	bool dirty; /* its registers are not what is in saved */
	bool told;  /* the gate lets its calls through */
	bool let_in; /* has a door */
	int status;  /* the first errno of its calls */
	unsigned tries;
	int64_t kept[2];
	uint32_t job;
	uint32_t call;
	uint64_t instruction;
	int64_t since;
	struct user_regs_struct saved;
};

struct worker {
	struct batch *batch;
	int cpu;       /* where it stays; -1: anywhere */
	bool anyones;  /* past the jobs of its own processor */
	uint32_t next; /* the job to look at next */
	bool late; /* past the limit: nothing new is begun */
	bool reported;
	uint32_t used, old; /* slots; those of them that do not count for the window */
	struct slot *slots;
};

/* PTRACE_SEIZE waits for an execve(2), and starts anew after a signal; the timer's must end it. */
long msharefs_seize(long request, long tid, void *address, long options);
extern const char msharefs_seize_call[], msharefs_seize_end[];
__asm__(".text\n"
	".hidden msharefs_seize, msharefs_seize_call, msharefs_seize_end\n"
	".globl msharefs_seize, msharefs_seize_call, msharefs_seize_end\n"
	".type msharefs_seize, @function\n"
	"msharefs_seize:\n"
	"	mov %rcx, %r10\n"
	"	mov $101, %eax\n"
	"msharefs_seize_call:\n"
	"	syscall\n"
	"msharefs_seize_end:\n"
	"	ret\n"
	".size msharefs_seize, . - msharefs_seize\n");

static void on_timer(int number, siginfo_t *info, void *context)
{
	greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;

	(void)number;
	(void)info;
	if (registers[REG_RIP] == (greg_t)msharefs_seize_call) {
		registers[REG_RIP] = (greg_t)msharefs_seize_end;
		registers[REG_RAX] = -EINTR;
	}
}

/* The lsm gate refuses mprotect(2) of a region but for threads that it is told of: bpf(2). */
static bool tell(const struct batch *batch, pid_t tid, bool ours)
{
	struct {
		uint32_t map;
		uint64_t key, value, flags;
	} attributes = {0};
	uint32_t key = (uint32_t)tid, value = 0;

	attributes.map = (uint32_t)batch->told;
	attributes.key = (uint64_t)(uintptr_t)&key;
	attributes.value = ours ? (uint64_t)(uintptr_t)&value : 0;
	return !syscall(SYS_bpf, ours ? 2 /* update */ : 3 /* delete */, &attributes, sizeof attributes);
}

/* -- doors: threads that are within a call of ours which opens or maps a file of ours, and which file.
 * Whoever answers them asks here: what a thread does by itself is never let in by this. */

static struct door {
	pid_t tid;
	uint32_t flags;
	uint64_t inode;
} doors[MOST_DOORS];
static unsigned doors_open;
static pthread_mutex_t doors_lock = PTHREAD_MUTEX_INITIALIZER;

static bool let_in(pid_t tid, uint64_t inode, uint32_t flags)
{
	bool room;

	pthread_mutex_lock(&doors_lock);
	room = doors_open < MOST_DOORS;
	if (room)
		doors[doors_open++] = (struct door){tid, flags, inode};
	pthread_mutex_unlock(&doors_lock);
	return room;
}

static void let_in_no_more(struct slot *slot)
{
	if (!slot->let_in)
		return;
	slot->let_in = false;
	pthread_mutex_lock(&doors_lock);
	for (unsigned i = 0; i < doors_open; i++)
		if (doors[i].tid == slot->tid) {
			doors[i] = doors[--doors_open];
			break;
		}
	pthread_mutex_unlock(&doors_lock);
}

static PyObject *expected(PyObject *module, PyObject *argument)
{
	long tid = PyLong_AsLong(argument);
	struct door found = {0};

	(void)module;
	if (tid == -1 && PyErr_Occurred())
		return NULL;
	pthread_mutex_lock(&doors_lock);
	for (unsigned i = 0; i < doors_open; i++)
		if (doors[i].tid == tid)
			found = doors[i];
	pthread_mutex_unlock(&doors_lock);
	return Py_BuildValue("KI", (unsigned long long)found.inode, found.flags);
}

static void tell_no_more(struct worker *w, struct slot *slot)
{
	let_in_no_more(slot);
	if (slot->told)
		tell(w->batch, slot->tid, false);
	slot->told = false;
}

/* The client's job is done with, its slot free. What is still to be reported about the thread is
 * its end, which nobody needs to hear: the kernel tells its parent when our thread ends, at latest. */
static void finish(struct worker *w, struct slot *slot, int status)
{
	tell_no_more(w, slot);
	if (!w->reported) {
		w->batch->jobs[slot->job].status = status;
		memcpy(w->batch->jobs[slot->job].kept, slot->kept, sizeof slot->kept);
	}
	if (slot->since == INT64_MIN)
		w->old--;
	*slot = w->slots[--w->used];
}

/* Everything as it was, and off it goes; with `signal`, if it stopped for that. */
static void let_go(struct worker *w, struct slot *slot, int signal, int status)
{
	tell_no_more(w, slot);
	if ((slot->dirty && ptrace(PTRACE_SETREGS, slot->tid, NULL, &slot->saved)) ||
	    ptrace(PTRACE_DETACH, slot->tid, NULL, (void *)(long)signal))
		status = GONE; /* killed meanwhile */
	finish(w, slot, status);
}

static bool restarts(long result)
{
	return result == -ERESTARTSYS || result == -ERESTARTNOINTR || result == -ERESTARTNOHAND ||
	       result == -ERESTART_RESTARTBLOCK;
}

/* arch.waits_for_ever */
static bool waits_for_ever(pid_t tid, const struct user_regs_struct *r)
{
	unsigned long low, high;

	switch (r->orig_rax) {
	case SYS_epoll_wait:
	case SYS_epoll_pwait:
		return (int)r->r10 < 0;
	case SYS_semop:
		return true;
	case SYS_epoll_pwait2:
	case SYS_semtimedop:
		return !r->r10;
	case SYS_rt_sigtimedwait:
		return !r->rdx;
	case SYS_io_getevents:
		return !r->r8;
	case SYS_io_uring_enter:
		if (r->rsi) /* to_submit */
			return false;
		if (!(r->r10 & 8)) /* IORING_ENTER_EXT_ARG */
			return true;
		errno = 0;
		low = (unsigned long)ptrace(PTRACE_PEEKDATA, tid, r->r8 + 8, NULL);
		high = (unsigned long)ptrace(PTRACE_PEEKDATA, tid, r->r8 + 16, NULL);
		return !errno && !(low >> 32) && !high; /* min_wait_usec, ts */
	}
	return false;
}

/* Whether it waited for an answer of ours to a request that can be made again. */
static bool asked_us(pid_t tid, const struct user_regs_struct *r, uint64_t own_device)
{
	struct statx status;
	char name[64];

	switch (r->orig_rax) {
	case SYS_read:
	case SYS_write:
	case SYS_ioctl:
	case SYS_pread64:
	case SYS_pwrite64:
	case SYS_readv:
	case SYS_writev:
	case SYS_ftruncate:
	case SYS_fallocate:
		snprintf(name, sizeof name, "/proc/%d/fd/%u", tid, (unsigned)r->rdi);
		return !statx(AT_FDCWD, name, AT_STATX_DONT_SYNC, 0, &status) &&
		       makedev(status.stx_dev_major, status.stx_dev_minor) == own_device;
	}
	return false;
}

/* arch.settle: the call that it was in is to go on unnoticed. */
static void settle(struct worker *w, struct slot *slot)
{
	struct user_regs_struct *r = &slot->saved;
	long number = (long)r->orig_rax, result = (long)r->rax;
	bool disturbed = false;

	if (number < 0 || restarts(result))
		return;
	if (result == -EINTR) {
		if (asked_us(slot->tid, r, w->batch->own_device) || waits_for_ever(slot->tid, r)) {
			r->rax = (unsigned long)-ERESTARTNOHAND;
			slot->dirty = true;
		} else {
			disturbed = true;
		}
	} else if (number == SYS_write || number == SYS_pwrite64 || number == SYS_sendto ||
		   (number == SYS_recvfrom && r->r10 & MSG_WAITALL)) {
		disturbed = result > 0 && (unsigned long)result < r->rdx;
	}
	if (disturbed && !w->reported)
		w->batch->jobs[slot->job].disturbed = 1;
}

/* Where it can make a call from; 0 if that is not plain. */
static uint64_t instruction_for(const struct slot *slot, const struct job *job)
{
	const struct user_regs_struct *r = &slot->saved;
	long word;

	if ((long)r->orig_rax >= 0 && r->rcx == r->rip)
		return r->rip - 2;
	if (!job->instruction)
		return 0;
	errno = 0;
	word = ptrace(PTRACE_PEEKTEXT, slot->tid, job->instruction, NULL);
	return !errno && (word & 0xffff) == SYSCALL_INSTRUCTION ? job->instruction : 0;
}

/* PROCMAP_QUERY about no address at all: ESRCH if the address space has ended, by exec or exit. */
static bool has_ended(int maps)
{
	uint64_t query[13] = {sizeof query, 0, UINT64_MAX};

	return ioctl(maps, _IOC(_IOC_READ | _IOC_WRITE, 'f', 17, sizeof query), query) &&
	       errno == ESRCH;
}

/* Where it was when it went on with its program last, as its rseq(2) area says; -1 if it has none. */
static int last_cpu(pid_t tid)
{
	struct {
		uint64_t pointer;
		uint32_t size, signature, flags, pad;
	} rseq = {0};
	long word;

	if (ptrace(PTRACE_GET_RSEQ_CONFIGURATION, tid, (void *)sizeof rseq, &rseq) < 0 ||
	    !rseq.pointer)
		return -1;
	errno = 0;
	word = ptrace(PTRACE_PEEKDATA, tid, rseq.pointer, NULL); /* cpu_id_start, cpu_id */
	return errno ? -1 : (int)(word >> 32);
}

static void make_call(struct worker *w, struct slot *slot)
{
	struct call *call = &w->batch->calls[slot->call];
	struct user_regs_struct r = slot->saved;
	uint64_t arguments[6];

	if (call->inode && !(slot->let_in = let_in(slot->tid, call->inode, call->flags))) {
		let_go(w, slot, 0, SLOW);
		return;
	}
	memcpy(arguments, call->arguments, sizeof arguments);
	if (call->from)
		arguments[call->which] += (uint64_t)slot->kept[call->from - 1];
	r.rax = call->number;
	r.rdi = arguments[0];
	r.rsi = arguments[1];
	r.rdx = arguments[2];
	r.r10 = arguments[3];
	r.r8 = arguments[4];
	r.r9 = arguments[5];
	r.rcx = 0;
	r.orig_rax = (unsigned long)-1;
	r.rip = slot->instruction;
	slot->dirty = true;
	slot->state = ENTERING;
	if (ptrace(PTRACE_SETREGS, slot->tid, NULL, &r) ||
	    ptrace(PTRACE_SYSCALL, slot->tid, NULL, NULL))
		finish(w, slot, GONE);
}

/* It has stopped as we asked. */
static void take(struct worker *w, struct slot *slot)
{
	struct job *job = &w->batch->jobs[slot->job];

	if (ptrace(PTRACE_GETREGS, slot->tid, NULL, &slot->saved)) {
		finish(w, slot, GONE);
		return;
	}
	if (slot->saved.cs != 0x33 && slot->saved.cs != 0xe033) {
		let_go(w, slot, 0, SLOW);
		return;
	}
	settle(w, slot);
	if (w->late) {
		let_go(w, slot, 0, STUCK);
		return;
	}
	slot->instruction = instruction_for(slot, job);
	/* EINVAL: no filter. Strict mode is not told, but suspended. (Not before it has stopped: it
	 * must not run a step without its filter.) */
	if (!slot->instruction ||
	    (!job->known && (ptrace(PTRACE_SECCOMP_GET_FILTER, slot->tid, NULL, NULL) != -1 ||
			     errno != EINVAL)) ||
	    ptrace(PTRACE_SETOPTIONS, slot->tid, NULL, (void *)(OPTIONS | PTRACE_O_SUSPEND_SECCOMP))) {
		let_go(w, slot, 0, SLOW);
		return;
	}
	if (w->cpu >= 0 && !w->reported)
		job->cpu = last_cpu(slot->tid);
	if (job->maps >= 0 && has_ended(job->maps)) {
		let_go(w, slot, 0, GONE);
		return;
	}
	if (w->batch->told >= 0 && !(slot->told = tell(w->batch, slot->tid, true))) {
		let_go(w, slot, 0, SLOW);
		return;
	}
	slot->call = job->first;
	if (job->count)
		make_call(w, slot);
	else
		let_go(w, slot, 0, 0);
}

static bool write_text(const struct batch *batch, const struct slot *slot, const struct call *call)
{
	struct iovec ours = {batch->texts + call->text, call->length};
	struct iovec its = {(void *)slot->kept[call->keep - 1], call->length};

	return !call->length ||
	       process_vm_writev(slot->tid, &ours, 1, &its, 1, 0) == (ssize_t)call->length;
}

/* A call has this result: what is kept of it, and which call is the next. */
static void note(struct worker *w, struct slot *slot, const struct job *job, long result)
{
	struct batch *batch = w->batch;
	struct call *call = &batch->calls[slot->call];
	uint32_t end = job->first + job->count;
	int error = result < 0 && result >= -4095 ? (int)-result : 0;

	if (call->always) {
		slot->kept[call->from - 1] = -1;
		error = 0;
	} else if (!error && call->keep) {
		slot->kept[call->keep - 1] = result;
		error = write_text(batch, slot, call) ? 0 : EFAULT;
	}
	if (error && !slot->status) {
		slot->status = error;
		if (!w->reported)
			batch->jobs[slot->job].failed = slot->call - job->first;
	}
	slot->tries = 0;
	do
		call = &batch->calls[++slot->call];
	while (slot->call < end && (call->always ? slot->kept[call->from - 1] < 0 : slot->status));
}

/* Our call has returned. */
static void judge(struct worker *w, struct slot *slot)
{
	struct job *job = &w->batch->jobs[slot->job];
	long result;

	let_in_no_more(slot);

	errno = 0;
	result = ptrace(PTRACE_PEEKUSER, slot->tid, offsetof(struct user_regs_struct, rax), NULL);
	/* At once: should this process die, the kernel lets go of the thread as it is. */
	if (errno || ptrace(PTRACE_SETREGS, slot->tid, NULL, &slot->saved)) {
		finish(w, slot, GONE);
		return;
	}
	slot->dirty = false;
	if (!restarts(result) && (result != -EINTR || ++slot->tries == TRIES))
		note(w, slot, job, result);
	if (w->late)
		let_go(w, slot, 0, STUCK);
	else if (slot->call == job->first + job->count)
		let_go(w, slot, 0, slot->status);
	else
		make_call(w, slot);
}

/* A thread that we trace has stopped or ended. */
static void heard(struct worker *w, pid_t tid, int status)
{
	int signal = status >> 8 & 0xff, event = status >> 16;
	struct slot *slot = NULL;

	for (uint32_t i = 0; i < w->used && !slot; i++)
		if (w->slots[i].tid == tid)
			slot = &w->slots[i];
	if (!WIFSTOPPED(status)) {
		if (slot)
			finish(w, slot, GONE);
	} else if (!slot) {
		ptrace(PTRACE_DETACH, tid, NULL, NULL);
	} else if (slot->state == STOPPING && event == EVENT_STOP && signal == SIGTRAP) {
		take(w, slot);
	} else if (slot->state == ENTERING && signal == SYSCALL_STOP) {
		slot->state = LEAVING;
		if (w->late) /* not to be made any more */
			ptrace(PTRACE_POKEUSER, tid, offsetof(struct user_regs_struct, orig_rax), -1L);
		if (ptrace(PTRACE_SYSCALL, tid, NULL, NULL))
			finish(w, slot, GONE);
	} else if (slot->state == LEAVING && signal == SYSCALL_STOP) {
		judge(w, slot);
	} else { /* a signal, which it gets; a group stop, which goes on; an exec */
		let_go(w, slot, event || signal == SYSCALL_STOP ? 0 : signal, SLOW);
	}
}

static bool is_single(pid_t tid, int *status)
{
	struct stat task;
	char name[32];

	snprintf(name, sizeof name, "/proc/%d/task", tid);
	if (stat(name, &task)) {
		*status = errno == ENOENT || errno == ESRCH ? GONE : SLOW;
		return false;
	}
	*status = SLOW;
	return task.st_nlink == 3; /* "." and ".." and one thread */
}

/* The next job that nobody has, those of the own processor first; batch->count if there is none. */
static uint32_t take_job(struct worker *w)
{
	struct batch *batch = w->batch;

	for (;;) {
		for (; w->next < batch->count; w->next++)
			if ((w->anyones || batch->jobs[w->next].cpu == w->cpu) &&
			    !atomic_load(&batch->taken[w->next]) &&
			    !atomic_exchange(&batch->taken[w->next], true))
				return w->next++;
		if (w->anyones)
			return batch->count;
		w->anyones = true;
		w->next = 0;
	}
}

/* Take on one more client; false if there is none. */
static bool begin(struct worker *w)
{
	struct batch *batch = w->batch;
	uint32_t index = take_job(w);
	struct slot *slot = &w->slots[w->used];
	struct job *job;
	long result;

	if (index == batch->count)
		return false;
	job = &batch->jobs[index];
	if (!is_single(job->tid, &job->status))
		return true;
	result = msharefs_seize(PTRACE_SEIZE, job->tid, NULL, OPTIONS);
	if (result) {
		job->status = result == -ESRCH ? GONE : SLOW;
		return true;
	}
	job->status = PENDING;
	*slot = (struct slot){.tid = job->tid, .job = index, .state = STOPPING, .since = now(),
			     .kept = {-1, -1}};
	w->used++;
	if (ptrace(PTRACE_INTERRUPT, job->tid, NULL, NULL))
		finish(w, slot, GONE);
	return true;
}

/* -- a thread */

static void forget_slow_ones(struct worker *w, int64_t time)
{
	for (uint32_t i = 0; i < w->used; i++)
		if (w->slots[i].since != INT64_MIN && w->slots[i].since < time - TICK) {
			w->slots[i].since = INT64_MIN;
			w->old++;
		}
}

static bool any_dirty(const struct worker *w)
{
	for (uint32_t i = 0; i < w->used; i++)
		if (w->slots[i].dirty)
			return true;
	return false;
}

static void report(struct worker *w)
{
	struct batch *batch = w->batch;

	for (uint32_t i = 0; i < w->used; i++)
		batch->jobs[w->slots[i].job].status = STUCK;
	w->reported = true;
	pthread_mutex_lock(&batch->lock);
	if (!--batch->running)
		pthread_cond_signal(&batch->reported);
	pthread_mutex_unlock(&batch->lock);
}

static void serve(struct worker *w)
{
	int64_t time = now(), looked = time;
	int status;
	pid_t tid;

	for (;;) {
		while (w->used - w->old < WINDOW && begin(w))
			;
		if (!w->used)
			return;
		tid = waitpid(-1, &status, __WALL | __WNOTHREAD);
		if (tid > 0)
			heard(w, tid, status);
		else if (errno != EINTR)
			return;
		time = now();
		if (time >= w->batch->deadline)
			break;
		if (time >= looked + TICK) {
			forget_slow_ones(w, time);
			looked = time;
		}
	}
	w->late = true;
	while (w->used && (tid = waitpid(-1, &status, __WALL | __WNOTHREAD | WNOHANG)) > 0)
		heard(w, tid, status);
}

/* A timer that interrupts this thread's calls. */
static bool start_ticking(timer_t *timer)
{
	struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = TIMER_SIGNAL};
	struct itimerspec every = {timespec(TICK), timespec(TICK)};

	event._sigev_un._tid = gettid();
	if (timer_create(CLOCK_MONOTONIC, &event, timer))
		return false;
	timer_settime(*timer, 0, &every, NULL);
	return true;
}

/* What a thread is told. */
struct member {
	struct batch *batch;
	int cpu;
};

static void *work(void *argument)
{
	struct member *member = argument;
	struct worker w = {.batch = member->batch, .cpu = member->cpu};
	sigset_t timers;
	timer_t timer;
	int status;
	pid_t tid;

	free(member);
	/* A client that goes on must not take the processor from us: the next one waits. */
	setpriority(PRIO_PROCESS, 0, -20);
	w.slots = malloc(w.batch->count * sizeof *w.slots); /* of which little is ever touched */
	sigemptyset(&timers);
	sigaddset(&timers, TIMER_SIGNAL);
	if (w.slots && start_ticking(&timer)) {
		pthread_sigmask(SIG_UNBLOCK, &timers, NULL);
		serve(&w);
		timer_delete(timer);
		pthread_sigmask(SIG_BLOCK, &timers, NULL);
	}
	report(&w);
	/* The kernel lets go of what has not stopped when we end; of this it must not. */
	while (any_dirty(&w) && (tid = waitpid(-1, &status, __WALL | __WNOTHREAD)) > 0)
		heard(&w, tid, status);
	free(w.slots);
	let_go_of_batch(w.batch);
	return NULL;
}

/* -- who waits for them */

static struct batch *new_batch(const Py_buffer *jobs, const Py_buffer *calls, const Py_buffer *texts)
{
	uint32_t count = (uint32_t)((size_t)jobs->len / sizeof(struct job));
	struct batch *batch = calloc(1, sizeof *batch + (size_t)jobs->len + (size_t)calls->len +
						count * sizeof *batch->taken + (size_t)texts->len);
	pthread_condattr_t attributes;

	if (!batch)
		return NULL;
	batch->count = count;
	batch->calls = (struct call *)(batch->jobs + batch->count);
	batch->taken = (atomic_bool *)((char *)batch->calls + calls->len);
	batch->texts = (char *)(batch->taken + count);
	memcpy(batch->texts, texts->buf, (size_t)texts->len);
	memcpy(batch->jobs, jobs->buf, (size_t)jobs->len);
	memcpy(batch->calls, calls->buf, (size_t)calls->len);
	for (uint32_t i = 0; i < batch->count; i++) {
		batch->jobs[i].status = PENDING;
		batch->jobs[i].disturbed = batch->jobs[i].failed = 0;
		batch->jobs[i].kept[0] = batch->jobs[i].kept[1] = -1;
	}
	pthread_mutex_init(&batch->lock, NULL);
	pthread_condattr_init(&attributes);
	pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
	pthread_cond_init(&batch->reported, &attributes);
	pthread_condattr_destroy(&attributes);
	batch->users = 1;
	batch->told = -1;
	return batch;
}

static bool start_thread(struct batch *batch, pthread_attr_t *attributes, int cpu)
{
	struct member *member = malloc(sizeof *member);
	pthread_t thread;
	cpu_set_t here;

	if (!member)
		return false;
	*member = (struct member){batch, cpu};
	CPU_ZERO(&here);
	if (cpu >= 0) {
		CPU_SET(cpu, &here);
		pthread_attr_setaffinity_np(attributes, sizeof here, &here);
	}
	if (pthread_create(&thread, attributes, work, member)) {
		free(member);
		return false;
	}
	batch->running++;
	batch->users++;
	return true;
}

/* The threads are interrupted by their timer and by nothing else. */
static void start_threads(struct batch *batch, unsigned threads)
{
	pthread_attr_t attributes;
	sigset_t all, before;
	cpu_set_t cpus;
	bool staying;

	staying = !sched_getaffinity(0, sizeof cpus, &cpus) && CPU_COUNT(&cpus) <= (int)threads;
	sigfillset(&all);
	pthread_attr_init(&attributes);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	pthread_attr_setstacksize(&attributes, STACK);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	pthread_mutex_lock(&batch->lock);
	for (int cpu = 0; staying && cpu < CPU_SETSIZE; cpu++)
		if (CPU_ISSET(cpu, &cpus))
			start_thread(batch, &attributes, cpu);
	for (unsigned i = 0; !staying && i < threads; i++)
		start_thread(batch, &attributes, -1);
	pthread_mutex_unlock(&batch->lock);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_attr_destroy(&attributes);
}

static void run(struct batch *batch, unsigned threads)
{
	struct timespec end = timespec(batch->deadline + GRACE);

	start_threads(batch, threads);
	pthread_mutex_lock(&batch->lock);
	while (batch->running && !pthread_cond_timedwait(&batch->reported, &batch->lock, &end))
		;
	pthread_mutex_unlock(&batch->lock);
}

static bool calls_make_sense(const struct call *call, Py_ssize_t count, Py_ssize_t texts)
{
	for (Py_ssize_t i = 0; i < count; i++)
		if (call[i].from > 2 || call[i].which > 5 || call[i].keep > 2 ||
		    (call[i].always && !call[i].from) || (call[i].length && !call[i].keep) ||
		    (uint64_t)call[i].text + call[i].length > (uint64_t)texts)
			return false;
	return true;
}

static bool calls_exist(const struct job *job, Py_ssize_t jobs, Py_ssize_t calls)
{
	for (Py_ssize_t i = 0; i < jobs; i++)
		if ((uint64_t)job[i].first + job[i].count > (uint64_t)calls)
			return false;
	return true;
}

static PyObject *borrow_many(PyObject *module, PyObject *args)
{
	int told;
	unsigned threads;
	long long limit;
	unsigned long long own_device;
	struct batch *batch = NULL;
	Py_buffer jobs, calls, texts;
	PyObject *result = NULL;
	Py_ssize_t count, made;

	(void)module;
	if (!PyArg_ParseTuple(args, "w*y*y*ILKi", &jobs, &calls, &texts, &threads, &limit, &own_device, &told))
		return NULL;
	count = jobs.len / (Py_ssize_t)sizeof(struct job);
	made = calls.len / (Py_ssize_t)sizeof(struct call);
	if (jobs.len % (Py_ssize_t)sizeof(struct job) || calls.len % (Py_ssize_t)sizeof(struct call) ||
	    !threads || threads > MOST_THREADS || limit < 0 || count >= INT32_MAX ||
	    !calls_exist(jobs.buf, count, made) || !calls_make_sense(calls.buf, made, texts.len)) {
		PyErr_SetString(PyExc_ValueError, "jobs, calls or threads out of range");
	} else if (!(batch = new_batch(&jobs, &calls, &texts))) {
		PyErr_NoMemory();
	} else if (told >= 0 && (batch->told = fcntl(told, F_DUPFD_CLOEXEC, 0)) < 0) {
		PyErr_SetFromErrno(PyExc_OSError);
		let_go_of_batch(batch);
	} else {
		batch->deadline = now() + limit;
		batch->own_device = own_device;
		Py_BEGIN_ALLOW_THREADS
		run(batch, threads);
		Py_END_ALLOW_THREADS
		for (uint32_t i = 0; i < batch->count; i++)
			if (batch->jobs[i].status == PENDING) /* a thread has it, or none had time */
				batch->jobs[i].status = atomic_load(&batch->taken[i]) ? STUCK : SLOW;
		memcpy(jobs.buf, batch->jobs, (size_t)jobs.len);
		let_go_of_batch(batch);
		result = Py_NewRef(Py_None);
	}
	PyBuffer_Release(&jobs);
	PyBuffer_Release(&calls);
	PyBuffer_Release(&texts);
	return result;
}

PyObject *carry_out_many(PyObject *module, PyObject *args); /* _native_faults.c */
PyObject *look_at_many(PyObject *module, PyObject *args);   /* _native_maps.c */

static PyMethodDef methods[] = {
	{"borrow_many", borrow_many, METH_VARARGS,
	 "borrow_many(jobs, calls, texts, threads, limit_ns, own_device, told): see many.py."},
	{"expected", expected, METH_O,
	 "expected(tid): the inode and flags of what a thread in hand may open and map now; or 0, 0."},
	{"carry_out_many", carry_out_many, METH_VARARGS,
	 "carry_out_many(counter, errands, calls): see errands.py."},
	{"look_at_many", look_at_many, METH_VARARGS,
	 "look_at_many(whom, proc, major, minor): see procmap.py."},
	{NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
	PyModuleDef_HEAD_INIT, .m_name = "msharefs.clients._native", .m_size = -1, .m_methods = methods};

PyMODINIT_FUNC PyInit__native(void)
{
	struct sigaction action = {.sa_sigaction = on_timer, .sa_flags = SA_SIGINFO};
	PyObject *module;

	if (sigaction(TIMER_SIGNAL, &action, NULL))
		return PyErr_SetFromErrno(PyExc_OSError);
	module = PyModule_Create(&definition);
	if (module && (PyModule_AddIntMacro(module, SLOW) || PyModule_AddIntMacro(module, GONE) ||
		       PyModule_AddIntMacro(module, STUCK) || PyModule_AddIntMacro(module, PENDING))) {
		Py_DECREF(module);
		return NULL;
	}
	return module;
}

#else

PyMODINIT_FUNC PyInit__native(void)
{
	PyErr_SetString(PyExc_ImportError, "for x86-64 only");
	return NULL;
}

#endif
