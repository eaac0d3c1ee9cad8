// SPDX-License-Identifier: MIT OR GPL-2.0
/*
 * The lsm gate: nobody maps a region before the daemon has said yes, and nobody but the daemon
 * changes the protection of what is mapped.
 *
 * mmap_gate runs when a program calls mmap(2), before the mapping exists and with no lock held. For
 * a file of our mount it asks for an extended attribute whose name says what is being mapped; to a
 * FUSE filesystem that is a FUSE_GETXATTR, so the daemon is asked while the caller waits, and the
 * error that it answers with is the verdict. mprotect_gate needs nobody: mmap_lock is held there.
 *
 * Which way each branch fails is said beside it. "Open" lets the call through as if there were no
 * gate, "closed" refuses it. The programs go when the daemon's descriptors do, so a dead daemon is
 * open: its mount answers no open() any more, and the mappings that exist stay as they are.
 *
 * CO-RE without vmlinux.h: only what is touched is declared, and the loader (libbpf) moves the
 * offsets to where the running kernel has them. Nothing is included, so clang alone builds it.
 * Leaves out: mremap, munmap, fork, which are a client's own affair; overlayfs on top of a mount,
 * whose files have another device; and mappings that were there before.
 */

typedef unsigned int u32;
typedef unsigned long long u64;

#define SEC(name) __attribute__((section(name), used))
#define __uint(name, val) int(*name)[val]
#define __type(name, val) typeof(val) *name
#define CORE __attribute__((preserve_access_index))
#define INLINE static __attribute__((always_inline))
#define FIELD_EXISTS 2 /* enum bpf_core_field_info_kind of libbpf */

/* errno(3): the interface of mmap(2) and mprotect(2), so the numbers are fixed. */
#define EPERM 1
#define EIO 5
#define ENOMEM 12
#define EACCES 13
#define EINVAL 22
#define ETIMEDOUT 110
#define EKEYREJECTED 129

#define PROT_MASK 7 /* PROT_READ 1, PROT_WRITE 2, PROT_EXEC 4 */
#define MAP_TYPE 0x0f
#define MAP_PRIVATE 0x02

/* Helpers by their number, which include/uapi/linux/bpf.h never changes. */
static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static u64 (*bpf_get_current_pid_tgid)(void) = (void *)14;
static long (*bpf_probe_read_kernel)(void *to, u32 size, const void *from) = (void *)113;
static long (*bpf_dynptr_from_mem)(void *data, u32 size, u64 flags, void *dynptr) = (void *)197;

struct super_block {
	u32 s_dev;
	unsigned long s_magic;
} CORE;
struct inode {
	struct super_block *i_sb;
} CORE;
struct file {
	struct inode *f_inode;
	u32 f_mode;
} CORE;
struct dentry {
	struct super_block *d_sb;
} CORE;
struct vfsmount {
	struct super_block *mnt_sb;
} CORE;
struct path {
	struct vfsmount *mnt;
	struct dentry *dentry;
} CORE;
/* A file that another filesystem opened to pass its own file through to; that one is user_path. */
struct backing_file {
	struct file file;
	struct path user_path;
} CORE;
#define MAY_BE_BACKING (1u << 24 | 1u << 25) /* FMODE_BACKING has been either, in fs.h */
struct vm_area_struct {
	struct file *vm_file;
} CORE;
struct bpf_dynptr {
	u64 opaque[2];
} __attribute__((aligned(8)));

extern int bpf_get_file_xattr(struct file *file, const char *name__str,
			      struct bpf_dynptr *value_p) __attribute__((section(".ksyms")));

/* Written by the loader; devices as the kernel numbers them (major << 20 | minor), 0 for none. */
struct settings {
	u32 mount;   /* of the FUSE mount */
	u32 magic;   /* its kind of filesystem: for a moment after it has gone, its device number may
		      * be another's already */
	u32 memory;  /* of the filesystem that the regions' memory lies on */
	u32 lenient; /* let in whom the daemon cannot be asked about, see below */
	u32 private; /* let in private mappings, also of those */
	u32 whole;   /* a mapping is no more than a window on the region: it has no protection of its
		      * own to be changed, which is EINVAL and not EACCES */
	u32 zero;    /* always 0, but the verifier cannot know that, see is_null() */
};
struct {
	__uint(type, 2 /* ARRAY */);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct settings);
} settings SEC(".maps");

