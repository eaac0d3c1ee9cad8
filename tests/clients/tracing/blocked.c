/* Programs to be borrowed from: each waits in one system call, or does one thing over and over,
 * and says at the end what it saw. They know nothing of being watched.
 *
 *   blocked parent MODE [NUMBER]   be the parent of MODE; report all that wait(2) says of it to
 *                                  the descriptor REPORT_FD
 *   blocked MODE [NUMBER]
 *
 * A mode prints "ready", waits, and prints "r=RESULT errno=E ms=MILLISECONDS". What ends the wait
 * is a line on standard input, which a helper process reads, or a time-out of NUMBER ms. With
 * MAP_FIRST in the environment, that file is mapped before.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/msg.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CHECK(x) ((x) ? (void)0 : (printf("failed: %s (%s)\n", #x, strerror(errno)), exit(99)))

static long milliseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void say(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    fflush(stdout);
}

static volatile sig_atomic_t handled, altstack_wrong, value_wrong, last_sender;
static char *alternate;
static size_t alternate_size;

static void on_signal(int number, siginfo_t *info, void *context) {
    char here;
    (void)context;
    if (alternate && (&here < alternate || &here >= alternate + alternate_size)) altstack_wrong++;
    if (info->si_code == SI_QUEUE && info->si_value.sival_int != handled) value_wrong++;
    last_sender = info->si_pid;
    handled++;
    (void)number;
}

static void handle(int number, int flags) {
    struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | flags};
    CHECK(!sigaction(number, &action, NULL));
}

/* A process that reads a line from standard input, then calls end. */
static void (*end)(void);
static void helper(void) {
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid) return;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    char byte;
    if (read(0, &byte, 1) == 1) end();
    _exit(0);
}

static uint32_t *word; /* shared with the helper */
static int pipes[2], queue, semaphore, listener;
static pid_t self;
static struct sockaddr_un address = {.sun_family = AF_UNIX};

static void end_pipe(void) { CHECK(write(pipes[1], "x", 1) == 1); }
static void end_futex(void) {
    *word = 1;
    syscall(SYS_futex, word, FUTEX_WAKE, 1, NULL, NULL, 0);
}
static void end_semaphore(void) {
    struct sembuf up = {0, 1, 0};
    CHECK(!semop(semaphore, &up, 1));
}
static void end_queue(void) {
    struct { long type; char text[1]; } message = {1, "x"};
    CHECK(!msgsnd(queue, &message, 1, 0));
}
static void end_signal(void) { CHECK(!kill(self, SIGUSR1)); }
static void end_connect(void) {
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    CHECK(!connect(fd, (struct sockaddr *)&address, sizeof address));
}

