/* System calls on a region, and the same calls on a file of a plain FUSE filesystem.
 *
 * usage: calls REGION PLAIN ROUNDS COUNT [CPU]
 *
 * Prints "CALL SIDE NANOSECONDS..." for each CALL and SIDE of each round, COUNT samples in a line,
 * fewer of slow calls. SIDE is region or plain; which goes first alternates from round to round.
 * With CPU, runs on that one.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bench.h"
#include "msharefs.h"

#define PAGE 4096u
#define LENGTH (2 * PAGE)
#define OTHER (4 * PAGE) /* where the second mapping lies */

static const char *path[2];
static int region;

static void map(uint64_t offset, uint32_t prot)
{
	struct mshare_create args = {
		.region_offset = offset,
		.size = LENGTH,
		.prot = prot,
		.flags = MAP_SHARED | MAP_FIXED | MAP_ANONYMOUS,
		.fd = (uint32_t)-1,
	};

	if (ioctl(region, MSHAREFS_CREATE_MAPPING, &args))
		fail("MSHAREFS_CREATE_MAPPING");
}

static void protect(uint64_t offset, uint32_t prot)
{
	struct mshare_protect args = {.region_offset = offset, .size = LENGTH, .prot = prot};

	if (ioctl(region, MSHAREFS_PROTECT, &args))
		fail("MSHAREFS_PROTECT");
}

/* Each takes the side and the number of the sample, and returns the time the call took. */

/* The other mapping stays writable, so the region as a whole gains and loses nothing. */
static long long time_protect(int side, int n)
{
	long long started = now();

	(void)side;
	protect(0, n & 1 ? PROT_READ | PROT_WRITE : PROT_READ);
	return now() - started;
}

/* A right the region did not give: every descriptor and mapping has to be looked at first. */
static long long time_protect_gain(int side, int n)
{
	long long started, taken;

	(void)side, (void)n;
	protect(OTHER, PROT_READ);
	protect(0, PROT_READ);
	started = now();
	protect(0, PROT_READ | PROT_WRITE);
	taken = now() - started;
	protect(OTHER, PROT_READ | PROT_WRITE);
	return taken;
}

static long long time_query(int side, int n)
{
	struct mshare_query args = {.region_offset = PAGE};
	long long started = now();

	(void)side, (void)n;
	if (ioctl(region, MSHAREFS_QUERY, &args))
		fail("MSHAREFS_QUERY");
	return now() - started;
}

static long long time_info(int side, int n)
{
	struct mshare_info_args args;
	long long started = now();

	(void)side, (void)n;
	if (ioctl(region, MSHAREFS_INFO, &args))
		fail("MSHAREFS_INFO");
	return now() - started;
}

static long long time_stat(int side, int n)
{
	struct stat st;
	long long started = now();

	(void)n;
	if (stat(path[side], &st))
		fail(path[side]);
	return now() - started;
}

static long long time_open_close(int side, int n)
{
	long long started = now();
	int fd = open(path[side], O_RDWR | O_CLOEXEC);

	(void)n;
	if (fd < 0 || close(fd))
		fail(path[side]);
	return now() - started;
}

static const struct call {
	const char *name;
	long long (*timed)(int side, int n);
	int sides;
	int share; /* of COUNT: one in so many, for calls that take milliseconds */
} calls[] = {
	{"protect", time_protect, 1, 1},
	{"protect_gain", time_protect_gain, 1, 10},
	{"query", time_query, 1, 1},
	{"info", time_info, 1, 1},
	{"stat", time_stat, 2, 1},
	{"open_close", time_open_close, 2, 1},
};

int main(int argc, char **argv)
{
	static const char *const side_name[2] = {"region", "plain"};

	if (argc != 5 && argc != 6) {
		fprintf(stderr, "usage: calls REGION PLAIN ROUNDS COUNT [CPU]\n");
		return 2;
	}
	path[0] = argv[1];
	path[1] = argv[2];
	int rounds = atoi(argv[3]), count = atoi(argv[4]);

	if (argc == 6) {
		cpu_set_t set;

		CPU_ZERO(&set);
		CPU_SET(atoi(argv[5]), &set);
		if (sched_setaffinity(0, sizeof(set), &set))
			fail("sched_setaffinity");
	}
	region = open(path[0], O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	if (region < 0)
		fail(path[0]);
	if (ftruncate(region, 8 * PAGE))
		fail("ftruncate");
	map(0, PROT_READ | PROT_WRITE);
	map(OTHER, PROT_READ | PROT_WRITE);

	for (int round = 0; round < rounds; round++)
		for (size_t i = 0; i < sizeof(calls) / sizeof(calls[0]); i++)
			for (int k = 0; k < calls[i].sides; k++) {
				int side = calls[i].sides == 2 ? k ^ (round & 1) : 0;

				for (int n = -4; n < 0; n++) /* warm */
					calls[i].timed(side, n);
				printf("%s %s", calls[i].name, side_name[side]);
				for (int n = 0; n < count / calls[i].share; n++)
					printf(" %lld", calls[i].timed(side, n));
				printf("\n");
			}
	return 0;
}
