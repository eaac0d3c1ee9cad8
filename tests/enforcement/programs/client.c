/* A program that knows nothing of msharefs: it opens a file, maps it, loads and stores. What it is to
 * do comes on standard input, one line each, and is answered by one line (see ../clients.py). Built
 * three times: dynamic, static, and with -DRAW without the C library, its system calls made by itself.
 */
#define _GNU_SOURCE
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#ifdef RAW
#include "raw.h"
#else
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include "msharefs.h"

#define TRY(jump) sigsetjmp(jump, 1)
#define LEAP(jump) siglongjmp(jump, 1)
typedef sigjmp_buf leap;

static void handle(int number, void *handler, int flags)
{
	struct sigaction action = { .sa_flags = flags };

	action.sa_handler = (void (*)(int))handler;
	sigaction(number, &action, NULL);
}
#endif

static volatile unsigned char *base;
static int fd = -1;
static leap away;
static volatile uintptr_t fault;

#ifdef RAW
static void on_fault(int number, siginfo_t *info, void *context)
{
	(void)number;
	(void)context;
	fault = (uintptr_t)info->si_addr;
	LEAP(away);
}
#else
static volatile int repairs;
static uint64_t repair_at, repair_size;

static void on_fault(int number, siginfo_t *info, void *context)
{
	(void)number;
	(void)context;
	fault = (uintptr_t)info->si_addr;
	if (!repair_size)
		LEAP(away);
	struct mshare_protect args = { repair_at, repair_size, PROT_READ | PROT_WRITE, 0 };
	repairs++;
	if (ioctl(fd, MSHAREFS_PROTECT, &args))
		LEAP(away);
}
#endif

static char line[4096];
static size_t have;

static char *next_line(void)
{
	static char buffer[4096];
	for (;;) {
		for (size_t i = 0; i < have; i++) {
			if (line[i] != '\n')
				continue;
			for (size_t j = 0; j < i; j++)
				buffer[j] = line[j];
			buffer[i] = 0;
			have -= i + 1;
			for (size_t j = 0; j < have; j++)
				line[j] = line[i + 1 + j];
			return buffer;
		}
		long got = read(0, line + have, sizeof line - have);
		if (got <= 0)
			_exit(0);
		have += (size_t)got;
	}
}

static void say(const char *word, long number, int base16)
{
	char text[64], digits[24];
	size_t length = 0, n = 0;
	unsigned long left = number < 0 && !base16 ? -(unsigned long)number : (unsigned long)number;

	while (*word)
		text[length++] = *word++;
	text[length++] = ' ';
	if (number < 0 && !base16)
		text[length++] = '-';
	do
		digits[n++] = "0123456789abcdef"[left % (base16 ? 16 : 10)];
	while (left /= base16 ? 16 : 10);
	while (n)
		text[length++] = digits[--n];
	text[length++] = '\n';
	if (write(1, text, length) != (long)length)
		_exit(9);
}

static int same(const char *a, const char *b)
{
	while (*a && *a == *b)
		a++, b++;
	return *a == *b;
}

static char *words[8];
static unsigned long numbers[8];

static void split(char *text)
{
	for (int i = 0; i < 8; i++) {
		words[i] = text;
		while (*text && *text != ' ')
			text++;
		if (*text)
			*text++ = 0;
		numbers[i] = 0;
		for (char *p = words[i]; *p >= '0' && *p <= '9'; p++)
			numbers[i] = numbers[i] * 10 + (unsigned long)(*p - '0');
	}
}

static void copy(int into_memory)
{
	int file = open(words[2], into_memory ? O_RDONLY : O_WRONLY);
	char *at = (char *)base + numbers[1];
	long count = into_memory ? read(file, at, 1) : write(file, at, 1);

	if (count < 0)
		say("errno", errno, 0);
	else
		say("count", count, 0);
	close(file);
}

static void answer_forked(void)
{
	long pid = fork();
	int in, out;

	if (pid) {
		say("pid", pid, 0);
		return;
	}
	in = open(words[1], O_RDONLY);
	out = open(words[2], O_WRONLY);
	dup2(in, 0);
	dup2(out, 1);
	close(in);
	close(out);
	have = 0;
}

static void map(void)
{
	void *memory;

	fd = open(words[1], words[2][1] ? O_RDWR : O_RDONLY);
	if (fd < 0) {
		say("errno", errno, 0);
		return;
	}
	memory = mmap(NULL, numbers[4], (int)numbers[5], MAP_SHARED, fd, (long)numbers[3]);
	if (memory == MAP_FAILED) {
		say("errno", errno, 0);
		close(fd);
		return;
	}
	base = memory;
	say("at", (long)memory, 1);
}

static int basic(const char *what)
{
	if (same(what, "load")) {
		if (TRY(away))
			say("segv", (long)fault, 1);
		else
			say("value", base[numbers[1]], 0);
	} else if (same(what, "store")) {
		if (TRY(away)) {
			say("segv", (long)fault, 1);
		} else {
			base[numbers[1]] = (unsigned char)numbers[2];
			say("stored", 0, 0);
		}
	} else if (same(what, "in") || same(what, "out")) {
		copy(what[0] == 'i');
	} else if (same(what, "map")) {
		map();
	} else if (same(what, "unmap")) {
		say("result", munmap((void *)base, numbers[1]), 0);
	} else if (same(what, "fork")) {
		answer_forked();
	} else {
		return 0;
	}
	return 1;
}

