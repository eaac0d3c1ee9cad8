/* What the first open() and mmap() of a file cost a process, on several files in turn.
 *
 * usage: adopt ROUNDS COUNT NAME=PATH...
 *
 * COUNT times in each round, a new process opens PATH, maps it, and touches it; NAMEs take turns.
 * The files are made here, four pages read-write; regions with a mapping over all of it.
 * Prints "CALL NAME NANOSECONDS..." for each round, CALL being open, mmap, or both.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bench.h"
#include "msharefs.h"

#define SIZE 16384u
#define MOST 8

static void make(const char *path)
{
	struct mshare_create args = {
		.size = SIZE,
		.prot = PROT_READ | PROT_WRITE,
		.flags = MAP_SHARED | MAP_FIXED | MAP_ANONYMOUS,
		.fd = (uint32_t)-1,
	};
	int file = open(path, O_RDWR | O_CREAT, 0600);

	if (file < 0 || ftruncate(file, SIZE))
		fail(path);
	if (ioctl(file, MSHAREFS_CREATE_MAPPING, &args) && errno != ENOTTY)
		fail("MSHAREFS_CREATE_MAPPING");
	close(file);
}

static void measure_in_child(const char *path, long long taken[2])
{
	int ends[2], status;
	pid_t child;

	if (pipe2(ends, O_CLOEXEC))
		fail("pipe");
	child = fork();
	if (child < 0)
		fail("fork");
	if (!child) {
		long long started = now(), opened, mapped;
		int file = open(path, O_RDWR);
		char *memory;

		opened = now();
		memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
		mapped = now();
		if (memory == MAP_FAILED)
			_exit(1);
		*(volatile char *)memory = 1;
		taken[0] = opened - started;
		taken[1] = mapped - opened;
		_exit(write(ends[1], taken, 2 * sizeof *taken) != 2 * sizeof *taken);
	}
	close(ends[1]);
	if (read(ends[0], taken, 2 * sizeof *taken) != 2 * sizeof *taken)
		fail(path);
	close(ends[0]);
	if (waitpid(child, &status, 0) != child || status)
		fail("the child");
}

int main(int argc, char **argv)
{
	int rounds, count, files = argc - 3;
	long long *taken;

	if (argc < 4 || files > MOST) {
		fprintf(stderr, "usage: %s ROUNDS COUNT NAME=PATH...\n", argv[0]);
		return 2;
	}
	rounds = atoi(argv[1]);
	count = atoi(argv[2]);
	taken = calloc((size_t)(2 * files * count), sizeof *taken);
	for (int f = 0; f < files; f++)
		make(strchr(argv[3 + f], '=') + 1);
	for (int round = 0; round < rounds; round++) {
		for (int n = 0; n < count; n++)
			for (int f = 0; f < files; f++)
				measure_in_child(strchr(argv[3 + f], '=') + 1,
						 taken + 2 * (f * count + n));
		for (int f = 0; f < files; f++)
			for (int call = 0; call < 3; call++) {
				static const char *const name[] = {"open", "mmap", "both"};
				char *end = strchr(argv[3 + f], '=');

				printf("%s %.*s", name[call], (int)(end - argv[3 + f]), argv[3 + f]);
				for (int n = 0; n < count; n++) {
					long long *t = taken + 2 * (f * count + n);

					printf(" %lld", call == 2 ? t[0] + t[1] : t[call]);
				}
				putchar('\n');
			}
	}
	return 0;
}