/* Threads (ids of the initial pid namespace) that the daemon makes calls in at this moment. */
struct {
	__uint(type, 1 /* HASH */);
	__uint(map_flags, 1 /* BPF_F_NO_PREALLOC */);
	__uint(max_entries, 65536);
	__type(key, u32);
	__type(value, u32);
} borrowed SEC(".maps");

/* Where the kernel copies the attribute's value, which is empty: only the error counts. */
struct value {
	char bytes[16];
};
struct {
	__uint(type, 2 /* ARRAY */);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct value);
} values SEC(".maps");

/* MIT alone would not be let near bpf_get_file_xattr(). */
char LICENSE[] SEC("license") = "Dual MIT/GPL";

/*
 * The names, one for each protection in the manner of /proc/PID/maps, and one for every private
 * mapping. The kernel takes constant strings only. The loader writes a secret over the zeroes, so
 * that no program can put the question itself, by getxattr(2).
 */
#define NAME(id, what) const char id[] SEC(".rodata.names") = "user.msharefs.0000000000000000." what
NAME(name_none, "---s");
NAME(name_r, "r--s");
NAME(name_w, "-w-s");
NAME(name_rw, "rw-s");
NAME(name_x, "--xs");
NAME(name_rx, "r-xs");
NAME(name_wx, "-wxs");
NAME(name_rwx, "rwxs");
NAME(name_private, "p");

/*
 * file is NULL for anonymous memory. Until the kernel says so in its types (file__nullable) the
 * verifier holds a plain test to be dead code and removes it, and the next load is a kernel oops.
 * The comparison with a number that it does not know stays; where the type is nullable, the
 * verifier wants the plain one.
 */
#define is_null(pointer, zero) (!(pointer) || (u64)(pointer) == (zero))

/*
 * The verifier must see that the result lies in [-4095, 0]: a constant on each path. Without the
 * barrier clang makes one branch-free expression of several.
 */
INLINE int verdict(int number)
{
	asm volatile("" : "+r"(number));
	return number;
}

INLINE int is_private(u64 flags)
{
	return (flags & MAP_TYPE) == MAP_PRIVATE;
}

/* As verdict(): else the names become a table, and a name from a table is no constant. */
#define ASK(name)                                                      \
	({                                                             \
		const char *constant = (name);                         \
		asm volatile("" : "+r"(constant));                     \
		bpf_get_file_xattr(file, constant, &value_p);          \
	})

INLINE int ask(struct file *file, u64 prot, u64 flags)
{
	struct bpf_dynptr value_p;
	u32 first = 0;
	struct value *value = bpf_map_lookup_elem(&values, &first);

	if (!value)
		return -ENOMEM; /* closed; an array has its first element */
	if (bpf_dynptr_from_mem(value->bytes, sizeof(value->bytes), 0, &value_p))
		return -ENOMEM; /* closed; the size is right */
	if (is_private(flags))
		return ASK(name_private);
	switch (prot & PROT_MASK) {
	case 0:
		return ASK(name_none);
	case 1:
		return ASK(name_r);
	case 2:
		return ASK(name_w);
	case 3:
		return ASK(name_rw);
	case 4:
		return ASK(name_x);
	case 5:
		return ASK(name_rx);
	case 6:
		return ASK(name_wx);
	default:
		return ASK(name_rwx);
	}
}

