/* Clients that come and go by the thousand, and may be killed at any step.
 *
 *   storm PATH SIZE COUNT come         each opens, maps, loads, stores if it may, and ends
 *   storm PATH SIZE COUNT kill SEED    each does so for ever after, and is killed at a random moment
 *   storm PATH SIZE COUNT fork SEED    as kill, and forks; both are killed
 *   storm PATH SIZE COUNT exec SEED    as kill, and becomes itself anew meanwhile
 *
 * Prints how many ended at each step, and "wrong N" for those that ended as they should not have.
 * A step is told by a word in memory that parent and child share; what goes on within one is met
 * by running a random number of rounds of a loop before the blow.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BORN, OPENING, OPENED, MAPPING, MAPPED, LOADING, TOUCHING, FORKING, EXECUTING, STEPS };
static const char *const names[] = {"born", "opening", "opened", "mapping", "mapped", "loading",
                                    "touching", "forking", "executing"};
static volatile int *step;
static const char *path;
static size_t size;
static unsigned long seed = 1;

static unsigned long random_number(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed;
}

static void on_fault(int number, siginfo_t *info, void *context)
{
    (void)number, (void)info, (void)context;
    _exit(3);
}

static int ended(pid_t child)
{
    siginfo_t info = {.si_pid = 0};
    waitid(P_PID, (id_t)child, &info, WEXITED | WNOHANG | WNOWAIT);
    return info.si_pid;
}

static char *map_it(void)
{
    *step = OPENING;
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        _exit(50 + (errno == EACCES));
    *step = OPENED;
    if (fcntl(fd, F_GETFD) != FD_CLOEXEC)
        _exit(52);
    *step = MAPPING;
    char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED)
        _exit(53);
    *step = MAPPED;
    close(fd);
    *step = LOADING;
    return memory;
}

/* The first page stays writable, the last one may be read; what lies between is changed all the time. */
static void touch(char *memory)
{
    (void)*(volatile char *)(memory + size - 1);
    *step = TOUCHING;
    memory[0] = 1;
}

static void live(const char *mode, char **arguments)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    char *memory = map_it();
    pid_t self = getpid();
    touch(memory);
    if (!strcmp(mode, "come"))
        _exit(0);
    for (unsigned round = 0;; round++) {
        touch(memory);
        if (!strcmp(mode, "fork") && round % 64 == 0) {
            *step = FORKING;
            pid_t child = fork();
            if (!child) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                while (getppid() == self)
                    touch(memory);
                _exit(0);
            }
            kill(child, SIGKILL);
            waitpid(child, NULL, 0);
        }
        if (!strcmp(mode, "exec") && round == 64) {
            *step = EXECUTING;
            execv("/proc/self/exe", arguments);
        }
    }
}

int main(int count, char **arguments)
{
    struct sigaction faults = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO};
    long wrong = 0, died[STEPS] = {0}, clients;
    sigset_t nothing;
    if (count < 5)
        return 2;
    path = arguments[1];
    size = strtoul(arguments[2], NULL, 0);
    clients = strtol(arguments[3], NULL, 0);
    const char *mode = arguments[4];
    if (count > 5)
        seed = strtoul(arguments[5], NULL, 0) * 2 + 1;
    sigemptyset(&nothing);
    sigaction(SIGSEGV, &faults, NULL);
    if (getenv("STORM_AGAIN")) { /* the child of "exec", anew */
        step = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        live("kill", arguments);
    }
    step = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    setenv("STORM_AGAIN", "", 1);
    int last = !strcmp(mode, "fork") ? FORKING : !strcmp(mode, "exec") ? EXECUTING : TOUCHING;
    for (long i = 0; i < clients; i++) {
        int status;
        *step = BORN;
        pid_t child = fork();
        if (child < 0)
            return 2;
        if (!child)
            live(mode, arguments);
        if (strcmp(mode, "come")) {
            int target = (int)(random_number() % (unsigned)(last + 1));
            unsigned long rounds = random_number() % (1UL << random_number() % 22);
            while (*step < target && !ended(child))
                sched_yield();
            for (volatile unsigned long round = 0; round < rounds; round++) {}
            kill(child, SIGKILL);
        }
        waitpid(child, &status, 0);
        died[*step]++;
        if (!strcmp(mode, "come") ? status != 0 : !WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL) {
            wrong++;
            fprintf(stderr, "status %#x at %s\n", (unsigned)status, names[*step]);
        }
    }
    for (int i = 0; i < STEPS; i++)
        printf("%s %ld\n", names[i], died[i]);
    printf("wrong %ld\n", wrong);
    return 0;
}
