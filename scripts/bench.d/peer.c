/* PROTECT in many processes against what programs do today: tell each process to call mprotect().
 *
 * usage: peer REGION SIZE CLIENTS ROUNDS small|huge
 *
 * CLIENTS processes map REGION (made here, SIZE bytes read-write) and a plain file of the same
 * size, and touch every page of both: a memfd with small pages, or a file on a tmpfs of our own
 * with huge ones. In each round the region's range is made read-only and read-write again by
 * MSHAREFS_PROTECT, and the file's by the peer: a signal to each process, whose handler calls
 * mprotect() and confirms in shared memory; the last one wakes the controller. Which goes first
 * alternates.
 *
 * Prints "protect SIDE NANOSECONDS" and "restore SIDE NANOSECONDS" for each round, SIDE being region
 * or peer, and "pagetables SIDE KILOBYTES": by how much the page tables of one process have grown.
 * Fails unless a store is denied in every process while the region is read-only.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "bench.h"
#include "msharefs.h"

#define PAGE 4096u
#define EXTRA (2u << 20) /* stays writable, so that the region as a whole loses no right */
#define PATIENCE 120	 /* seconds */

enum { REGION, PEER };
static const char *const side_name[] = {"region", "peer"};

static struct control {
	atomic_int left;   /* processes that have yet to confirm; a futex */
	atomic_int denied; /* stores to the region that were */
	int prot;	   /* what the peer's processes are to set */
} *control;

static size_t size;
static char *at[2];
static pid_t *client;
static int clients;
static sigjmp_buf out_of_store;

/* -- in the clients */

static void confirm(void)
{
	if (atomic_fetch_sub(&control->left, 1) == 1)
		syscall(SYS_futex, &control->left, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static void on_protect(int number)
{
	(void)number;
	if (mprotect(at[PEER], size, control->prot))
		_exit(1);
	confirm();
}

static void on_segv(int number)
{
	(void)number;
	siglongjmp(out_of_store, 1);
}

static void on_try(int number)
{
	(void)number;
	if (sigsetjmp(out_of_store, 1))
		atomic_fetch_add(&control->denied, 1);
	else
		*(volatile char *)(at[REGION] + size / 2) = 1;
	confirm();
}

static void handle(int number, void (*handler)(int))
{
	struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART};

	if (sigaction(number, &action, NULL))
		fail("sigaction");
}

static void touch(char *memory)
{
	for (size_t offset = 0; offset < size; offset += PAGE)
		*(volatile char *)(memory + offset) = 1;
}

static _Noreturn void be_client(const char *path, int file)
{
	int region = open(path, O_RDWR);

	if (region < 0)
		_exit(1);
	at[REGION] = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, region, 0);
	at[PEER] = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	if (at[REGION] == MAP_FAILED || at[PEER] == MAP_FAILED)
		_exit(1);
	close(region);
	touch(at[REGION]);
	touch(at[PEER]);
	handle(SIGSEGV, on_segv);
	handle(SIGUSR1, on_protect);
	handle(SIGUSR2, on_try);
	confirm();
	for (;;)
		pause();
}

/* -- in the controller */

static void on_child(int number)
{
	static const char text[] = "a client has ended\n";

	(void)number;
	(void)!write(2, text, sizeof text - 1);
	_exit(1);
}

static void wait_for_all(void)
{
	struct timespec patience = {.tv_sec = PATIENCE};
	int left;

	while ((left = atomic_load(&control->left)) > 0)
		if (syscall(SYS_futex, &control->left, FUTEX_WAIT, left, &patience, NULL, 0) &&
		    errno == ETIMEDOUT) {
			fprintf(stderr, "%d of %d clients did not answer\n", left, clients);
			exit(1);
		}
}

static void tell_all(int number)
{
	atomic_store(&control->left, clients);
	for (int i = 0; i < clients; i++)
		if (kill(client[i], number))
			fail("kill");
	wait_for_all();
}

static long long set(int side, int region, int prot)
{
	struct mshare_protect args = {.size = size, .prot = (uint32_t)prot};
	long long started = now();

	if (side == PEER) {
		control->prot = prot;
		tell_all(SIGUSR1);
	} else if (ioctl(region, MSHAREFS_PROTECT, &args)) {
		fail("MSHAREFS_PROTECT");
	}
	return now() - started;
}