/* file, reqprot (as asked for), prot (as it will be: READ_IMPLIES_EXEC), flags, others' verdict */
SEC("lsm.s/mmap_file")
int mmap_gate(u64 *ctx)
{
	struct file *file = (struct file *)ctx[0];
	int others = (int)ctx[4];
	u32 first = 0;
	struct settings *set = bpf_map_lookup_elem(&settings, &first);
	struct super_block *sb;
	int answer;

	if (others)
		return others; /* closed: another program has refused it already */
	if (!set)
		return 0; /* open; an array has its first element */
	if (is_null(file, set->zero))
		return 0; /* open: anonymous memory is not ours */
	sb = file->f_inode->i_sb;
	if (sb->s_dev != set->mount || sb->s_magic != set->magic)
		return 0; /* open: not our mount */
	answer = ask(file, ctx[2], ctx[3]);
	if (answer >= 0)
		return 0; /* the daemon has said yes */
	switch (answer) {
	case -EACCES:
		/*
		 * Not the daemon: the caller may not read the file (somebody who may has passed it
		 * the descriptor), so the kernel does not let it ask.
		 */
		if (is_private(ctx[3]) && !set->private)
			return verdict(-EINVAL); /* closed: no region is mapped privately */
		if (set->lenient)
			return 0; /* open: the census finds it, as whatever a gate misses */
		return verdict(-EACCES); /* closed */
	case -EKEYREJECTED:
		return verdict(-EACCES); /* closed, from here on: the daemon has said no */
	case -EINVAL:
		return verdict(-EINVAL);
	case -EPERM:
		return verdict(-EPERM);
	case -ENOMEM:
		return verdict(-ENOMEM);
	case -EIO:
		return verdict(-EIO);
	case -ETIMEDOUT:
		return verdict(-ETIMEDOUT);
	default:
		return verdict(-EACCES); /* closed: no answer at all; the daemon is ending */
	}
}

/*
 * Whether what is mapped was opened as a file of our mount. Under passthrough the mapping is one of
 * the file behind, wherever that lies; but the kernel keeps the path that it was opened by.
 */
INLINE int is_passed_through(struct file *file, struct settings *set)
{
	struct backing_file *backing = (struct backing_file *)file;
	struct vfsmount *mnt = 0;
	struct dentry *dentry = 0;
	struct super_block *sb = 0, *same = 0;
	u32 device = 0;

	if (!__builtin_preserve_field_info(backing->user_path.dentry, FIELD_EXISTS))
		return 0; /* open: this kernel keeps it in another way; the regions' memory is known */
	if (!(file->f_mode & MAY_BE_BACKING))
		return 0; /* not such a file */
	/*
	 * With the wrong one of the two bits there is no path behind struct file. So nothing is
	 * believed before mount and name agree; what cannot be read stays zero.
	 */
	bpf_probe_read_kernel(&mnt, sizeof(mnt), &backing->user_path.mnt);
	bpf_probe_read_kernel(&dentry, sizeof(dentry), &backing->user_path.dentry);
	bpf_probe_read_kernel(&sb, sizeof(sb), &mnt->mnt_sb);
	bpf_probe_read_kernel(&same, sizeof(same), &dentry->d_sb);
	if (!sb || sb != same)
		return 0; /* as above */
	bpf_probe_read_kernel(&device, sizeof(device), &sb->s_dev);
	return device && device == set->mount;
}

/* vma, reqprot, prot, others' verdict. mmap_lock is held: nobody can be asked here. */
SEC("lsm/file_mprotect")
int mprotect_gate(u64 *ctx)
{
	struct vm_area_struct *vma = (struct vm_area_struct *)ctx[0];
	int others = (int)ctx[3];
	u32 first = 0, tid = (u32)bpf_get_current_pid_tgid();
	struct settings *set = bpf_map_lookup_elem(&settings, &first);
	struct file *file;

	if (others)
		return others; /* closed: another program has refused it already */
	if (!set || !set->memory)
		return 0; /* open: no mount, or its memory is not told apart */
	file = vma->vm_file;
	if (!file)
		return 0; /* open: anonymous memory is not ours */
	/* Under passthrough the mapping is one of the file that holds the memory, or of an object. */
	if (file->f_inode->i_sb->s_dev != set->memory && !is_passed_through(file, set))
		return 0; /* open: neither our memory nor a file that lies in a region */
	if (bpf_map_lookup_elem(&borrowed, &tid))
		return 0; /* open: the daemon itself, in a thread that it holds */
	if (set->whole)
		return verdict(-EINVAL); /* closed, as below */
	return verdict(-EACCES); /* closed */
}
