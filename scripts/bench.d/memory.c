/* Memory through a region against a plain memfd, in pairs one right after the other.
 *
 * usage: memory REGION SIZE ROUNDS
 *
 * Prints "KIND SIDE NANOSECONDS" for each pass over SIZE bytes. KIND is touch (one store into each
 * page of memory that nobody has touched), write (memcpy into the mapping) or read (memcpy out of
 * it); SIDE is region or memfd. The n-th line of a KIND and SIDE pairs with the n-th of the other
 * side; which of the two goes first alternates.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "bench.h"
#include "msharefs.h"

#define CHUNK (1u << 20)
#define PASSES 3 /* of write and of read over the same memory, in each round */

static const char *const name_of[2] = {"region", "memfd"};
static char *copy; /* CHUNK bytes, private */

/* The same range again, with memory that nobody has touched. */
static char *fresh(int side, int fd, size_t size, char *old)
{
	char *p;

	if (old && munmap(old, size))
		fail("munmap");
	if (side == 0) {
		struct mshare_create map = {
			.size = size,
			.prot = PROT_READ | PROT_WRITE,
			.flags = MAP_SHARED | MAP_FIXED | MAP_ANONYMOUS,
			.fd = (uint32_t)-1,
		};
		if (ioctl(fd, MSHAREFS_CREATE_MAPPING, &map))
			fail("MSHAREFS_CREATE_MAPPING");
	} else if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, size)) {
		fail("fallocate");
	}
	p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (p == MAP_FAILED)
		fail("mmap");
	return p;
}

static void touch(char *p, size_t size)
{
	for (size_t at = 0; at < size; at += 4096)
		*(volatile char *)(p + at) = 1;
}

static void copy_in(char *p, size_t size)
{
	for (size_t at = 0; at < size; at += CHUNK) {
		memcpy(p + at, copy, CHUNK);
		__asm__ volatile("" ::: "memory");
	}
}

static void copy_out(char *p, size_t size)
{
	for (size_t at = 0; at < size; at += CHUNK) {
		memcpy(copy, p + at, CHUNK);
		__asm__ volatile("" ::: "memory");
	}
}

static void timed(const char *kind, void (*pass)(char *, size_t), char *p[2], size_t size, int first)
{
	for (int i = 0; i < 2; i++) {
		int side = i ^ first;
		long long started = now();

		pass(p[side], size);
		printf("%s %s %lld\n", kind, name_of[side], now() - started);
	}
}

int main(int argc, char **argv)
{
	char *p[2] = {NULL, NULL}, *seen;
	int fd[2], first = 0;

	if (argc != 4) {
		fprintf(stderr, "usage: memory REGION SIZE ROUNDS\n");
		return 2;
	}
	size_t size = strtoull(argv[2], NULL, 0);
	int rounds = atoi(argv[3]);

	if (!size || size % CHUNK || rounds < 1) {
		fprintf(stderr, "memory: SIZE must be a multiple of 1 MiB, ROUNDS positive\n");
		return 2;
	}
	copy = malloc(CHUNK);
	seen = malloc(CHUNK);
	if (!copy || !seen)
		fail("malloc");
	fd[0] = open(argv[1], O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	fd[1] = memfd_create("bench", MFD_CLOEXEC);
	if (fd[0] < 0 || fd[1] < 0)
		fail(argv[1]);
	for (int side = 0; side < 2; side++)
		if (ftruncate(fd[side], size))
			fail("ftruncate");

	for (int round = 0; round < rounds; round++, first ^= 1) {
		memset(copy, 'a' + round % 26, CHUNK);
		for (int side = 0; side < 2; side++)
			p[side] = fresh(side, fd[side], size, p[side]);
		timed("touch", touch, p, size, first);
		for (int pass = 0; pass < PASSES; pass++)
			timed("write", copy_in, p, size, first ^ (pass & 1));
		for (int pass = 0; pass < PASSES; pass++)
			timed("read", copy_out, p, size, first ^ (pass & 1));
		/* What was stored is in the region's file, not in some copy of this process. */
		for (int side = 0; side < 2; side++)
			if (pread(fd[side], seen, 4096, size - 4096) != 4096 ||
			    memcmp(seen, copy, 4096)) {
				fprintf(stderr, "memory: the %s does not hold what was stored\n",
					name_of[side]);
				return 1;
			}
	}
	return 0;
}