#ifndef RAW
static void result(long value)
{
	if (value < 0)
		say("errno", errno, 0);
	else
		say("result", value, 0);
}

static void at(void *memory)
{
	if (memory == MAP_FAILED) {
		say("errno", errno, 0);
		return;
	}
	base = memory;
	say("at", (long)memory, 1);
}

static void *map_elsewhere(void *argument)
{
	(void)argument;
	at(mmap(NULL, numbers[2], (int)numbers[3], (int)numbers[5], fd, (long)numbers[1]));
	return NULL;
}

static void *wait_for_ever(void *argument)
{
	pause();
	return argument;
}

static int receive(const char *path)
{
	union { char space[CMSG_SPACE(sizeof(int))]; struct cmsghdr align; } control;
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	char byte;
	struct iovec part = { &byte, 1 };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
				  .msg_controllen = sizeof control };
	int from = socket(AF_UNIX, SOCK_STREAM, 0), got;

	strncpy(address.sun_path, path, sizeof address.sun_path - 1);
	if (connect(from, (struct sockaddr *)&address, sizeof address) || recvmsg(from, &message, 0) != 1)
		return -1;
	memcpy(&got, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof got);
	close(from);
	return got;
}

/* What only some tests ask for, of the C programs. */
static int special(const char *what)
{
	pthread_t thread;

	if (same(what, "open")) {
		fd = open(words[1], words[2][1] ? O_RDWR : O_RDONLY);
		result(fd);
	} else if (same(what, "close")) {
		result(close((int)numbers[1]));
	} else if (same(what, "use")) { /* a descriptor that is there already */
		fd = (int)numbers[1];
		result(fd);
	} else if (same(what, "dup")) {
		result(fd = dup(fd));
	} else if (same(what, "receive")) {
		result(fd = receive(words[1]));
	} else if (same(what, "mmap")) { /* OFFSET LENGTH PROT by-another-thread FLAGS */
		if (numbers[4]) {
			pthread_create(&thread, NULL, map_elsewhere, NULL);
			pthread_join(thread, NULL);
		} else {
			map_elsewhere(NULL);
		}
	} else if (same(what, "base")) {
		base = (void *)strtoul(words[1], NULL, 16);
		say("at", (long)base, 1);
	} else if (same(what, "munmap")) { /* OFFSET LENGTH */
		result(munmap((void *)(base + numbers[1]), numbers[2]));
	} else if (same(what, "mprotect")) {
		result(mprotect((void *)(base + numbers[1]), numbers[2], (int)numbers[3]));
	} else if (same(what, "mremap")) { /* OLD NEW moved */
		void *aim = MAP_FAILED;
		if (numbers[3])
			aim = mmap(NULL, numbers[2], PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		at(mremap((void *)base, numbers[1], numbers[2],
			  numbers[3] ? MREMAP_MAYMOVE | MREMAP_FIXED : MREMAP_MAYMOVE, aim));
	} else if (same(what, "protect")) {
		struct mshare_protect args = { numbers[1], numbers[2], (uint32_t)numbers[3], 0 };
		result(ioctl(fd, MSHAREFS_PROTECT, &args));
	} else if (same(what, "create")) { /* OFFSET SIZE PROT MORE-FLAGS */
		struct mshare_create args = { numbers[1], numbers[2], 0, (uint32_t)numbers[3],
			MAP_SHARED | MAP_FIXED | MAP_ANONYMOUS | (uint32_t)numbers[4], (uint32_t)-1 };
		result(ioctl(fd, MSHAREFS_CREATE_MAPPING, &args));
	} else if (same(what, "remove")) {
		struct mshare_unmap args = { numbers[1], numbers[2] };
		result(ioctl(fd, MSHAREFS_UNMAP, &args));
	} else if (same(what, "toggle")) { /* OFFSET SIZE TIMES: r-- and rw- again; failures, EINTR too */
		long failures = 0;
		for (unsigned long i = 0; i < 2 * numbers[3]; i++) {
			struct mshare_protect args = { numbers[1], numbers[2], i % 2 ? 3 : 1, 0 };
			failures += ioctl(fd, MSHAREFS_PROTECT, &args) != 0;
		}
		result(failures);
	} else if (same(what, "repair")) { /* OFFSET SIZE: how on_fault mends things from now on */
		repair_at = numbers[1];
		repair_size = numbers[2];
		repairs = 0;
		result(0);
	} else if (same(what, "repairs")) {
		result(repairs);
	} else if (same(what, "thread")) {
		pthread_create(&thread, NULL, wait_for_ever, NULL);
		result(0);
	} else if (same(what, "exec")) { /* this program anew, its descriptors with it */
		char *argv[] = { words[0], NULL };
		fcntl(fd, F_SETFD, 0);
		execv("/proc/self/exe", argv);
		_exit(8);
	} else {
		return 0;
	}
	return 1;
}
#endif

static void serve(void)
{
	for (;;) {
		split(next_line());
#ifdef RAW
		if (!basic(words[0]))
			say("what", 0, 0);
#else
		if (!basic(words[0]) && !special(words[0]))
			say("what", 0, 0);
#endif
	}
}

int main(void)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	handle(SIGSEGV, on_fault, SA_SIGINFO);
	handle(SIGCHLD, SIG_IGN, 0); /* children are reaped by the kernel */
	say("ready", getpid(), 0);
	serve();
	return 0;
}