static long wait_in(const char *mode, long ms) {
    struct timespec left = {ms / 1000, ms % 1000 * 1000000}, *limit = ms ? &left : NULL;
    int timeout = ms ? (int)ms : -1;
    char byte;
    sigset_t none;
    sigemptyset(&none);
    if (!strcmp(mode, "read")) return read(pipes[0], &byte, 1);
    if (!strcmp(mode, "poll")) {
        struct pollfd fd = {pipes[0], POLLIN, 0};
        return poll(&fd, 1, timeout);
    }
    if (!strcmp(mode, "ppoll")) {
        struct pollfd fd = {pipes[0], POLLIN, 0};
        return ppoll(&fd, 1, limit, &none);
    }
    if (!strcmp(mode, "select")) {
        struct timeval time = {ms / 1000, ms % 1000 * 1000};
        fd_set set;
        FD_ZERO(&set);
        FD_SET(pipes[0], &set);
        return select(pipes[0] + 1, &set, NULL, NULL, ms ? &time : NULL);
    }
    if (!strcmp(mode, "futex")) return syscall(SYS_futex, word, FUTEX_WAIT, 0, limit, NULL, 0);
    if (!strcmp(mode, "nanosleep")) return nanosleep(&left, NULL);
    if (!strcmp(mode, "accept")) return accept(listener, NULL, NULL) >= 0 ? 0 : -1;
    if (!strcmp(mode, "pause")) return pause();
    if (!strcmp(mode, "sigsuspend")) return sigsuspend(&none);
    if (!strcmp(mode, "waitpid")) {
        return waitpid(-1, NULL, 0) > 0 ? 0 : -1;
    }
    if (!strncmp(mode, "epoll", 5)) {
        struct epoll_event event = {.events = EPOLLIN};
        int fd = epoll_create1(0);
        CHECK(!epoll_ctl(fd, EPOLL_CTL_ADD, pipes[0], &event));
        if (!strcmp(mode, "epoll_wait")) return epoll_wait(fd, &event, 1, timeout);
        if (!strcmp(mode, "epoll_pwait")) return epoll_pwait(fd, &event, 1, timeout, &none);
        return syscall(441, fd, &event, 1, limit, &none, 8);
    }
    if (!strcmp(mode, "semop")) {
        struct sembuf down = {0, -1, 0};
        return semtimedop(semaphore, &down, 1, limit);
    }
    if (!strcmp(mode, "msgrcv")) {
        struct { long type; char text[1]; } message;
        return msgrcv(queue, &message, 1, 0, 0);
    }
    if (!strcmp(mode, "sigwaitinfo")) {
        sigset_t set;
        sigemptyset(&set);
        sigaddset(&set, SIGUSR1);
        return sigtimedwait(&set, NULL, limit) == SIGUSR1 ? 0 : -1;
    }
    if (!strcmp(mode, "io_getevents")) {
        aio_context_t context = 0;
        struct io_event event;
        struct iocb block = {.aio_fildes = (uint32_t)pipes[0], .aio_lio_opcode = IOCB_CMD_POLL,
                             .aio_buf = POLLIN}, *list = &block;
        CHECK(!syscall(SYS_io_setup, 1, &context));
        CHECK(syscall(SYS_io_submit, context, 1, &list) == 1);
        return syscall(SYS_io_getevents, context, 1, 1, &event, limit);
    }
    printf("no such mode\n");
    exit(98);
}

static void set_up(const char *mode) {
    self = getpid();
    word = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(word != MAP_FAILED && !pipe(pipes));
    end = end_pipe;
    if (!strcmp(mode, "futex")) end = end_futex;
    if (!strcmp(mode, "pause") || !strcmp(mode, "sigsuspend")) {
        handle(SIGUSR1, 0);
        end = end_signal;
    }
    if (!strcmp(mode, "sigsuspend") || !strcmp(mode, "sigwaitinfo")) {
        sigset_t set;
        sigemptyset(&set);
        sigaddset(&set, SIGUSR1);
        CHECK(!sigprocmask(SIG_BLOCK, &set, NULL));
        end = end_signal;
    }
    if (!strcmp(mode, "semop")) {
        semaphore = semget(IPC_PRIVATE, 1, 0600);
        end = end_semaphore;
    }
    if (!strcmp(mode, "msgrcv")) {
        queue = msgget(IPC_PRIVATE, 0600);
        end = end_queue;
    }
    if (!strcmp(mode, "accept")) {
        snprintf(address.sun_path + 1, 64, "msharefs-test-%d", self);
        listener = socket(AF_UNIX, SOCK_STREAM, 0);
        CHECK(!bind(listener, (struct sockaddr *)&address, sizeof address) && !listen(listener, 1));
        end = end_connect;
    }
}

static int one_call(const char *mode, long ms) {
    set_up(mode);
    if (ms == 0) helper();
    sigset_t before, after;
    sigprocmask(SIG_SETMASK, NULL, &before);
    say("ready\n");
    long start = milliseconds(), result = wait_in(mode, ms);
    int error = result < 0 ? errno : 0;
    long took = milliseconds() - start;
    sigprocmask(SIG_SETMASK, NULL, &after);
    if (semaphore) semctl(semaphore, 0, IPC_RMID);
    if (queue) msgctl(queue, IPC_RMID, NULL);
    CHECK(!memcmp(&before, &after, 8));
    say("r=%ld errno=%d ms=%ld\n", result, error, took);
    return 7;
}

