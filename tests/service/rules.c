/* Asserts the errno of each rule in docs/ioctl.md, one line each. argv[1] is the mount, argv[2]
 * another one. Prints "ok RULE", "FAIL RULE: got X, want Y", or "skip RULE: REASON" where the kernel
 * lacks what the rule is about; exits with 1 if any failed. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "msharefs.h"

#define PAGE 4096ull
#define FLAGS (MAP_SHARED | MAP_FIXED | MAP_ANONYMOUS)
#define RW (PROT_READ | PROT_WRITE)

static int failures;
static char path[4096];

static void is(const char *rule, long got, long want)
{
	if (got == want) {
		printf("ok %s\n", rule);
	} else {
		printf("FAIL %s: got %ld, want %ld\n", rule, got, want);
		failures++;
	}
}

/* A call's result if it is not negative, else the negative errno. */
#define R(call) ({ errno = 0; long r_ = (long)(call); r_ < 0 ? -(long)errno : r_; })

static const char *at(const char *root, const char *name)
{
	snprintf(path, sizeof path, "%s/%s", root, name);
	return path;
}

static long map(int fd, __u64 offset, __u64 size, __u32 prot, __u32 flags, int object)
{
	struct mshare_create args = { 0 };
	args.region_offset = offset;
	args.size = size;
	args.prot = prot;
	args.flags = flags;
	args.fd = (__u32)object;
	return R(ioctl(fd, MSHAREFS_CREATE_MAPPING, &args));
}

static long unmap(int fd, __u64 offset, __u64 size)
{
	struct mshare_unmap args = { 0 };
	args.region_offset = offset;
	args.size = size;
	return R(ioctl(fd, MSHAREFS_UNMAP, &args));
}

static long protect(int fd, __u64 offset, __u64 size, __u32 prot, __u32 flags)
{
	struct mshare_protect args = { 0 };
	args.region_offset = offset;
	args.size = size;
	args.prot = prot;
	args.flags = flags;
	return R(ioctl(fd, MSHAREFS_PROTECT, &args));
}

static long query(int fd, __u64 offset, __u32 flags, struct mshare_query *args)
{
	memset(args, 0, sizeof *args);
	args->region_offset = offset;
	args->query_flags = flags;
	return R(ioctl(fd, MSHAREFS_QUERY, args));
}

static long notify(int fd, struct mshare_notify args)
{
	return R(ioctl(fd, MSHAREFS_NOTIFY, &args));
}

static void ranges(int fd)
{
	is("unaligned offset", map(fd, 1, PAGE, RW, FLAGS, -1), -EINVAL);
	is("unaligned size", map(fd, 0, PAGE + 1, RW, FLAGS, -1), -EINVAL);
	is("zero size", map(fd, 0, 0, RW, FLAGS, -1), -EINVAL);
	is("overflow", map(fd, PAGE, ~0ull - PAGE + 1, RW, FLAGS, -1), -EINVAL);
	is("past the end", map(fd, 15 * PAGE, 2 * PAGE, RW, FLAGS, -1), -EINVAL);
	is("wild offset", unmap(fd, 1ull << 62, PAGE), -EINVAL);
	is("unmap zero", unmap(fd, 0, 0), -EINVAL);
	is("protect unaligned", protect(fd, 7, PAGE, RW, 0), -EINVAL);
	is("without MAP_SHARED", map(fd, 0, PAGE, RW, MAP_FIXED | MAP_ANONYMOUS, -1), -EINVAL);
	is("MAP_PRIVATE", map(fd, 0, PAGE, RW, MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS, -1), -EINVAL);
	is("without MAP_FIXED", map(fd, 0, PAGE, RW, MAP_SHARED | MAP_ANONYMOUS, -1), -EINVAL);
	is("MAP_POPULATE", map(fd, 0, PAGE, RW, FLAGS | MAP_POPULATE, -1), -EINVAL);
	is("MAP_HUGETLB", map(fd, 0, PAGE, RW, FLAGS | MAP_HUGETLB, -1), -EOPNOTSUPP);
	is("MAP_HUGE_2MB", map(fd, 0, PAGE, RW, FLAGS | MAP_HUGETLB | 21 << 26, -1), -EINVAL);
	is("MAP_HUGETLB of a file",
	   map(fd, 0, PAGE, RW, MAP_SHARED | MAP_FIXED | MAP_HUGETLB, fd), -EINVAL);
	is("unknown protection", map(fd, 0, PAGE, 0x100, FLAGS, -1), -EINVAL);
	is("protect flags", protect(fd, 0, PAGE, RW, 1), -EINVAL);
}

