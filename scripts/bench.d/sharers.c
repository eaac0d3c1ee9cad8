/* Processes that share one region, each of which has touched every page of it.
 *
 * usage: sharers REGION SIZE
 *
 * Makes REGION with SIZE bytes of memory. Reads numbers from standard input, a line each: at each,
 * goes on until there are so many clients, and prints "ready N". This process is the first client
 * and fills the region; the others are forked from it, have its mapping, and read a byte of each
 * page. At the end of the input all of them end.
 *
 * Whatever ends this process, its clients end as well (PR_SET_PDEATHSIG).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "msharefs.h"

#define AT_ONCE 8 /* clients that touch at the same time: the processors are few */

static size_t size;
static char *at;
static int done[2]; /* a pipe: a byte for each client that has touched all, FAILED for one that died */
static pid_t *forked;
static int count; /* of clients, with this process */

enum { TOUCHED, FAILED };

static void end_all(void)
{
	signal(SIGCHLD, SIG_DFL);
	for (int i = 0; i < count - 1; i++)
		kill(forked[i], SIGKILL);
	while (wait(NULL) > 0 || errno == EINTR)
		;
}

static void fail(const char *what)
{
	perror(what);
	end_all();
	exit(1);
}

static void tell(char what)
{
	if (write(done[1], &what, 1) != 1)
		_exit(1);
}

static void on_death(int number)
{
	(void)number;
	tell(FAILED);
}

static void be_a_client(pid_t parent)
{
	signal(SIGCHLD, SIG_DFL);
	if (prctl(PR_SET_PDEATHSIG, SIGKILL) || getppid() != parent)
		_exit(1);
	for (size_t page = 0; page < size; page += 4096)
		if (*(volatile char *)(at + page) != 'x')
			_exit(1);
	tell(TOUCHED);
	for (;;)
		pause();
}

static void grow(int wanted)
{
	pid_t parent = getpid();
	int touching = 0;

	if (wanted > 0 && !count) {
		for (size_t page = 0; page < size; page += 4096)
			at[page] = 'x';
		count = 1;
	}
	forked = reallocarray(forked, wanted + 1, sizeof *forked);
	if (!forked)
		fail("reallocarray");
	while (count < wanted || touching) {
		char what;

		if (count < wanted && touching < AT_ONCE) {
			pid_t pid = fork();

			if (pid < 0)
				fail("fork");
			if (!pid)
				be_a_client(parent);
			forked[count++ - 1] = pid;
			touching++;
			continue;
		}
		while (read(done[0], &what, 1) != 1)
			if (errno != EINTR)
				fail("read");
		if (what == FAILED) {
			fprintf(stderr, "sharers: one of %d clients has died\n", count);
			end_all();
			exit(1);
		}
		touching--;
	}
}

int main(int argc, char **argv)
{
	struct mshare_create map = {
		.prot = PROT_READ | PROT_WRITE,
		.flags = MAP_SHARED | MAP_FIXED | MAP_ANONYMOUS,
		.fd = (uint32_t)-1,
	};
	char line[32];
	int fd;

	if (argc != 3 || !(size = strtoull(argv[2], NULL, 0)) || size % 4096) {
		fprintf(stderr, "usage: sharers REGION SIZE\n");
		return 2;
	}
	map.size = size;
	fd = open(argv[1], O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	if (fd < 0 || ftruncate(fd, size))
		fail(argv[1]);
	if (ioctl(fd, MSHAREFS_CREATE_MAPPING, &map))
		fail("MSHAREFS_CREATE_MAPPING");
	at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (at == MAP_FAILED)
		fail("mmap");
	close(fd);
	if (pipe2(done, O_CLOEXEC))
		fail("pipe");
	signal(SIGCHLD, on_death);

	while (fgets(line, sizeof line, stdin)) {
		grow(atoi(line));
		printf("ready %d\n", count);
		fflush(stdout);
	}
	end_all();
	return 0;
}