/* Fills every register that user code has, then looks at them until a line has come. */
static int registers(void) {
    self = getpid();
    word = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    end = end_futex;
    helper();
    say("ready\n");
    long wrong, rounds;
    register uint32_t *stop asm("r15") = word;
    asm volatile(
        "push %%rbp\n"
        "mov $0x1111, %%rbx\n mov $0x2222, %%rbp\n mov $0x3333, %%rsi\n mov $0x4444, %%rdi\n"
        "mov $0x5555, %%r8\n mov $0x6666, %%r9\n mov $0x7777, %%r10\n mov $0x8888, %%r11\n"
        "mov $0x9999, %%r12\n mov $0xaaaa, %%r13\n mov $0xbbbb, %%rcx\n xor %%r14d, %%r14d\n"
        "movq %%rbx, %%xmm0\n movq %%rbp, %%xmm7\n movq %%rsi, %%xmm15\n"
        "1:\n"
        "cmp $0x1111, %%rbx\n jne 2f\n cmp $0x2222, %%rbp\n jne 2f\n cmp $0x3333, %%rsi\n jne 2f\n"
        "cmp $0x4444, %%rdi\n jne 2f\n cmp $0x5555, %%r8\n jne 2f\n cmp $0x6666, %%r9\n jne 2f\n"
        "cmp $0x7777, %%r10\n jne 2f\n cmp $0x8888, %%r11\n jne 2f\n cmp $0x9999, %%r12\n jne 2f\n"
        "cmp $0xaaaa, %%r13\n jne 2f\n cmp $0xbbbb, %%rcx\n jne 2f\n"
        "movq %%xmm0, %%rax\n cmp %%rax, %%rbx\n jne 2f\n"
        "movq %%xmm7, %%rax\n cmp %%rax, %%rbp\n jne 2f\n"
        "movq %%xmm15, %%rax\n cmp %%rax, %%rsi\n jne 2f\n"
        "inc %%r14\n"
        "cmpl $0, (%%r15)\n je 1b\n"
        "xor %%eax, %%eax\n jmp 3f\n"
        "2: mov $1, %%eax\n"
        "3: pop %%rbp\n mov %%r14, %%rdx\n"
        : "=a"(wrong), "=d"(rounds)
        : "r"(stop)
        : "rbx", "rsi", "rdi", "rcx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "xmm0", "xmm7",
          "xmm15", "memory", "cc");
    say("wrong=%ld rounds=%d\n", wrong, rounds > 1000);
    return 7;
}

/* Counts queued signals, whose values must come in order, on an alternate stack. */
static int signals(long expected) {
    alternate_size = 65536;
    alternate = malloc(alternate_size);
    stack_t stack = {.ss_sp = alternate, .ss_size = alternate_size};
    CHECK(!sigaltstack(&stack, NULL));
    handle(SIGRTMIN + 1, SA_ONSTACK | SA_RESTART);
    CHECK(!pipe(pipes));
    say("ready\n");
    volatile long sum = 0;
    while (handled < expected) {
        for (int i = 0; i < 1000; i++) sum += i;
        struct timespec moment = {0, 1000};
        syscall(SYS_nanosleep, &moment, NULL);
    }
    say("handled=%d altstack_wrong=%d value_wrong=%d\n", handled, altstack_wrong, value_wrong);
    return 7;
}

/* Waits in read, restarted after signals; says how many it handled, and from whom. */
static int restarted(void) {
    handle(SIGUSR1, SA_RESTART);
    handle(SIGUSR2, SA_RESTART);
    say("ready\n");
    char byte;
    long result = read(0, &byte, 1);
    say("r=%ld handled=%d sender=%d\n", result, handled, last_sender);
    return 7;
}