static void objects(int fd, const char *root, const char *elsewhere)
{
	const int flags = MAP_SHARED | MAP_FIXED;
	int pipes[2], sockets[2], secret, foreign;
	int reader = open("/etc/passwd", O_RDONLY), dir = open("/", O_RDONLY);
	int null = open("/dev/null", O_RDWR), place = open("/etc/passwd", O_PATH);
	int writer = open("/tmp", O_TMPFILE | O_WRONLY, 0600), file = memfd_create("object", 0);
	struct mshare_info_args info = { 0 };
	struct mshare_query found;
	struct stat object;
	int shown;
	char byte;

	is("pipe2", pipe(pipes), 0);
	is("socketpair", socketpair(AF_UNIX, SOCK_STREAM, 0, sockets), 0);
	is("object: no such descriptor", map(fd, 0, PAGE, PROT_READ, flags, 999), -EBADF);
	is("object: -1", map(fd, 0, PAGE, PROT_READ, flags, -1), -EBADF);
	is("object: O_PATH", map(fd, 0, PAGE, PROT_READ, flags, place), -EBADF);
	is("object: not readable", map(fd, 0, PAGE, PROT_READ, flags, writer), -EACCES);
	is("object: not writable", map(fd, 0, PAGE, RW, flags, reader), -EACCES);
	is("object: directory", map(fd, 0, PAGE, PROT_READ, flags, dir), -EINVAL);
	is("object: device", map(fd, 0, PAGE, PROT_READ, flags, null), -EINVAL);
	is("object: pipe", map(fd, 0, PAGE, PROT_READ, flags, pipes[0]), -EINVAL);
	is("object: socket", map(fd, 0, PAGE, PROT_READ, flags, sockets[0]), -EINVAL);
	is("object: this region", map(fd, 0, PAGE, PROT_READ, flags, fd), -EINVAL);
	foreign = open(at(elsewhere, "foreign"), O_RDWR | O_CREAT, 0600);
	is("size", R(ftruncate(foreign, PAGE)), 0);
	is("object: a region of another mount", map(fd, 0, PAGE, PROT_READ, flags, foreign), -EINVAL);
	secret = (int)syscall(447, 0); /* memfd_secret(2); not on every kernel */
	if (secret >= 0)
		is("object: secret memory", map(fd, 0, PAGE, PROT_READ, flags, secret), -EINVAL);
	else
		printf("skip object: secret memory: memfd_secret: %s\n", strerror(errno));
	is("info", R(ioctl(fd, MSHAREFS_INFO, &info)), 0);
	shown = info.features & MSHAREFS_FEATURE_FILE_OBJECTS;
	is("object: a good file", map(fd, 0, PAGE, RW, flags, file), shown ? 0 : -EOPNOTSUPP);
	if (shown) {
		is("object: read beyond its end", R(pread(fd, &byte, 1, 0)), -ENXIO);
		is("object: write beyond its end", R(pwrite(fd, "x", 1, 0)), -ENXIO);
		is("object: size", ftruncate(file, 100), 0);
		is("object: write, short", R(pwrite(fd, "xyz", 3, 98)), 2);
		is("object: read of the file", R(pread(file, &byte, 1, 99)), 1);
		is("object: what was written", byte, 'y');
		is("object: query", query(fd, 0, 0, &found), 0);
		is("object: query: kind", found.kind, MSHAREFS_KIND_FILE);
		is("object: stat", fstat(file, &object), 0);
		is("object: query: inode", found.object_ino == object.st_ino, 1);
		is("object: unmap", unmap(fd, 0, PAGE), 0);
	}
	is("nothing came of it", access(at(root, "r"), F_OK), 0);
}

