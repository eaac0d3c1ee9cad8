/* A program that shares memory and touches it as it is told, one command a line: memory of its own,
 * for which it makes userfaultfds, or that of the file it is given.
 *
 *   r OFFSET   load          w OFFSET   store           (print the byte, or the offset)
 *   k OFFSET   read(2) from /dev/zero to there          p OFFSET   write(2) from there to a pipe
 *   t OFFSET   eight threads store at the same moment   z          take all out of the page tables
 *   f OFFSET   fork; the child stores and ends          u OFFSET   munmap that page
 *   m          mremap all of it to another place        s OFFSET   store with SIGSEGV blocked
 *   l OFFSET   store; the handler jumps out of it       a OFFSET   store while SIGALRM ticks
 *   b OFFSET   as a, but read(2) from /dev/zero to there
 *   c          close the userfaultfds                   n          how many SIGALRM there were
 *   x          exec /bin/cat                            h OFFSET   as f, and the child waits after it
 *   g          fork; the child waits, and stores to offset 0 at each SIGUSR1
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

static char *memory;
static sigjmp_buf out;
static volatile sig_atomic_t jumping, ticks;
static long target;
static pthread_barrier_t barrier;

static void on_segv(int number, siginfo_t *info, void *context)
{
    (void)context;
    if (jumping)
        siglongjmp(out, 1);
    dprintf(1, "signal %d code %d at %ld\n", number, info->si_code > 0, (long)((char *)info->si_addr - memory));
    _exit(3);
}

static void on_alarm(int number) { (void)number; ticks++; }

static void on_usr1(int number) { (void)number; *(volatile char *)memory = 42; }

static void *store(void *nothing)
{
    pthread_barrier_wait(&barrier);
    memory[target] = 42;
    return nothing;
}

int main(int count, char **argument)
{
    struct sigaction action = {.sa_sigaction = on_segv, .sa_flags = SA_SIGINFO | SA_NODEFER};
    struct sigaction alarms = {.sa_handler = on_alarm, .sa_flags = SA_RESTART};
    size_t size = 1 << 20;
    char line[100];
    int file, whole = -1, limited = -1;

    sigaction(SIGSEGV, &action, NULL);
    sigaction(SIGBUS, &action, NULL);
    sigaction(SIGALRM, &alarms, NULL);
    signal(SIGUSR1, on_usr1);
    if (count > 1 && strcmp(argument[1], "-")) {
        file = open(argument[1], O_RDWR);
    } else {
        file = memfd_create("region", 0);
        if (ftruncate(file, size))
            return 1;
    }
    memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory == MAP_FAILED) {
        printf("mmap: %s\n", strerror(errno));
        return 1;
    }
    if (count < 2 || !strcmp(argument[1], "-")) {
        whole = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
        limited = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | 1);
    }
    printf("%d %ld %d %d %d\n", getpid(), (long)memory, whole, limited, file);
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        long offset = strlen(line) > 2 ? strtol(line + 2, NULL, 0) : 0;
        volatile char *at = memory + offset;
        switch (line[0]) {
        case 'r': printf("read %d\n", *at); break;
        case 'w': *at = 42; printf("wrote %ld\n", offset); break;
        case 'k': case 'p': {
            int ends[2] = {-1, -1}, zero = open("/dev/zero", O_RDONLY);
            long done = line[0] == 'k' ? read(zero, (char *)at, 100)
                : pipe(ends) ? -1 : write(ends[1], (char *)at, 100);
            int error = errno;
            close(zero), close(ends[0]), close(ends[1]);
            printf("call %ld %s\n", done, done < 0 ? strerrorname_np(error) : "");
            break;
        }
        case 't': {
            pthread_t threads[8];
            target = offset;
            pthread_barrier_init(&barrier, NULL, 8);
            for (int i = 0; i < 8; i++)
                pthread_create(&threads[i], NULL, store, NULL);
            for (int i = 0; i < 8; i++)
                pthread_join(threads[i], NULL);
            printf("threads done\n");
            break;
        }
        case 'z': printf("zap %d\n", madvise(memory, size, MADV_DONTNEED)); break;
        case 'g': {
            pid_t child = fork();
            if (!child)
                for (prctl(PR_SET_PDEATHSIG, SIGKILL);;)
                    pause();
            printf("child %d\n", child);
            break;
        }
        case 'f': case 'h': {
            pid_t child = fork();
            if (!child) {
                *at = 42;
                dprintf(1, "child wrote\n");
                if (line[0] == 'h')
                    pause();
                _exit(0);
            }
            int status = 0;
            if (line[0] == 'f')
                waitpid(child, &status, 0);
            printf("child %d status %x\n", child, status);
            break;
        }
        case 'u': printf("munmap %d\n", munmap((char *)at, 4096)); break;
        case 'm': {
            char *room = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            memory = mremap(memory, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, room);
            printf("moved to %ld\n", (long)memory);
            break;
        }
        case 's': {
            sigset_t set;
            sigfillset(&set);
            sigprocmask(SIG_BLOCK, &set, NULL);
            *at = 42;
            printf("wrote %ld\n", offset);
            break;
        }
        case 'l':
            jumping = 1;
            if (!sigsetjmp(out, 1)) {
                *at = 42;
                printf("wrote %ld\n", offset);
            } else {
                printf("jumped\n");
            }
            jumping = 0;
            break;
        case 'a': case 'b': {
            struct itimerval every = {{0, 2000}, {0, 2000}}, never = {{0, 0}, {0, 0}};
            int zero = open("/dev/zero", O_RDONLY);
            setitimer(ITIMER_REAL, &every, NULL);
            if (line[0] == 'a')
                *at = 42;
            else if (read(zero, (char *)at, 1) != 1)
                perror("read");
            close(zero);
            setitimer(ITIMER_REAL, &never, NULL);
            printf("wrote %ld after %s\n", offset, ticks ? "ticks" : "no tick");
            break;
        }
        case 'c': printf("close %d\n", close(whole) | close(limited)); break;
        case 'n': printf("alarms %d\n", (int)ticks); break;
        case 'x': execl("/bin/cat", "cat", NULL); break;
        }
        fflush(stdout);
    }
    return 0;
}