static int sigtrap(void) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTRAP);
    signal(SIGTRAP, SIG_IGN);
    CHECK(!sigprocmask(SIG_BLOCK, &set, NULL));
    say("ready\n");
    char byte;
    long result = read(0, &byte, 1);
    struct sigaction action;
    sigaction(SIGTRAP, NULL, &action);
    sigprocmask(SIG_SETMASK, NULL, &set);
    say("r=%ld ignored=%d blocked=%d\n", result, action.sa_handler == SIG_IGN,
        sigismember(&set, SIGTRAP));
    return 7;
}

static int filter(void) {
    struct sock_filter allow[] = {BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
    struct sock_fprog program = {1, allow};
    CHECK(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    CHECK(!prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program));
    say("ready\n");
    char byte;
    say("r=%ld\n", (long)read(0, &byte, 1));
    return 7;
}

static int strict(void) {
    say("ready\n");
    CHECK(!prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT));
    char byte;
    long result = read(0, &byte, 1);
    syscall(SYS_write, 1, result == 1 ? "r=1\n" : "r=?\n", 4);
    syscall(SYS_exit, 7);
    return 0;
}

static void *in_read(void *argument) {
    char byte;
    long result = read(0, &byte, 1);
    *(long *)argument = result;
    return NULL;
}

/* The first thread waits in a call that is never restarted, a second one in read. */
static int threads(long ms) {
    pthread_t thread;
    long result = 0;
    struct epoll_event event;
    pthread_create(&thread, NULL, in_read, &result);
    say("ready\n");
    int fd = epoll_create1(0);
    int got = epoll_wait(fd, &event, 1, (int)ms), error = got < 0 ? errno : 0;
    pthread_join(thread, NULL);
    say("r=%d errno=%d read=%ld\n", got, error, result);
    return 7;
}

static void *last_thread(void *argument) {
    char byte;
    (void)argument;
    say("ready\n");
    say("r=%ld\n", (long)read(0, &byte, 1));
    exit(7);
}

static int leader_gone(void) {
    pthread_t thread;
    pthread_create(&thread, NULL, last_thread, NULL);
    pthread_exit(NULL);
}

static void *nothing(void *argument) { return argument; }

/* Threads come and go all the time; a line ends it. */
static int churn(void) {
    struct pollfd fd = {0, POLLIN, 0};
    long made = 0;
    say("ready\n");
    while (poll(&fd, 1, 0) == 0) {
        pthread_t thread[4];
        for (int i = 0; i < 4; i++) CHECK(!pthread_create(&thread[i], NULL, nothing, NULL));
        for (int i = 0; i < 4; i++) pthread_join(thread[i], NULL);
        made += 4;
    }
    say("made=%d\n", made > 4);
    return 7;
}

/* Children come and go; each must end as it should. */
static int forks(void) {
    struct pollfd fd = {0, POLLIN, 0};
    volatile long wrong = 0, made = 0;
    say("ready\n");
    while (poll(&fd, 1, 0) == 0) {
        pid_t pid = made % 2 ? vfork() : fork();
        if (!pid) _exit(made % 100);
        int status = 0;
        CHECK(pid > 0 && waitpid(pid, &status, 0) == pid);
        wrong += status != made % 100 << 8;
        made++;
    }
    say("made=%d wrong=%ld\n", made > 4, wrong);
    return 7;
}

/* Becomes itself again and again, until a line has come. */
static int execs(char **arguments) {
    struct pollfd fd = {0, POLLIN, 0};
    static char count[16];
    if (!strcmp(arguments[2], "0")) say("ready\n");
    if (poll(&fd, 1, 0) != 0) {
        say("execs=%d\n", atoi(arguments[2]) > 0);
        return 7;
    }
    snprintf(count, sizeof count, "%d", atoi(arguments[2]) + 1);
    char *next[] = {arguments[0], arguments[1], count, NULL};
    execv("/proc/self/exe", next);
    return 97;
}

static char **program;
static void *exec_later(void *argument) {
    char byte;
    char *next[] = {program[0], "read", NULL};
    CHECK(read(0, &byte, 1) == 1);
    execv("/proc/self/exe", next);
    return argument;
}

static void *pauses(void *argument) {
    for (;;) pause();
    return argument;
}