static double page_tables(void)
{
	double sum = 0;

	for (int i = 0; i < clients; i++) {
		char name[64], line[256];
		long kilobytes = -1;
		FILE *status;

		snprintf(name, sizeof name, "/proc/%d/status", client[i]);
		status = fopen(name, "r");
		if (!status)
			fail(name);
		while (fgets(line, sizeof line, status))
			if (sscanf(line, "VmPTE: %ld", &kilobytes) == 1)
				break;
		fclose(status);
		if (kilobytes < 0)
			fail("VmPTE");
		sum += (double)kilobytes;
	}
	return sum / clients;
}

static void start_clients(const char *path, int file)
{
	pid_t us = getpid();

	client = calloc((size_t)clients, sizeof *client);
	control->left = clients;
	for (int i = 0; i < clients; i++) {
		client[i] = fork();
		if (client[i] < 0)
			fail("fork");
		if (!client[i]) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			if (getppid() == us)
				be_client(path, file);
			_exit(1);
		}
	}
	handle(SIGCHLD, on_child);
	wait_for_all();
}

static int new_region(const char *path)
{
	struct mshare_create args = {
		.size = size + EXTRA,
		.prot = PROT_READ | PROT_WRITE,
		.flags = MAP_SHARED | MAP_FIXED | MAP_ANONYMOUS,
		.fd = (uint32_t)-1,
	};
	int region = open(path, O_RDWR | O_CREAT, 0600);

	if (region < 0 || ftruncate(region, (off_t)args.size))
		fail(path);
	if (ioctl(region, MSHAREFS_CREATE_MAPPING, &args))
		fail("MSHAREFS_CREATE_MAPPING");
	return region;
}

/* fsopen(2), fsconfig(2) and fsmount(2) are younger than the C library may be. */
static int new_file(int huge)
{
	int file = -1, filesystem, mount;

	if (!huge) {
		file = memfd_create("peer", MFD_CLOEXEC);
	} else {
		filesystem = (int)syscall(430, "tmpfs", 1);
		if (filesystem < 0 || syscall(431, filesystem, 1, "huge", "always", 0) ||
		    syscall(431, filesystem, 6, NULL, NULL, 0))
			fail("tmpfs with huge=always");
		mount = (int)syscall(432, filesystem, 1, 0);
		if (mount < 0)
			fail("fsmount");
		file = openat(mount, ".", O_TMPFILE | O_RDWR, 0600);
		close(mount);
		close(filesystem);
	}
	if (file < 0 || ftruncate(file, (off_t)size))
		fail("the peer's file");
	return file;
}

int main(int argc, char **argv)
{
	int region, file, rounds;
	double tables[3];

	if (argc != 6) {
		fprintf(stderr, "usage: %s REGION SIZE CLIENTS ROUNDS small|huge\n", argv[0]);
		return 2;
	}
	size = strtoul(argv[2], NULL, 10);
	clients = atoi(argv[3]);
	rounds = atoi(argv[4]);
	control = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (control == MAP_FAILED)
		fail("mmap");
	region = new_region(argv[1]);
	file = new_file(!strcmp(argv[5], "huge"));
	start_clients(argv[1], file);

	tables[0] = page_tables();
	set(PEER, region, PROT_READ);
	tables[1] = page_tables();
	set(PEER, region, PROT_READ | PROT_WRITE);
	set(REGION, region, PROT_READ);
	tables[2] = page_tables();
	tell_all(SIGUSR2);
	if (control->denied != clients) {
		fprintf(stderr, "stores denied after PROTECT: %d of %d\n", control->denied, clients);
		return 1;
	}
	set(REGION, region, PROT_READ | PROT_WRITE);
	printf("pagetables peer %.1f\n", tables[1] - tables[0]);
	printf("pagetables region %.1f\n", tables[2] - tables[1]);

	for (int round = 0; round < rounds; round++)
		for (int turn = 0; turn < 2; turn++) {
			int side = (round + turn) & 1;
			const char *name = side_name[side];

			printf("protect %s %lld\n", name, set(side, region, PROT_READ));
			printf("restore %s %lld\n", name,
			       set(side, region, PROT_READ | PROT_WRITE));
		}
	handle(SIGCHLD, SIG_DFL);
	for (int i = 0; i < clients; i++)
		kill(client[i], SIGKILL);
	return 0;
}