static void table(int fd)
{
	struct mshare_query found;
	char byte = 'x';

	is("map", map(fd, 0, 4 * PAGE, RW, FLAGS, -1), 0);
	is("noreplace", map(fd, 3 * PAGE, 2 * PAGE, RW, FLAGS | MAP_FIXED_NOREPLACE, -1), -EEXIST);
	is("nothing added", query(fd, 4 * PAGE, 0, &found), -ENOENT);
	is("write", R(pwrite(fd, &byte, 1, 0)), 1);
	is("replace", map(fd, 0, PAGE, RW, FLAGS, -1), 0);
	is("read", R(pread(fd, &byte, 1, 0)), 1);
	is("replaced by zeroes", byte, 0);
	is("unmap with a hole", unmap(fd, 2 * PAGE, 8 * PAGE), 0);
	is("protect over a hole", protect(fd, 0, 4 * PAGE, PROT_READ, 0), -ENOMEM);
	is("query", query(fd, PAGE, 0, &found), 0);
	is("query: start", (long)found.start, 0);
	is("query: size", (long)found.size, 2 * PAGE);
	is("query: nothing changed", found.prot, RW);
	is("query: kind", found.kind, MSHAREFS_KIND_ANON);
	is("query: hole", query(fd, 2 * PAGE, 0, &found), -ENOENT);
	is("map higher", map(fd, 8 * PAGE, PAGE, PROT_READ, FLAGS, -1), 0);
	is("query: next", query(fd, 3 * PAGE, 1, &found), 0);
	is("query: next start", (long)found.start, 8 * PAGE);
	is("query: past the last", query(fd, 9 * PAGE, 1, &found), -ENOENT);
	is("query: flags", query(fd, 0, 2, &found), -EINVAL);
}

/* A 32-bit program's own number for CREATE, with its 36 bytes: the last 4 are not looked at. */
static void create_of_i386(int fd)
{
	const unsigned long create_i386 = 0x40247800;
	struct mshare_create args = { .size = PAGE, .prot = RW, .flags = FLAGS, .fd = (uint32_t)-1 };
	struct mshare_query found;

	memset((char *)&args + 36, 0xff, sizeof args - 36);
	args.region_offset = 12 * PAGE;
	is("i386: create", R(ioctl(fd, create_i386, &args)), 0);
	is("i386: query", query(fd, 12 * PAGE, 0, &found), 0);
	is("i386: start", (long)found.start, 12 * PAGE);
	is("i386: size", (long)found.size, PAGE);
	is("i386: prot", found.prot, RW);
	args.flags |= MAP_FIXED_NOREPLACE;
	is("i386: noreplace", R(ioctl(fd, create_i386, &args)), -EEXIST);
	args.prot = 0x100;
	is("i386: unknown protection", R(ioctl(fd, create_i386, &args)), -EINVAL);
	is("i386: unmap", unmap(fd, 12 * PAGE, PAGE), 0);
}

/* Where the kernel cannot read or write the argument. */
static void bad_pointers(int fd)
{
	static const unsigned long commands[] = {
		MSHAREFS_CREATE_MAPPING, MSHAREFS_UNMAP, MSHAREFS_PROTECT, MSHAREFS_QUERY,
		MSHAREFS_NOTIFY, MSHAREFS_SYNC, MSHAREFS_INFO,
	};
	char *page = mmap(NULL, 2 * PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	munmap(page + PAGE, PAGE);
	for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
		is("bad pointer: null", R(ioctl(fd, commands[i], NULL)), -EFAULT);
		is("bad pointer: half of it", R(ioctl(fd, commands[i], page + PAGE - 8)), -EFAULT);
	}
	mprotect(page, PAGE, PROT_READ);
	is("bad pointer: query of read-only memory", R(ioctl(fd, MSHAREFS_QUERY, page)), -EFAULT);
	is("bad pointer: info of read-only memory", R(ioctl(fd, MSHAREFS_INFO, page)), -EFAULT);
	munmap(page, PAGE);
}

