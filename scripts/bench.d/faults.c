/* Stores to a range that is watched in log mode: how soon they are read of, and how many.
 *
 * usage: faults REGION EVENTS latency COUNT
 *        faults REGION EVENTS rate PER_SECOND SECONDS
 *        faults REGION EVENTS burst PAGES ROUNDS
 *
 * REGION is made here; EVENTS is its event file. Every page is touched before it is watched, and
 * stored to once afterwards. A thread reads EVENTS as they come.
 *
 * latency prints "store NANOSECONDS" and "line NANOSECONDS" for each store: until the store was done,
 * and until the line that tells of it had been read. The next store waits for that.
 * rate has several threads store at fixed times, and prints "rate STORES REPORTED LOST NANOSECONDS":
 * reports read, reports that an overflow said were lost, and the time from the first store to the
 * end of the last.
 * burst stores to all pages, one after another, and prints "plain", "caught" and "scanned
 * NANOSECONDS" for each page in each round: not watched, watched, and watched with _SCAN. Nobody reads.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "bench.h"
#include "msharefs.h"

#define PAGE 4096u
#define THREADS 8
#define PATIENCE 20000 /* milliseconds without an event, after which no more is expected */

static size_t pages;
static char *memory;
static const char *events;
static atomic_llong *told; /* when the line about a page was read; 0: not yet */
static atomic_int lines;   /* a futex: goes up as lines are read */
static atomic_long reported, lost;
static long long first_store, interval;

static long number_after(const char *line, const char *key)
{
	const char *found = strstr(line, key);

	return found ? strtol(found + strlen(key), NULL, 10) : -1;
}

static void take_line(const char *line, long long when)
{
	long page;

	if (strstr(line, "\"event\": \"overflow\"")) {
		atomic_fetch_add(&lost, number_after(line, "\"lost\": "));
		return;
	}
	page = number_after(line, "\"offset\": ") / (long)PAGE;
	if (!strstr(line, "\"event\": \"fault\"") || page < 0 || (size_t)page >= pages)
		return;
	if (!atomic_exchange(&told[page], when))
		atomic_fetch_add(&reported, 1);
}

