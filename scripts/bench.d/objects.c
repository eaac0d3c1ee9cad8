/* A file in a region: how long it takes to get it there, and what it is like to use it.
 *
 * usage: objects create REGION FILE SIZE CLIENTS ROUNDS
 *        objects access REGION FILE SIZE ROUNDS
 *
 * FILE has SIZE bytes, each the number of its MiB (modulo 251); "access" leaves other ones in it.
 *
 * create: CLIENTS processes map REGION. In each round SIZE bytes of the file are laid into it by
 * MSHAREFS_CREATE_MAPPING, the first of the clients (this process) loads a byte at once, all the
 * others are asked for one, and the range is taken out again. Prints "create", "first", "unmap", and
 * for a plain mapping of the file by this process alone "mmap" and "plain" (the first load), each
 * with nanoseconds.
 *
 * access: passes over the file mapped through REGION and mapped plainly, in pairs one right after the
 * other. Prints "KIND SIDE NANOSECONDS"; KIND is touch (a load from each page of a mapping that is
 * new), read, write (sequential), load, store (one from or to each of PICKS places at random). The
 * n-th line of a KIND and SIDE pairs with the n-th of the other side; which goes first alternates.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bench.h"
#include "msharefs.h"

#define MIB (1u << 20)
#define PICKS (1u << 20)

enum { REGION, PLAIN };
static const char *const side_name[] = {"region", "plain"};
static char *copy; /* MIB bytes, private */
static size_t size;
static volatile uint64_t sink;

static unsigned char expected(size_t offset) { return (unsigned char)(offset / MIB % 251); }

static void *mapped(int fd)
{
	void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (memory == MAP_FAILED)
		fail("mmap");
	return memory;
}

static void lay(int region, int file)
{
	struct mshare_create map = {.size = size, .prot = PROT_READ | PROT_WRITE,
				    .flags = MAP_SHARED | MAP_FIXED, .fd = (uint32_t)file};

	if (ioctl(region, MSHAREFS_CREATE_MAPPING, &map))
		fail("MSHAREFS_CREATE_MAPPING");
}

/* -- create */

static int asked[2], answered[2]; /* pipes: a place to look at each, and what was there */

static _Noreturn void be_a_client(const char *at, pid_t parent)
{
	size_t offset;

	if (prctl(PR_SET_PDEATHSIG, SIGKILL) || getppid() != parent)
		_exit(1);
	while (read(asked[0], &offset, sizeof offset) == sizeof offset) {
		char seen = at[offset];

		if (write(answered[1], &seen, 1) != 1)
			_exit(1);
	}
	_exit(0);
}

static void expect(unsigned char seen, size_t offset)
{
	if (seen != expected(offset)) {
		fprintf(stderr, "objects: %d at %zu is not the file's\n", seen, offset);
		exit(1);
	}
}

static void create(int region, int file, int clients, int rounds)
{
	volatile char *at = mapped(region);
	pid_t parent = getpid();

	if (pipe2(asked, O_CLOEXEC) || pipe2(answered, O_CLOEXEC))
		fail("pipe");
	for (int i = 1; i < clients; i++) {
		pid_t pid = fork();

		if (pid < 0)
			fail("fork");
		if (!pid) {
			close(asked[1]);
			close(answered[0]);
			be_a_client((const char *)at, parent);
		}
	}
	close(answered[1]);
	for (int round = -1; round < rounds; round++) { /* the first is to get used to it */
		struct mshare_unmap unmap = {.size = size};
		size_t offset = (size_t)(round + 1) * 37 * MIB % size;
		long long times[6] = {now()};

		lay(region, file);
		times[1] = now();
		expect((unsigned char)at[offset], offset);
		times[2] = now();
		for (int i = 1; i < clients; i++)
			if (write(asked[1], &offset, sizeof offset) != sizeof offset)
				fail("write");
		for (int i = 1; i < clients; i++) {
			unsigned char seen;

			if (read(answered[0], &seen, 1) != 1)
				fail("read");
			expect(seen, offset);
		}
		times[3] = now();
		if (ioctl(region, MSHAREFS_UNMAP, &unmap))
			fail("MSHAREFS_UNMAP");
		times[4] = now();
		volatile char *plain = mapped(file);
		times[5] = now();
		expect((unsigned char)plain[offset], offset);
		long long end = now();
		munmap((void *)plain, size);
		if (round < 0)
			continue;
		printf("create %lld\nfirst %lld\nunmap %lld\nmmap %lld\nplain %lld\n", times[1] - times[0],
		       times[2] - times[1], times[4] - times[3], times[5] - times[4], end - times[5]);
	}
	close(asked[1]);
	while (wait(NULL) > 0 || errno == EINTR)
		;
}

