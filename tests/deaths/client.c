/* A client of a region that does what it is told, one command a line, and answers each by a line.
 *
 *   open PATH FLAGS         the descriptor           map FD SIZE OFFSET PROT    "ok"
 *   load OFFSET             the byte                 store OFFSET BYTE          "ok"
 *   protect FD OFFSET SIZE PROT    notify FD OFFSET SIZE EVENTS MODE ON_TIMEOUT the ioctls
 *   get OFFSET              read(2) of /dev/zero into the region: what it returns
 *   unmap OFFSET SIZE       munmap(2) of that part   close FD
 *   sync OFFSET SIZE        msync(2) of that part
 *   filter                  a seccomp filter that lets everything pass
 *   chroot PATH             what is open stays open
 *   user ID                 setgroups, setgid, setuid
 *   nofile                  no descriptor can be made any more
 *   fill                    no mapping can be made or split any more
 *   leader                  the first thread ends, another one goes on
 *   vfork                   a child in vfork(2) goes on, until "return"
 *   fork                    a child that waits: its number
 *   trace PID / untrace PID seize a process, let it go
 *   threads N               so many more threads, which wait
 *   exec                    becomes itself anew
 *   spin                    runs without a system call until a byte can be had (no answer before)
 *
 * "-ERRNO" if a call failed, "signal NUMBER OFFSET" for an access that raised one. It ends with its
 * input, and 7 is its exit status then.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#include "msharefs.h"

static char *memory, **program;
static sigjmp_buf out;
static volatile sig_atomic_t number;
static void *volatile at;

static void on_fault(int signo, siginfo_t *info, void *context)
{
    (void)context;
    number = signo;
    at = info->si_addr;
    siglongjmp(out, 1);
}

static void say(long value) { dprintf(1, "%ld\n", value < 0 ? -(long)errno : value); }

static void done(long result)
{
    if (result < 0)
        say(-1);
    else
        dprintf(1, "ok\n");
}

static void touch(long offset, int byte)
{
    if (sigsetjmp(out, 1)) {
        dprintf(1, "signal %d %ld\n", (int)number, (long)((char *)at - memory));
        return;
    }
    volatile char *place = memory + offset;
    if (byte < 0) {
        int value = *place;
        dprintf(1, "%d\n", value);
    } else {
        *place = (char)byte;
        dprintf(1, "ok\n");
    }
}

static void filter(void)
{
    struct sock_filter allow[] = {BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
    struct sock_fprog code = {1, allow};
    long result = prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    done(result ? result : prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &code));
}

/* Neighbouring pages with different protections are a mapping each. */
static void fill(void)
{
    size_t page = 4096, count = 1 << 18, i;
    char *area = mmap(NULL, page * count, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    for (i = 1; i < count; i += 2)
        if (mprotect(area + i * page, page, PROT_NONE))
            break;
    done(i < count ? 0 : -1);
}

static void nofile(void)
{
    int next = dup(0);
    struct rlimit limit = {(rlim_t)next, (rlim_t)next};
    close(next);
    done(setrlimit(RLIMIT_NOFILE, &limit));
}

static void *wait_for_ever(void *nothing)
{
    for (;;)
        pause();
    return nothing;
}

static int obey(void);

static void *go_on(void *nothing)
{
    (void)nothing;
    dprintf(1, "ok\n");
    exit(obey());
}

static int obey(void)
{
    static char line[512], path[400];
    long a, b, c, d;
    unsigned e, f;
    for (;;) {
        size_t length = 0;
        do {
            if (read(0, line + length, 1) != 1)
                return 7;
        } while (line[length++] != '\n');
        line[length] = 0;
        if (sscanf(line, "open %399s %ld", path, &a) == 2)
            say(open(path, (int)a));
        else if (sscanf(line, "map %ld %ld %ld %ld", &a, &b, &c, &d) == 4) {
            char *got = mmap(NULL, (size_t)b, (int)d, MAP_SHARED, (int)a, (off_t)c);
            if (got != MAP_FAILED)
                memory = got;
            done(got == MAP_FAILED ? -1 : 0);
        } else if (sscanf(line, "load %ld", &a) == 1)
            touch(a, -1);
        else if (sscanf(line, "store %ld %ld", &a, &b) == 2)
            touch(a, (int)b);
        else if (sscanf(line, "get %ld", &a) == 1) {
            int zero = open("/dev/zero", O_RDONLY);
            say(read(zero, memory + a, 1));
            close(zero);
        } else if (sscanf(line, "protect %ld %ld %ld %ld", &a, &b, &c, &d) == 4) {
            struct mshare_protect args = {(uint64_t)b, (uint64_t)c, (uint32_t)d, 0};
            done(ioctl((int)a, MSHAREFS_PROTECT, &args));
        } else if (sscanf(line, "notify %ld %ld %ld %ld %u %u", &a, &b, &c, &d, &e, &f) == 6) {
            struct mshare_notify args = {(uint64_t)b, (uint64_t)c, (uint32_t)d, e, 0, 0, f, 0};
            done(ioctl((int)a, MSHAREFS_NOTIFY, &args));
        } else if (sscanf(line, "unmap %ld %ld", &a, &b) == 2)
            done(munmap(memory + a, (size_t)b));
        else if (sscanf(line, "sync %ld %ld", &a, &b) == 2)
            done(msync(memory + a, (size_t)b, MS_SYNC));
        else if (sscanf(line, "close %ld", &a) == 1)
            done(close((int)a));
        else if (sscanf(line, "user %ld", &a) == 1)
            done(setgroups(0, NULL) || setgid((gid_t)a) || setuid((uid_t)a) ? -1 : 0);
        else if (sscanf(line, "untrace %ld", &a) == 1) {
            int status;
            done(ptrace(PTRACE_INTERRUPT, (pid_t)a, NULL, NULL) || waitpid((pid_t)a, &status, __WALL) != a
                     ? -1 : ptrace(PTRACE_DETACH, (pid_t)a, NULL, NULL));
        } else if (sscanf(line, "chroot %399s", path) == 1)
            done(chroot(path));
        else if (sscanf(line, "trace %ld", &a) == 1)
            done(ptrace(PTRACE_SEIZE, (pid_t)a, NULL, NULL));
        else if (sscanf(line, "threads %ld", &a) == 1) {
            pthread_t thread;
            for (b = 0; b < a; b++)
                if (pthread_create(&thread, NULL, wait_for_ever, NULL))
                    abort();
            done(0);
        } else if (!strcmp(line, "filter\n"))
            filter();
        else if (!strcmp(line, "nofile\n"))
            nofile();
        else if (!strcmp(line, "fill\n"))
            fill();
        else if (!strcmp(line, "leader\n")) {
            pthread_t thread;
            pthread_create(&thread, NULL, go_on, NULL);
            pthread_exit(NULL);
        } else if (!strcmp(line, "fork\n")) {
            pid_t child = fork();
            if (!child) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                wait_for_ever(NULL);
            }
            say(child);
        } else if (!strcmp(line, "vfork\n")) {
            if (!vfork()) {
                dprintf(1, "%d\n", getpid());
                _exit(obey());
            }
            done(0);
        } else if (!strcmp(line, "return\n"))
            return 0;
        else if (!strcmp(line, "exec\n"))
            execv("/proc/self/exe", program);
        else if (!strcmp(line, "spin\n")) {
            volatile long sum = 0;
            for (long i = 0; i < 1 << 28; i++)
                sum += i;
            done(0);
        } else
            abort();
    }
}

int main(int count, char **arguments)
{
    struct sigaction faults = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
    (void)count;
    program = arguments;
    sigaction(SIGSEGV, &faults, NULL);
    sigaction(SIGBUS, &faults, NULL);
    dprintf(1, "%d\n", getpid());
    return obey();
}