static void reading_and_writing(int fd)
{
	static char buffer[8 * 4096];

	/* rw- 0-2, hole 2-8, r-- 8-9, hole */
	is("short read", R(pread(fd, buffer, 4 * PAGE, PAGE)), PAGE);
	is("read of a hole", R(pread(fd, buffer, 1, 2 * PAGE)), -ENXIO);
	is("short write", R(pwrite(fd, buffer, 4 * PAGE, PAGE)), PAGE);
	is("write to a hole", R(pwrite(fd, buffer, 1, 2 * PAGE)), -ENXIO);
	is("write to r--", R(pwrite(fd, buffer, 1, 8 * PAGE)), -EACCES);
	is("read at the end", R(pread(fd, buffer, 1, 16 * PAGE)), 0);
	is("write past the end", R(pwrite(fd, buffer, 1, 16 * PAGE)), -ENXIO);
	is("protect none", protect(fd, PAGE, PAGE, PROT_NONE, 0), 0);
	is("short read before ---", R(pread(fd, buffer, 2 * PAGE, 0)), PAGE);
	is("read of ---", R(pread(fd, buffer, 1, PAGE)), -EACCES);
	is("protect back", protect(fd, PAGE, PAGE, RW, 0), 0);
}

static void rights(int fd, const char *root)
{
	int reader, fresh;
	void *memory;
	struct mshare_query found;

	is("open O_RDONLY of rw-", R(open(at(root, "r"), O_RDONLY)), -EACCES);
	is("open O_WRONLY of rw-", R(open(at(root, "r"), O_WRONLY)), -EACCES);
	fresh = open(at(root, "fresh"), O_RDWR | O_CREAT, 0600);
	is("size", R(ftruncate(fresh, 16 * PAGE)), 0);
	reader = open(at(root, "fresh"), O_RDONLY);
	is("a reader blocks PROT_WRITE", map(fresh, 0, PAGE, RW, FLAGS, -1), -EBUSY);
	is("a reader blocks PROT_WRITE: nothing came of it", query(fresh, 0, 1, &found), -ENOENT);
	is("a reader lets PROT_READ in", map(fresh, 0, PAGE, PROT_READ, FLAGS, -1), 0);
	is("a reader blocks PROTECT", protect(fresh, 0, PAGE, RW, 0), -EBUSY);
	is("a reader blocks PROTECT: size as before", query(fresh, 0, 0, &found), 0);
	is("a reader blocks PROTECT: prot as before", found.prot, PROT_READ);
	is("a reader may not create", map(reader, PAGE, PAGE, PROT_READ, FLAGS, -1), -EACCES);
	is("a reader may not protect", protect(reader, 0, PAGE, PROT_NONE, 0), -EACCES);
	is("a reader may not unmap", unmap(reader, 0, PAGE), -EACCES);
	is("a reader may not notify", notify(reader, (struct mshare_notify){ .size = PAGE }), -EACCES);
	is("a reader may not, whatever the range", unmap(reader, 1, 1), -EACCES);
	is("a reader may query", query(reader, 0, 0, &found), 0);
	is("a reader changed nothing", (long)found.size, PAGE);
	memory = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, reader, 0);
	close(reader);
	is("a mapping blocks PROTECT", protect(fresh, 0, PAGE, RW, 0), -EBUSY);
	is("a mapping blocks CREATE", map(fresh, PAGE, PAGE, RW, FLAGS, -1), -EBUSY);
	is("a mapping blocks UNMAP not", unmap(fresh, 2 * PAGE, PAGE), 0);
	is("a mapping blocks: nothing changed", query(fresh, 0, 0, &found), 0);
	is("a mapping blocks: size as before", (long)found.size, PAGE);
	is("a mapping blocks: prot as before", found.prot, PROT_READ);
	munmap(memory, PAGE);
	is("nobody blocks PROTECT", protect(fresh, 0, PAGE, RW, 0), 0);
	close(fresh);
	(void)fd;
}