/* -- access */

static void touch(char *p)
{
	uint64_t sum = 0;

	for (size_t at = 0; at < size; at += 4096)
		sum += *(volatile unsigned char *)(p + at);
	sink = sum;
}

static void copy_out(char *p)
{
	for (size_t at = 0; at < size; at += MIB) {
		memcpy(copy, p + at, MIB);
		__asm__ volatile("" ::: "memory");
	}
}

static void copy_in(char *p)
{
	for (size_t at = 0; at < size; at += MIB) {
		memcpy(p + at, copy, MIB);
		__asm__ volatile("" ::: "memory");
	}
}

/* Knuth's MMIX generator: the same places each time. */
static size_t next_place(uint64_t *state)
{
	*state = *state * 6364136223846793005u + 1442695040888963407u;
	return (size_t)(*state >> 20) % size;
}

static void load_some(char *p)
{
	uint64_t state = 1, sum = 0;

	for (unsigned n = 0; n < PICKS; n++)
		sum += *(volatile unsigned char *)(p + next_place(&state));
	sink = sum;
}

static void store_some(char *p)
{
	uint64_t state = 1;

	for (unsigned n = 0; n < PICKS; n++)
		*(volatile char *)(p + next_place(&state)) = (char)n;
}

static const struct {
	const char *kind;
	void (*pass)(char *);
} passes[] = {
	{"touch", touch}, {"read", copy_out}, {"load", load_some},
	{"write", copy_in}, {"store", store_some},
};

/* Opened anew for each mapping: that is what a gate sees, and has the file in place before the first load. */
static void *mapped_anew(const char *path)
{
	int fd = open(path, O_RDWR | O_CLOEXEC);

	if (fd < 0)
		fail(path);
	void *memory = mapped(fd);

	close(fd);
	return memory;
}

static void access_both(const char *path, int region, int file, int rounds)
{
	lay(region, file);
	for (int round = 0; round < rounds; round++) {
		char *p[] = {mapped_anew(path), mapped(file)};

		memset(copy, 'a' + round % 26, MIB);
		for (size_t pass = 0; pass < sizeof passes / sizeof *passes; pass++)
			for (int i = 0; i < 2; i++) {
				int side = i ^ (round & 1);
				long long started = now();

				passes[pass].pass(p[side]);
				printf("%s %s %lld\n", passes[pass].kind, side_name[side], now() - started);
			}
		for (size_t at = 0; at < size; at += size / 64)
			if (p[REGION][at] != p[PLAIN][at]) {
				fprintf(stderr, "objects: the region does not show the file at %zu\n", at);
				exit(1);
			}
		for (int side = 0; side < 2; side++)
			munmap(p[side], size);
	}
}

int main(int argc, char **argv)
{
	if (argc < 6 || (strcmp(argv[1], "create") && strcmp(argv[1], "access")) ||
	    argc != (argv[1][0] == 'c' ? 7 : 6)) {
		fprintf(stderr, "usage: objects create REGION FILE SIZE CLIENTS ROUNDS\n"
				"       objects access REGION FILE SIZE ROUNDS\n");
		return 2;
	}
	int region = open(argv[2], O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	int file = open(argv[3], O_RDWR | O_CLOEXEC);

	size = strtoull(argv[4], NULL, 0);
	copy = malloc(MIB);
	if (region < 0 || file < 0 || !copy || ftruncate(region, size))
		fail(argv[2]);
	if (argc == 7)
		create(region, file, atoi(argv[5]), atoi(argv[6]));
	else
		access_both(argv[2], region, file, atoi(argv[5]));
	return unlink(argv[2]) ? 1 : 0;
}
