/* SPDX-License-Identifier: MIT */
/*
 * msharefs.h - the ioctls of a region file on an msharefs mount.
 *
 * A region is a file. open(2) it, give it a size with ftruncate(2) or fallocate(2), and mmap(2) it
 * with MAP_SHARED, in any number of processes. What lies inside it, at which offset and with which
 * protection, is changed by the ioctls below on an open descriptor of the file, and every process
 * that maps the region sees each change at once.
 *
 *     int fd = open("/run/mshare/pool", O_RDWR | O_CREAT, 0600);
 *     ftruncate(fd, 1 << 21);
 *     struct mshare_create map = {
 *         .region_offset = 0, .size = 1 << 21, .prot = PROT_READ | PROT_WRITE,
 *         .flags = MAP_SHARED | MAP_FIXED | MAP_ANONYMOUS, .fd = (uint32_t)-1,
 *     };
 *     ioctl(fd, MSHAREFS_CREATE_MAPPING, &map);
 *     char *p = mmap(NULL, 1 << 21, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
 *
 * C99 and C++17, 32 and 64 bits. Offsets and sizes are bytes, multiples of the page size (4096).
 * Reserved fields and flags without a meaning must be zero. Each ioctl returns 0, or -1 with errno
 * as listed with it. Every ioctl may also fail with:
 *
 *     ENOTTY      the file is no region, or the command does not exist
 *     EINVAL      but for MSHAREFS_INFO: the region has no size yet; a range is empty, unaligned,
 *                 overflows or reaches past the end of the region's last page; a flag has no meaning
 *                 here; a reserved field is not zero
 *     EFAULT      the argument is not the caller's memory
 *     EINTR       a signal came while the call had to wait; nothing has changed
 *     EIO         the server failed to do it; its log says why
 *     ENOTCONN, ECONNABORTED    the server has ended
 *
 * Why a call was refused, in a sentence, stands in the "refuse" event of .control/NAME/events.
 *
 * MSHAREFS_CREATE_MAPPING and MSHAREFS_UNMAP, and their structs, are those of the kernel's proposed
 * msharefs (version 3 of the series), so that a program needs one source for both. 'x' 00-1F is the
 * range which that series reserves.
 *
 * Manual pages: msharefs(2), mshare(1), msharefs(8).
 */
#ifndef MSHAREFS_H
#define MSHAREFS_H

#include <stdint.h>
#include <sys/ioctl.h> /* _IOW and relatives */