static void watching(int fd)
{
	struct mshare_sync sync = { 0 };
	struct mshare_info_args info = { 0 };
	long good;

#define NOTIFY(events_, ...) \
	notify(fd, (struct mshare_notify){ .size = PAGE, .events = events_, __VA_ARGS__ })
	is("notify: size 0", notify(fd, (struct mshare_notify){ .events = 1 }), -EINVAL);
	is("notify: events", NOTIFY(4, .mode = 0), -EINVAL);
	is("notify: mode", NOTIFY(1, .mode = 3), -EINVAL);
	is("notify: signal 0", NOTIFY(1, .mode = MSHAREFS_NOTIFY_SIGNAL), -EINVAL);
	is("notify: signal 65", NOTIFY(1, .mode = MSHAREFS_NOTIFY_SIGNAL, .signo = 65), -EINVAL);
	is("notify: log with a signal", NOTIFY(1, .signo = 9), -EINVAL);
	is("notify: hold with a signal", NOTIFY(1, .mode = MSHAREFS_NOTIFY_HOLD, .signo = 9), -EINVAL);
	is("notify: log with a timeout", NOTIFY(1, .timeout_ms = 1), -EINVAL);
	is("notify: log with on_timeout", NOTIFY(1, .on_timeout = 1), -EINVAL);
	is("notify: on_timeout", NOTIFY(1, .mode = MSHAREFS_NOTIFY_HOLD, .on_timeout = 2), -EINVAL);
	is("notify: flags", NOTIFY(1, .flags = 2), -EINVAL);
	is("info", R(ioctl(fd, MSHAREFS_INFO, &info)), 0);
	good = info.features & MSHAREFS_FEATURE_NOTIFY ? 0 : -EOPNOTSUPP;
	is("notify: log", NOTIFY(1, .mode = MSHAREFS_NOTIFY_LOG), good);
	is("notify: signal", NOTIFY(1, .mode = MSHAREFS_NOTIFY_SIGNAL, .signo = 64), good);
	is("notify: hold",
	   NOTIFY(1, .mode = MSHAREFS_NOTIFY_HOLD, .timeout_ms = 1, .on_timeout = 1), good);
	is("notify: disarm", NOTIFY(0, .mode = 0), good);
	sync.size = PAGE;
	sync.reserved = 1;
	is("sync: reserved", R(ioctl(fd, MSHAREFS_SYNC, &sync)), -EINVAL);
	sync.reserved = 0;
	good = info.features & MSHAREFS_FEATURE_FILE_OBJECTS ? 0 : -EOPNOTSUPP;
	is("sync", R(ioctl(fd, MSHAREFS_SYNC, &sync)), good);
	sync.region_offset = 1;
	is("sync: unaligned", R(ioctl(fd, MSHAREFS_SYNC, &sync)), -EINVAL);
	is("info: alignment", (long)info.alignment, PAGE);
	is("info: size", (long)info.region_size, 16 * PAGE);
	is("unknown command", R(ioctl(fd, _IO('x', 0x1f), 0)), -ENOTTY);
	is("known command, wrong size", R(ioctl(fd, _IOW('x', 1, __u64), &info)), -ENOTTY);
}