/* Two threads wait for ever; at a line, a third one becomes a new program. */
static int thread_execs(char **arguments) {
    pthread_t thread;
    program = arguments;
    CHECK(!pthread_create(&thread, NULL, pauses, NULL));
    CHECK(!pthread_create(&thread, NULL, exec_later, NULL));
    say("ready\n");
    for (;;) pause();
}

/* The parent in vfork until a line has come. */
static int in_vfork(void) {
    static long result;
    say("ready\n");
    if (!vfork()) {
        char byte;
        result = syscall(SYS_read, 0, &byte, 1);
        _exit(0);
    }
    say("r=%ld\n", result);
    return 7;
}

/* A process that a tracer of its own holds; prints its id. */
static int traced(void) {
    pid_t child = fork();
    if (!child) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (;;) pause();
    }
    CHECK(!ptrace(PTRACE_SEIZE, child, NULL, NULL));
    say("child=%d\n", child);
    char byte;
    CHECK(read(0, &byte, 1) == 1);
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    say("r=1\n");
    return 7;
}

/* Seizes and releases process NUMBER: says whether that works, and what it is in. */
static int attach(long pid) {
    int status;
    CHECK(!ptrace(PTRACE_SEIZE, pid, NULL, NULL) && !ptrace(PTRACE_INTERRUPT, pid, NULL, NULL));
    CHECK(waitpid((pid_t)pid, &status, __WALL) == pid && WIFSTOPPED(status));
    CHECK(!ptrace(PTRACE_DETACH, pid, NULL, NULL));
    return 7;
}

static int parent(int fd, char **arguments) {
    pid_t child = fork();
    CHECK(child >= 0);
    if (!child) {
        close(fd);
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        execv("/proc/self/exe", arguments);
        _exit(96);
    }
    dprintf(fd, "%d\n", child);
    for (int status;;) {
        if (waitpid(child, &status, WUNTRACED | WCONTINUED) != child) return 1;
        if (WIFSTOPPED(status)) dprintf(fd, "stopped %d\n", WSTOPSIG(status));
        else if (WIFCONTINUED(status)) dprintf(fd, "continued\n");
        else if (WIFSIGNALED(status)) return dprintf(fd, "killed %d\n", WTERMSIG(status)), 0;
        else return dprintf(fd, "exited %d\n", WEXITSTATUS(status)), 0;
    }
}

/* With MAP_FIRST in the environment: four pages of that file are mapped before anything else. */
static void map_first(void) {
    const char *path = getenv("MAP_FIRST");
    if (!path) return;
    int fd = open(path, O_RDWR);
    CHECK(fd >= 0);
    CHECK(mmap(NULL, 4 * 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) != MAP_FAILED);
    close(fd);
}

int main(int count, char **arguments) {
    (void)count;
    const char *mode = arguments[1];
    map_first();
    if (!strcmp(mode, "parent")) {
        arguments[1] = arguments[0];
        return parent(atoi(getenv("REPORT_FD")), arguments + 1);
    }
    long number = arguments[2] ? atol(arguments[2]) : 0;
    if (!strcmp(mode, "registers")) return registers();
    if (!strcmp(mode, "signals")) return signals(number);
    if (!strcmp(mode, "restarted")) return restarted();
    if (!strcmp(mode, "sigtrap")) return sigtrap();
    if (!strcmp(mode, "filter")) return filter();
    if (!strcmp(mode, "strict")) return strict();
    if (!strcmp(mode, "threads")) return threads(number);
    if (!strcmp(mode, "leader_gone")) return leader_gone();
    if (!strcmp(mode, "churn")) return churn();
    if (!strcmp(mode, "forks")) return forks();
    if (!strcmp(mode, "execs")) return execs(arguments);
    if (!strcmp(mode, "vfork")) return in_vfork();
    if (!strcmp(mode, "thread_execs")) return thread_execs(arguments);
    if (!strcmp(mode, "traced")) return traced();
    if (!strcmp(mode, "attach")) return attach(number);
    return one_call(mode, number);
}