#ifdef __cplusplus
extern "C" {
#endif

/* Raised when the meaning of an existing command changes; see mshare_info_args.abi_version. */
#define MSHAREFS_ABI_VERSION 1

/* The granularity of every offset and size in a region. */
#define MSHAREFS_PAGE_SIZE 4096

/* ---- MSHAREFS_CREATE_MAPPING: put an object at region_offset ------------------------------------
 *
 * prot is PROT_NONE or any of PROT_READ, PROT_WRITE, PROT_EXEC. flags must hold MAP_SHARED (or
 * MAP_SHARED_VALIDATE) and MAP_FIXED, and may hold MAP_ANONYMOUS (memory, zeroed; fd and offset are
 * ignored), with it MAP_HUGETLB (transparent huge pages, wherever a whole one fits),
 * MAP_FIXED_NOREPLACE, and MAP_NORESERVE, which changes nothing. Without MAP_ANONYMOUS, fd is a
 * descriptor of the calling process; it may be closed afterwards. What the range held before is
 * replaced, as with mmap(MAP_FIXED).
 *
 *     EACCES      the region is not open for writing; fd is not open for reading, or not for writing
 *                 though prot has PROT_WRITE
 *     EBADF       fd is not open, or open with O_PATH
 *     EBUSY       some descriptor or mapping of the region lacks a right that prot would give;
 *                 nothing has changed
 *     EEXIST      MAP_FIXED_NOREPLACE, and something is mapped in the range
 *     EINVAL      also: the object is no regular file, or is a region, secret memory, or a file of
 *                 hugetlbfs, procfs or sysfs; offset is not a multiple of the page size;
 *                 MAP_HUGETLB without MAP_ANONYMOUS
 *     ENOSPC      the mount's size= is used up
 *     EOPNOTSUPP  this mount has no file objects (see MSHAREFS_FEATURE_FILE_OBJECTS), or with
 *                 MAP_HUGETLB no huge pages (see MSHAREFS_FEATURE_HUGE)
 *     EPERM, ENODEV and the like   mmap(2) of the object says so: sealed against writing, PROT_EXEC
 *                 on a noexec mount, a file that cannot be mapped ...
 */
struct mshare_create {
	uint64_t region_offset; /* in: where in the region */
	uint64_t size;          /* in: how much */
	uint64_t offset;        /* in: where the object's part begins, in the object */
	uint32_t prot;          /* in: PROT_* of <sys/mman.h> */
	uint32_t flags;         /* in: MAP_* of <sys/mman.h> */
	uint32_t fd;            /* in: the object, (uint32_t)-1 with MAP_ANONYMOUS */
	/* 64 bits: 4 bytes of padding. i386 has none, hence its own number. */
};

/* ---- MSHAREFS_UNMAP: take a range out -----------------------------------------------------------
 *
 * The range may hold holes, and may begin and end in the middle of mappings. Its memory is freed.
 *
 *     EACCES      the region is not open for writing
 */
struct mshare_unmap {
	uint64_t region_offset; /* in: where in the region */
	uint64_t size;          /* in: how much */
};

/* ---- MSHAREFS_PROTECT: set a range's protection, in every process before it returns -------------
 *
 *     EACCES      the region is not open for writing; or PROT_WRITE on a file object whose
 *                 descriptor was not open for writing
 *     EBUSY       some descriptor or mapping of the region lacks a right that prot would give
 *     ENOMEM      a part of the range is not mapped, as with mprotect(2)
 *
 * After an error nothing has changed.
 */
struct mshare_protect {
	uint64_t region_offset; /* in: where in the region */
	uint64_t size;          /* in: how much */
	uint32_t prot;          /* in: PROT_* of <sys/mman.h> */
	uint32_t flags;         /* in: zero */
};

/* ---- MSHAREFS_QUERY: which mapping is there? ----------------------------------------------------
 *
 * In the manner of PROCMAP_QUERY. To walk a region, begin with region_offset 0 and
 * MSHAREFS_QUERY_NEXT, and go on with start + size until ENOENT.
 *
 *     ENOENT      no mapping covers region_offset; with MSHAREFS_QUERY_NEXT: none follows it either
 */
struct mshare_query {
	uint64_t region_offset;    /* in */
	uint32_t query_flags;      /* in: MSHAREFS_QUERY_* */
	uint32_t reserved;         /* in: zero */
	uint64_t start;            /* out: where the mapping begins in the region */
	uint64_t size;             /* out: its length */
	uint64_t object_offset;    /* out: where its part of the object begins; 0 for memory */
	uint64_t object_ino;       /* out: inode number of a file object; 0 for memory */
	uint32_t object_dev_major; /* out: device of a file object; 0 for memory */
	uint32_t object_dev_minor; /* out */
	uint32_t prot;             /* out: PROT_* */
	uint32_t map_flags;        /* out: MAP_SHARED; of memory MAP_ANONYMOUS, MAP_HUGETLB */
	uint32_t kind;             /* out: MSHAREFS_KIND_* */
	uint32_t reserved2;        /* out: zero */
};

#define MSHAREFS_QUERY_COVERING 0 /* the mapping that covers region_offset */
#define MSHAREFS_QUERY_NEXT 1     /* that one, or else the next after it */

#define MSHAREFS_KIND_ANON 1 /* memory */
#define MSHAREFS_KIND_FILE 2 /* a file object */

/* ---- MSHAREFS_NOTIFY: watch a range -------------------------------------------------------------
 *
 * Accesses of the kinds in events are reported in the region's events file. What else happens with
 * them, mode says, if the protection allows them; others are denied and reported. What was armed in
 * the range before is replaced. events MSHAREFS_NOTIFY_DISARM ends the watch; so does unmapping.
 *
 * With _HOLD, whoever may write the region writes "allow SEQ" or "deny SEQ" to that file, SEQ being
 * the number of the event. If nobody has it open, on_timeout holds at once.
 *
 * With _SCAN, which goes with _LOG and stores alone, stores are noted by the kernel: no thread waits
 * for a report, which tells of a page and a process, and comes a moment later.
 *
 *     EACCES      the region is not open for writing
 *     EINVAL      also: unknown events, mode, on_timeout or flags; signo is no signal; signo,
 *                 timeout_ms, on_timeout or flags is not zero though the mode has no use for it
 *     EOPNOTSUPP  this mount cannot watch (see MSHAREFS_FEATURE_NOTIFY)
 */
struct mshare_notify {
	uint64_t region_offset; /* in: where in the region */
	uint64_t size;          /* in: how much */
	uint32_t events;        /* in: MSHAREFS_NOTIFY_WRITE, _READ, or both; 0 disarms */
	uint32_t mode;          /* in: MSHAREFS_NOTIFY_LOG, _SIGNAL or _HOLD */
	uint32_t signo;         /* in: with _SIGNAL, which; else zero */
	uint32_t timeout_ms;    /* in: with _HOLD, milliseconds, 0 waits for ever; else zero */
	uint32_t on_timeout;    /* in: with _HOLD, MSHAREFS_ON_TIMEOUT_*; else zero */
	uint32_t flags;         /* in: MSHAREFS_NOTIFY_SCAN or zero */
};

#define MSHAREFS_NOTIFY_DISARM 0 /* events: none any more */
#define MSHAREFS_NOTIFY_WRITE 1  /* events: stores and write(2) */
#define MSHAREFS_NOTIFY_READ 2   /* events: loads and read(2) */

#define MSHAREFS_NOTIFY_LOG 0    /* mode: report once per page, and let it go on */
#define MSHAREFS_NOTIFY_SIGNAL 1 /* mode: report, and send the thread signo */
#define MSHAREFS_NOTIFY_HOLD 2   /* mode: report, and let the thread wait for a decision */

#define MSHAREFS_NOTIFY_SCAN 1   /* flags: pages are looked for now and then, nobody waits */

#define MSHAREFS_ON_TIMEOUT_DENY 0  /* what becomes of a held access nobody decided on */
#define MSHAREFS_ON_TIMEOUT_ALLOW 1

/* ---- MSHAREFS_SYNC: write a range's file objects to their storage -------------------------------
 *
 * fsync(2) of the region does it for all of them. Files that were mapped without the right to
 * write, memory and holes have nothing to write.
 *
 *     EIO, ENOSPC and the like     what fsync(2) of the object said: once for each descriptor of the
 *                 region
 *     EOPNOTSUPP  this mount has no file objects (see MSHAREFS_FEATURE_FILE_OBJECTS)
 */
struct mshare_sync {
	uint64_t region_offset; /* in: where in the region */
	uint64_t size;          /* in: how much */
	uint32_t flags;         /* in: zero */
	uint32_t reserved;      /* in: zero */
};

/* ---- MSHAREFS_INFO: what is this mount? ---------------------------------------------------------
 *
 * Of a region, sized or not, or of a directory of the mount. A mount that cannot do something says
 * so in features: test the bit, never the version.
 *
 *     ENOTTY      the file is neither a region nor a directory of an msharefs mount
 */
struct mshare_info_args {
	uint32_t abi_version; /* out: MSHAREFS_ABI_VERSION */
	uint32_t gate;        /* out: MSHAREFS_GATE_* */
	uint64_t features;    /* out: MSHAREFS_FEATURE_* */
	uint64_t alignment;   /* out: the size that the kernel series would have is a multiple of this
	                         many bytes; here any will do, and the last page counts whole */
	uint64_t page_size;   /* out: offsets and sizes in a region are multiples of this many bytes */
	uint64_t region_size; /* out: bytes; 0 before the size is set, and of a directory */
	uint64_t reserved[3]; /* out: zero */
};

#define MSHAREFS_GATE_NONE 0   /* how mmap(2) of a region is supervised: not at all */
#define MSHAREFS_GATE_LSM 1    /* by a BPF LSM program */
#define MSHAREFS_GATE_PTRACE 2 /* by holding the opener until its first mmap(2) */

#define MSHAREFS_FEATURE_PROTECT (1 << 0)      /* MSHAREFS_PROTECT */
#define MSHAREFS_FEATURE_QUERY (1 << 1)        /* MSHAREFS_QUERY */
#define MSHAREFS_FEATURE_EVENTS (1 << 2)       /* .control/events */
#define MSHAREFS_FEATURE_ENFORCE (1 << 3)      /* protections hold in every process */
#define MSHAREFS_FEATURE_NOTIFY (1 << 4)       /* MSHAREFS_NOTIFY */
#define MSHAREFS_FEATURE_FILE_OBJECTS (1 << 5) /* files can be mapped; MSHAREFS_SYNC */
#define MSHAREFS_FEATURE_HUGE (1 << 6)         /* memory in huge pages */

/* ---- The numbers ----------------------------------------------------------------------------- */

#define MSHAREFS_CREATE_MAPPING _IOW('x', 0x00, struct mshare_create)
#define MSHAREFS_UNMAP          _IOW('x', 0x01, struct mshare_unmap)
#define MSHAREFS_PROTECT        _IOW('x', 0x10, struct mshare_protect)
#define MSHAREFS_QUERY          _IOWR('x', 0x11, struct mshare_query)
#define MSHAREFS_NOTIFY         _IOW('x', 0x12, struct mshare_notify)
#define MSHAREFS_SYNC           _IOW('x', 0x13, struct mshare_sync)
#define MSHAREFS_INFO           _IOR('x', 0x14, struct mshare_info_args)

/* The sizes are part of the numbers: a compiler that lays a struct out differently stops here. */
#define MSHAREFS_SIZE_IS(name, bytes) \
	typedef char name##_has_##bytes##_bytes[sizeof(struct name) == (bytes) ? 1 : -1]
#ifdef __i386__
MSHAREFS_SIZE_IS(mshare_create, 36);
#else
MSHAREFS_SIZE_IS(mshare_create, 40);
#endif
MSHAREFS_SIZE_IS(mshare_unmap, 16);
MSHAREFS_SIZE_IS(mshare_protect, 24);
MSHAREFS_SIZE_IS(mshare_query, 72);
MSHAREFS_SIZE_IS(mshare_notify, 40);
MSHAREFS_SIZE_IS(mshare_sync, 24);
MSHAREFS_SIZE_IS(mshare_info_args, 64);
#undef MSHAREFS_SIZE_IS

#ifdef __cplusplus
}
#endif

#endif /* MSHAREFS_H */