static void names(int fd, const char *root)
{
	static const char *const reserved[] = { "mshare_info", ".control" };
	struct mshare_info_args info = { 0 };
	char to[4096], byte = 'x';
	int other;

	snprintf(to, sizeof to, "%s/elsewhere", root);
	for (size_t i = 0; i < sizeof reserved / sizeof *reserved; i++)
		is("rename reserved", R(rename(at(root, reserved[i]), to)), -EPERM);
	is("unlink mshare_info", R(unlink(at(root, "mshare_info"))), -EPERM);
	is("rmdir .control", R(rmdir(at(root, ".control"))), -EPERM);
	ioctl(fd, MSHAREFS_INFO, &info);
	is("create .objects", R(open(at(root, ".objects"), O_CREAT | O_RDWR, 0600)),
	   info.features & MSHAREFS_FEATURE_FILE_OBJECTS ? -EISDIR : -EPERM);
	is("mkdir in .control", R(mkdir(at(root, ".control/x"), 0700)), -EPERM);
	is("symlink", R(symlink("r", to)), -EPERM);
	is("fifo", R(mkfifo(to, 0600)), -EPERM);
	is("setxattr", R(fsetxattr(fd, "user.a", "b", 1, 0)), -EOPNOTSUPP);
	is("getxattr", R(fgetxattr(fd, "user.a", to, 1)),
	   info.gate == MSHAREFS_GATE_LSM ? -ENODATA : -EOPNOTSUPP); /* the lsm gate asks by them */
	is("punch", R(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, PAGE)), -EOPNOTSUPP);
	other = open(at(root, "r"), O_RDWR | O_APPEND);
	is("append", R(write(other, &byte, 1)), -ENXIO);
	close(other);
	other = open(at(root, "r"), O_RDWR | O_DIRECT);
	is("O_DIRECT, unaligned", R(pread(other, &byte, 1, 1)), 1);
	close(other);
	is("O_TRUNC of rw- without read", R(open(at(root, "r"), O_WRONLY | O_TRUNC)), -EACCES);
	is("grow by fallocate", R(fallocate(fd, 0, 0, 32 * PAGE)), 0);
	is("grown", (long)lseek(fd, 0, SEEK_END), 32 * PAGE);
	other = open(at(root, "r"), O_RDWR | O_TRUNC);
	is("O_TRUNC", (long)lseek(other, 0, SEEK_END), 0);
	close(other);
}

int main(int argc, char **argv)
{
	struct mshare_query found;
	struct mshare_sync sync = { .size = PAGE };
	struct mshare_info_args info;
	int fd;

	if (argc != 3)
		return 2;
	fd = open(at(argv[1], "r"), O_RDWR | O_CREAT | O_EXCL, 0600);
	if (fd < 0) {
		perror(path);
		return 2;
	}
	is("before the size is set", map(fd, 0, PAGE, RW, FLAGS, -1), -EINVAL);
	is("unmap before the size is set", unmap(fd, 0, PAGE), -EINVAL);
	is("protect before the size is set", protect(fd, 0, PAGE, RW, 0), -EINVAL);
	is("query before the size is set", query(fd, 0, 0, &found), -EINVAL);
	is("query of the next before the size is set", query(fd, 0, 1, &found), -EINVAL);
	is("notify before the size is set",
	   notify(fd, (struct mshare_notify){ .size = PAGE, .events = 1 }), -EINVAL);
	is("sync before the size is set", R(ioctl(fd, MSHAREFS_SYNC, &sync)), -EINVAL);
	is("info before the size is set", R(ioctl(fd, MSHAREFS_INFO, &info)), 0);
	is("info before the size is set: alignment", (long)info.alignment, PAGE);
	is("info before the size is set: size", (long)info.region_size, 0);
	is("unknown before the size is set", R(ioctl(fd, _IO('x', 0x1f), 0)), -ENOTTY);
	is("size", R(ftruncate(fd, 16 * PAGE)), 0);
	ranges(fd);
	objects(fd, argv[1], argv[2]);
	table(fd);
	create_of_i386(fd);
	bad_pointers(fd);
	reading_and_writing(fd);
	rights(fd, argv[1]);
	watching(fd);
	names(fd, argv[1]);
	return failures ? 1 : 0;
}
