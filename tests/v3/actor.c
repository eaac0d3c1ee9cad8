/*
 * A process that makes the calls it is told on its standard input, one a line, and says what came
 * of each: "= NUMBER" in hexadecimal, or "! ERRNO", or "? SIGNO ADDRESS" where an access was caught.
 *
 *   map PATH MODE ADDR LEN PROT FLAGS OFFSET   open, mmap and close: what mmap returned
 *   munmap ADDR LEN
 *   mprotect ADDR LEN PROT      mremap ADDR OLD NEW
 *   peek ADDR                   poke ADDR VALUE      (one byte)
 *   fork PATH...                a child, which goes on with what it reads from the first fifo and
 *                               writes to the second
 *   often PATH LEN COUNT        map it and unmap it, again and again; says how often the address was no
 *                               multiple of 512 GiB
 *   storm PATH LEN THREADS      so many threads open and map the region at the same moment; says how
 *                               many addresses are no multiple of 512 GiB, or failed
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static sigjmp_buf back;
static volatile unsigned long fault_at;

static void on_fault(int number, siginfo_t *info, void *context)
{
	(void)context;
	fault_at = (unsigned long)info->si_addr;
	siglongjmp(back, number);
}

static void say(long result)
{
	if (result == -1)
		printf("! %d\n", errno);
	else
		printf("= %lx\n", (unsigned long)result);
}

/* All at once: the gate attends to who has opened a region for half a second. */
static long map(const char *path, int mode, unsigned long address, unsigned long length, int prot,
		int flags, long offset)
{
	int fd = open(path, mode | O_CLOEXEC), code;
	void *found;

	if (fd < 0)
		return -1;
	found = mmap((void *)address, length, prot, flags, fd, offset);
	code = errno;
	close(fd);
	errno = code;
	return (long)found;
}

static long often(const char *path, unsigned long length, long count)
{
	unsigned long at;
	long bad = 0;

	while (count--) {
		at = (unsigned long)map(path, O_RDWR, 0, length, PROT_READ, MAP_SHARED, 0);
		bad += (at & ((1UL << 39) - 1)) != 0;
		munmap((void *)at, length);
	}
	return bad;
}

static pthread_barrier_t together;
static const char *storm_path;
static unsigned long storm_length;

static void *storm_thread(void *unused)
{
	int fd;
	void *at = MAP_FAILED;

	(void)unused;
	pthread_barrier_wait(&together);
	fd = open(storm_path, O_RDWR | O_CLOEXEC);
	if (fd >= 0)
		at = mmap(NULL, storm_length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (at == MAP_FAILED)
		return (void *)1UL;
	return (void *)((unsigned long)at & ((1UL << 39) - 1));
}

static long storm(const char *path, unsigned long length, long count)
{
	pthread_t *threads = calloc(count, sizeof(*threads));
	void *result;
	long bad = 0, i;

	storm_path = path;
	storm_length = length;
	pthread_barrier_init(&together, NULL, count);
	for (i = 0; i < count; i++)
		if (pthread_create(&threads[i], NULL, storm_thread, NULL))
			abort();
	for (i = 0; i < count; i++) {
		pthread_join(threads[i], &result);
		bad += result != NULL;
	}
	pthread_barrier_destroy(&together);
	free(threads);
	return bad;
}

int main(void)
{
	static char line[8192], path[4096], other[4096];
	struct sigaction action = { .sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER };
	unsigned long a, b, c, d, e, f;
	int caught;

	setvbuf(stdout, NULL, _IOLBF, 0);
	sigaction(SIGSEGV, &action, NULL);
	sigaction(SIGBUS, &action, NULL);
	while (fgets(line, sizeof(line), stdin)) {
		caught = sigsetjmp(back, 1);
		if (caught)
			printf("? %d %lx\n", caught, fault_at);
		else if (sscanf(line, "map %4095s %li %li %li %li %li %li", path, (long *)&a, (long *)&b,
				(long *)&c, (long *)&d, (long *)&e, (long *)&f) == 7)
			say(map(path, (int)a, b, c, (int)d, (int)e, (long)f));
		else if (sscanf(line, "munmap %li %li", (long *)&a, (long *)&b) == 2)
			say(munmap((void *)a, b));
		else if (sscanf(line, "mprotect %li %li %li", (long *)&a, (long *)&b, (long *)&c) == 3)
			say(mprotect((void *)a, b, (int)c));
		else if (sscanf(line, "mremap %li %li %li", (long *)&a, (long *)&b, (long *)&c) == 3)
			say((long)mremap((void *)a, b, c, MREMAP_MAYMOVE));
		else if (sscanf(line, "peek %li", (long *)&a) == 1)
			say(*(volatile unsigned char *)a);
		else if (sscanf(line, "poke %li %li", (long *)&a, (long *)&b) == 2) {
			*(volatile unsigned char *)a = (unsigned char)b;
			say(0);
		} else if (sscanf(line, "often %4095s %li %li", path, (long *)&a, (long *)&b) == 3)
			say(often(path, a, (long)b));
		else if (sscanf(line, "storm %4095s %li %li", path, (long *)&a, (long *)&b) == 3)
			say(storm(path, a, (long)b));
		else if (sscanf(line, "fork %4095s %4095s", path, other) == 2) {
			pid_t child = fork();
			if (!child && (!freopen(path, "r", stdin) || !freopen(other, "w", stdout)))
				_exit(1);
			if (!child) {
				setvbuf(stdout, NULL, _IOLBF, 0);
				say(getpid());
			} else
				say(child);
		} else {
			fprintf(stderr, "what? %s", line);
			return 1;
		}
	}
	return 0;
}
