/* Stores as fast as can be, in many threads and processes, and goes on after each SIGSEGV.
 *
 *   storm REGION PAGES COUNTERS FIRST threads PROCESSES THREADS
 *   storm REGION PAGES COUNTERS FIRST forks SERVERS 0
 *
 * REGION is mapped once, then the processes are forked. Each thread has a slot of its own, numbered
 * from FIRST, in each of the PAGES: 8 bytes, to which it stores 1, 2, 3, ... COUNTERS is an ordinary
 * file: for each slot the number of stores that were made, that of faults, and what was stored last
 * in each page. With "forks" each server forks all the time, and what stores are its children and
 * their children, each some times in a slot that it shares with others. Ends with standard input.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, SLOTS = 64, CHILDREN = 4, TIMES = 400 };

struct counters {
	volatile uint64_t stores, faults, last[62];
};

static volatile char *region;
static struct counters *counters;
static long pages;
static _Thread_local sigjmp_buf away;

static void on_fault(int number)
{
	(void)number;
	siglongjmp(away, 1);
}

static void store(long slot, long page, uint64_t value)
{
	struct counters *mine = counters + slot;

	if (sigsetjmp(away, 0)) {
		mine->faults++;
		return;
	}
	((volatile uint64_t *)(region + page * PAGE))[slot] = value;
	mine->stores++;
	mine->last[page] = value;
}

static void *stores_for_ever(void *argument)
{
	for (uint64_t n = 1;; n++)
		for (long page = 0; page < pages; page++)
			store((long)argument, page, n);
	return NULL;
}

static void child(long slot, uint64_t n)
{
	for (int i = 0; i < TIMES; i++)
		store(slot, i % pages, n * TIMES + (uint64_t)i);
	_exit(0);
}

static void forks_for_ever(long slot)
{
	int running = 0;

	for (uint64_t n = 1;; n++) {
		pid_t pid = fork();
		if (!pid) {
			if (n % 2)
				child(slot, n);
			pid = fork(); /* a grandchild, while the child goes on */
			if (!pid)
				child(slot + 1, n);
			if (pid > 0)
				waitpid(pid, NULL, 0);
			_exit(0);
		}
		running += pid > 0;
		while (running >= CHILDREN && wait(NULL) > 0)
			running--;
	}
}

static void *map(const char *path, size_t size)
{
	int fd = open(path, O_RDWR);
	void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (fd < 0 || memory == MAP_FAILED) {
		perror(path);
		exit(1);
	}
	close(fd);
	return memory;
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_handler = on_fault, .sa_flags = SA_NODEFER };
	long first, processes, threads;
	char byte;

	if (argc != 8)
		return 2;
	pages = atol(argv[2]);
	region = map(argv[1], (size_t)pages * PAGE);
	counters = map(argv[3], SLOTS * sizeof *counters);
	first = atol(argv[4]);
	processes = atol(argv[6]);
	threads = atol(argv[7]);
	sigaction(SIGSEGV, &action, NULL);
	setpriority(PRIO_PROCESS, 0, 10); /* whoever watches is to get his turn */
	for (long i = 0; i < processes; i++) {
		if (fork())
			continue;
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (!strcmp(argv[5], "forks"))
			forks_for_ever(first + 2 * i);
		for (long j = 1; j < threads; j++) {
			pthread_t thread;
			pthread_create(&thread, NULL, stores_for_ever, (void *)(first + i * threads + j));
		}
		stores_for_ever((void *)(first + i * threads));
	}
	printf("ready %d\n", getpid());
	fflush(stdout);
	return read(0, &byte, 1) == 1;
}
