/* A program that maps files, many at a time, and tells what it sees. What it is to do comes on standard
 * input, one line each, and is answered by one line. Addresses are hexadecimal, other numbers decimal.
 *
 *   map PATH r|rw OFFSET LENGTH PROT keep|close   "at ADDRESS" or "errno N"
 *   look ADDRESS PAGES      "seen", and for each page its bytes 0 and MARK as one number, or segv or bus
 *   store ADDRESS BYTE      "stored 0", or "segv ADDRESS" or "bus ADDRESS"
 *   munmap ADDRESS LENGTH   "result 0" or "errno N"
 *   fork IN OUT             "pid N"; the child is told through these two FIFOs
 *   exec                    becomes itself anew: "ready PID"
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#define PAGE 4096
#define MARK 5

static sigjmp_buf away;
static volatile int raised;
static volatile char *volatile at;

static void on_fault(int number, siginfo_t *info, void *context)
{
	(void)context;
	raised = number;
	at = info->si_addr;
	siglongjmp(away, 1);
}

static const char *name(void) { return raised == SIGBUS ? "bus" : "segv"; }

static int next_line(char *line, size_t room)
{
	size_t have = 0;

	while (have < room - 1 && read(0, line + have, 1) == 1)
		if (line[have++] == '\n') {
			line[have - 1] = 0;
			return 1;
		}
	return 0;
}

static void result(long value)
{
	if (value < 0)
		dprintf(1, "errno %d\n", errno);
	else
		dprintf(1, "result %ld\n", value);
}

static void look(volatile char *first, long pages)
{
	char text[4096];
	volatile size_t length = (size_t)sprintf(text, "seen");

	for (volatile long page = 0; page < pages; page++) {
		volatile unsigned char *p = (volatile unsigned char *)first + page * PAGE;
		if (sigsetjmp(away, 1)) {
			const char *where = (volatile char *)p == at ? "" : "-elsewhere";
			length += (size_t)sprintf(text + length, " %s%s", name(), where);
		} else {
			unsigned seen = p[0] << 8;
			seen |= p[MARK];
			length += (size_t)sprintf(text + length, " %u", seen);
		}
	}
	dprintf(1, "%s\n", text);
}

static void store(volatile char *where, int byte)
{
	if (sigsetjmp(away, 1)) {
		dprintf(1, "%s %lx\n", name(), (unsigned long)at);
	} else {
		*where = (char)byte;
		dprintf(1, "stored 0\n");
	}
}

static void map(const char *path, const char *mode, long offset, long length, int prot, const char *after)
{
	int fd = open(path, mode[1] ? O_RDWR : O_RDONLY);
	void *memory = fd < 0 ? MAP_FAILED : mmap(NULL, length, prot, MAP_SHARED, fd, offset);
	int error = errno;

	if (fd >= 0 && (memory == MAP_FAILED || !strcmp(after, "close")))
		close(fd);
	if (memory == MAP_FAILED)
		dprintf(1, "errno %d\n", error);
	else
		dprintf(1, "at %lx\n", (unsigned long)memory);
}

static void fork_one(const char *in, const char *out)
{
	pid_t pid = fork();

	if (pid) {
		dprintf(1, "pid %d\n", pid);
		return;
	}
	int from = open(in, O_RDONLY), to = open(out, O_WRONLY);
	dup2(from, 0);
	dup2(to, 1);
	close(from);
	close(to);
}

int main(int count, char **arguments)
{
	struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO};
	char line[4096], *word[8];

	(void)count;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	sigaction(SIGSEGV, &action, NULL);
	sigaction(SIGBUS, &action, NULL);
	signal(SIGCHLD, SIG_IGN); /* children are reaped by the kernel */
	dprintf(1, "ready %d\n", getpid());
	while (next_line(line, sizeof line)) {
		char *rest = line;

		for (int i = 0; i < 8; i++)
			word[i] = (word[i] = strsep(&rest, " ")) ? word[i] : "";
		void *address = (void *)strtoul(word[1], NULL, 16);
		if (!strcmp(word[0], "map")) {
			map(word[1], word[2], atol(word[3]), atol(word[4]), atoi(word[5]), word[6]);
		} else if (!strcmp(word[0], "look")) {
			look(address, atol(word[2]));
		} else if (!strcmp(word[0], "store")) {
			store(address, atoi(word[2]));
		} else if (!strcmp(word[0], "munmap")) {
			result(munmap(address, strtoul(word[2], NULL, 10)));
		} else if (!strcmp(word[0], "fork")) {
			fork_one(word[1], word[2]);
		} else if (!strcmp(word[0], "exec")) {
			closefrom(3); /* a descriptor that is open counts as one who may change the region */
			execv("/proc/self/exe", arguments);
			return 8;
		} else {
			dprintf(1, "what 0\n");
		}
	}
	return 0;
}
