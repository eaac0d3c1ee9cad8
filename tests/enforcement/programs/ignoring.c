/* Calls on files of a mount, while signals come that the program ignores; or that it does not.
 *
 *   ignoring REGION ioctls TIMES SIGNAL      PROTECT, TIMES times, and a signal for each: its own
 *                                            child's end (SIGCHLD), or one that a child of it sends
 *   ignoring REGION read EVENTS SIGNAL       read(2) of EVENTS, once
 *   ignoring REGION handled EVENTS SIGNAL    the same with a handler for the signal, not SA_RESTART
 *   ignoring REGION another EVENTS SIGNAL    as read, in a thread, while the first one blocks the signal:
 *                                            the kernel then hands it to that thread. SIGUSR1, which
 *                                            the first thread blocks as well, has a handler
 *
 * The region is opened first, and anew from time to time, so that a gate that follows who opens it
 * does so. SIGNAL is left as it is by default, or set to SIG_IGN if SIGCHLD's is not. Says "ready",
 * then, at the end, how many calls succeeded, and how many failed with EINTR.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>
#include "msharefs.h"

enum { FOLLOWED = 40 }; /* ioctls, with the calls that belong to each: fewer than 256 calls */

static const char *region;
static long done, interrupted;

static void on_signal(int number)
{
	(void)number;
}

static void count(long result)
{
	if (result >= 0)
		done++;
	else if (errno == EINTR)
		interrupted++;
	else
		exit(3);
}

static void ioctls(long times, int number)
{
	int fd = -1;
	pid_t sender = 0;

	if (number != SIGCHLD && !(sender = fork())) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		for (;;) {
			kill(getppid(), number);
			usleep(100);
		}
	}
	for (long i = 0; i < times; i++) {
		struct mshare_protect args = { 0, 4096, i % 2 ? PROT_READ : PROT_READ | PROT_WRITE, 0 };

		if (i % FOLLOWED == 0) {
			close(fd);
			if ((fd = open(region, O_RDWR)) < 0)
				exit(4);
		}
		if (number == SIGCHLD && !fork())
			_exit(0);
		count(ioctl(fd, MSHAREFS_PROTECT, &args));
		while (number == SIGCHLD && waitpid(-1, NULL, WNOHANG) > 0)
			;
	}
	if (sender) {
		kill(sender, SIGKILL);
		while (waitpid(sender, NULL, 0) != sender)
			;
	}
}

static void *reads(void *path)
{
	char event[4096];
	int events = open(path, O_RDONLY | O_NONBLOCK);

	if (events < 0)
		exit(5);
	while (read(events, event, sizeof event) > 0)
		; /* what has been before */
	if (errno != EAGAIN || fcntl(events, F_SETFL, 0))
		exit(6);
	count(read(events, event, sizeof event));
	return NULL;
}

static void in_a_thread(char *path, int number)
{
	sigset_t blocked;
	pthread_t thread;

	sigaction(SIGUSR1, &(struct sigaction){ .sa_handler = on_signal }, NULL);
	pthread_create(&thread, NULL, reads, path);
	sigemptyset(&blocked);
	sigaddset(&blocked, number);
	sigaddset(&blocked, SIGUSR1);
	pthread_sigmask(SIG_BLOCK, &blocked, NULL);
	puts("blocked");
	fflush(stdout);
	pthread_join(thread, NULL);
}

int main(int arguments, char **argument)
{
	int number = atoi(argument[4]);
	const char *mode = argument[2];

	if (arguments != 5)
		return 2;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	region = argument[1];
	if (!strcmp(mode, "handled"))
		sigaction(number, &(struct sigaction){ .sa_handler = on_signal }, NULL);
	else if (number != SIGCHLD && number != SIGURG && number != SIGWINCH && number != SIGCONT)
		signal(number, SIG_IGN);
	puts("ready");
	fflush(stdout);
	if (!strcmp(mode, "ioctls")) {
		ioctls(atol(argument[3]), number);
	} else if (!strcmp(mode, "another")) {
		in_a_thread(argument[3], number);
	} else {
		if (open(region, O_RDWR) < 0)
			return 4;
		reads(argument[3]);
	}
	printf("done=%ld interrupted=%ld\n", done, interrupted);
	fflush(stdout);
	_exit(0);
}