static void *read_events(void *unused)
{
	static char buffer[1 << 17];
	struct pollfd file = {.fd = open(events, O_RDONLY), .events = POLLIN};
	size_t kept = 0;

	(void)unused;
	if (file.fd < 0)
		fail(events);
	while ((size_t)(reported + lost) < pages) {
		char *line = buffer, *end;
		ssize_t count;
		long long when;

		if (poll(&file, 1, PATIENCE) != 1)
			break;
		count = read(file.fd, buffer + kept, sizeof buffer - 1 - kept);
		if (count <= 0)
			fail("read");
		when = now();
		buffer[kept += (size_t)count] = 0;
		for (; (end = strchr(line, '\n')); line = end + 1) {
			*end = 0;
			take_line(line, when);
		}
		memmove(buffer, line, kept -= (size_t)(line - buffer));
		atomic_fetch_add(&lines, 1);
		syscall(SYS_futex, &lines, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
	}
	return NULL;
}

static void notify(int region, unsigned int events_wanted, unsigned int flags)
{
	struct mshare_notify notify = {
		.size = pages * PAGE,
		.events = events_wanted,
		.mode = MSHAREFS_NOTIFY_LOG,
		.flags = flags,
	};

	if (ioctl(region, MSHAREFS_NOTIFY, &notify))
		fail("MSHAREFS_NOTIFY");
}

static int set_up(const char *path)
{
	struct mshare_create create = {
		.size = pages * PAGE,
		.prot = PROT_READ | PROT_WRITE,
		.flags = MAP_SHARED | MAP_FIXED | MAP_ANONYMOUS,
		.fd = (uint32_t)-1,
	};
	int region = open(path, O_RDWR | O_CREAT, 0600);

	if (region < 0 || ftruncate(region, (off_t)create.size))
		fail(path);
	if (ioctl(region, MSHAREFS_CREATE_MAPPING, &create))
		fail("MSHAREFS_CREATE_MAPPING");
	memory = mmap(NULL, create.size, PROT_READ | PROT_WRITE, MAP_SHARED, region, 0);
	if (memory == MAP_FAILED)
		fail("mmap");
	for (size_t page = 0; page < pages; page++)
		*(volatile char *)(memory + page * PAGE) = 1;
	notify(region, MSHAREFS_NOTIFY_WRITE, 0);
	told = calloc(pages, sizeof *told);
	return region;
}

static void store(size_t page)
{
	*(volatile char *)(memory + page * PAGE) = 2;
}

static void measure_latency(void)
{
	struct timespec patience = {.tv_sec = PATIENCE / 1000};

	for (size_t page = 0; page < pages; page++) {
		long long started = now(), stored;

		store(page);
		stored = now();
		while (!told[page]) {
			int seen = lines;

			if (!told[page] && syscall(SYS_futex, &lines, FUTEX_WAIT_PRIVATE, seen,
						   &patience, NULL, 0) &&
			    now() - stored > patience.tv_sec * 1000000000LL) {
				fprintf(stderr, "no line tells of the store to page %zu\n", page);
				exit(1);
			}
		}
		printf("store %lld\nline %lld\n", stored - started, told[page] - started);
	}
}

static void *store_in_time(void *which)
{
	for (size_t page = (size_t)(uintptr_t)which; page < pages; page += THREADS) {
		long long due = first_store + (long long)page * interval;
		struct timespec until = {.tv_sec = due / 1000000000, .tv_nsec = due % 1000000000};

		clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
		store(page);
	}
	return NULL;
}

static void measure_rate(pthread_t reader)
{
	pthread_t thread[THREADS];
	long long taken;

	first_store = now() + 1000000;
	for (uintptr_t i = 0; i < THREADS; i++)
		if (pthread_create(&thread[i], NULL, store_in_time, (void *)i))
			fail("pthread_create");
	for (int i = 0; i < THREADS; i++)
		pthread_join(thread[i], NULL);
	taken = now() - first_store;
	pthread_join(reader, NULL);
	printf("rate %zu %ld %ld %lld\n", pages, reported, lost, taken);
}

static void measure_burst(int region, unsigned long rounds)
{
	static const struct {
		const char *name;
		unsigned int events, flags;
	} ways[] = {
		{"plain", MSHAREFS_NOTIFY_DISARM, 0},
		{"caught", MSHAREFS_NOTIFY_WRITE, 0},
		{"scanned", MSHAREFS_NOTIFY_WRITE, MSHAREFS_NOTIFY_SCAN},
	};

	while (rounds--)
		for (size_t way = 0; way < 3; way++) {
			long long started;

			notify(region, ways[way].events, ways[way].flags);
			started = now();
			for (size_t page = 0; page < pages; page++)
				store(page);
			printf("%s %lld\n", ways[way].name, (now() - started) / (long long)pages);
		}
}

int main(int argc, char **argv)
{
	int rate = argc == 6 && !strcmp(argv[3], "rate");
	int burst = argc == 6 && !strcmp(argv[3], "burst");
	int region;
	pthread_t reader;

	if (!rate && !burst && (argc != 5 || strcmp(argv[3], "latency"))) {
		fprintf(stderr,
			"usage: %s REGION EVENTS latency COUNT | rate PER_SECOND SECONDS |"
			" burst PAGES ROUNDS\n",
			argv[0]);
		return 2;
	}
	events = argv[2];
	pages = strtoul(argv[4], NULL, 10);
	if (rate) {
		interval = 1000000000LL / (long long)pages;
		pages *= strtoul(argv[5], NULL, 10);
	}
	region = set_up(argv[1]);
	if (burst) {
		measure_burst(region, strtoul(argv[5], NULL, 10));
		return 0;
	}
	if (pthread_create(&reader, NULL, read_events, NULL))
		fail("pthread_create");
	if (rate) {
		measure_rate(reader);
	} else {
		measure_latency();
		pthread_join(reader, NULL);
	}
	return 0;
}
