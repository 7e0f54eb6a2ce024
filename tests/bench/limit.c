/*
 * limit FILE MOUNTPOINT: what /dev/fuse allows. One file, MOUNTPOINT/disk.img, served by one thread:
 * a message is read, done with pread or pwrite, and answered. No promise of healfs's is kept here;
 * it is the least that a server of one file has to do. Needs root; ends when it is unmounted.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define MAX_WRITE (1 << 20)
#define FILE_NODE 2

static int fuse, file;
static struct stat file_stat;
static char message[MAX_WRITE + 4096] __attribute__((aligned(4096)));
static char data[MAX_WRITE] __attribute__((aligned(4096)));

static void reply(const struct fuse_in_header *in, int error, const void *body, size_t length)
{
	struct fuse_out_header out = { sizeof out + length, error, in->unique };
	struct iovec parts[] = { { &out, sizeof out }, { (void *)body, length } };

	if (writev(fuse, parts, length ? 2 : 1) < 0 && errno != ENOENT && errno != ENODEV)
		perror("writev");
}

static struct fuse_attr attributes(uint64_t node)
{
	struct fuse_attr attr = { .ino = node, .nlink = 1, .blksize = 4096 };

	attr.mode = node == FILE_NODE ? S_IFREG | 0600 : S_IFDIR | 0700;
	attr.size = node == FILE_NODE ? file_stat.st_size : 0;
	return attr;
}

static void init(const struct fuse_in_header *in, const struct fuse_init_in *arg)
{
	struct fuse_init_out out = {
		.major = FUSE_KERNEL_VERSION,
		.minor = FUSE_KERNEL_MINOR_VERSION,
		.max_readahead = arg->max_readahead,
		.flags = FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_MAX_PAGES | FUSE_ASYNC_DIO,
		.max_background = 65535,
		.congestion_threshold = 65535,
		.max_write = MAX_WRITE,
		.time_gran = 1,
		.max_pages = MAX_WRITE / 4096,
	};

	reply(in, 0, &out, sizeof out);
}

static void serve(const struct fuse_in_header *in, const void *arg)
{
	const struct fuse_read_in *read_in = arg;
	const struct fuse_write_in *write_in = arg;
	struct fuse_entry_out entry = { .nodeid = FILE_NODE, .attr_valid = 3600 };
	struct fuse_attr_out attr = { .attr_valid = 3600 };
	struct fuse_open_out open_out = { 0 };
	struct fuse_write_out written = { 0 };
	ssize_t count;

	switch (in->opcode) {
	case FUSE_READ:
		count = pread(file, data, read_in->size, read_in->offset);
		reply(in, count < 0 ? -errno : 0, data, count < 0 ? 0 : count);
		break;
	case FUSE_WRITE:
		count = pwrite(file, write_in + 1, write_in->size, write_in->offset);
		written.size = count;
		reply(in, count < 0 ? -errno : 0, &written, count < 0 ? 0 : sizeof written);
		break;
	case FUSE_FSYNC:
		reply(in, fdatasync(file) < 0 ? -errno : 0, NULL, 0);
		break;
	case FUSE_INIT:
		init(in, arg);
		break;
	case FUSE_LOOKUP:
		entry.attr = attributes(FILE_NODE);
		reply(in, strcmp(arg, "disk.img") ? -ENOENT : 0, &entry, strcmp(arg, "disk.img") ? 0 : sizeof entry);
		break;
	case FUSE_GETATTR:
		attr.attr = attributes(in->nodeid);
		reply(in, 0, &attr, sizeof attr);
		break;
	case FUSE_OPEN:
		open_out.open_flags = FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES;
		/* fall through */
	case FUSE_OPENDIR:
		reply(in, 0, &open_out, sizeof open_out);
		break;
	case FUSE_FLUSH:
	case FUSE_RELEASE:
	case FUSE_RELEASEDIR:
		reply(in, 0, NULL, 0);
		break;
	case FUSE_FORGET:
	case FUSE_BATCH_FORGET:
	case FUSE_INTERRUPT:
		break;
	default:
		reply(in, -ENOSYS, NULL, 0);
	}
}

int main(int argc, char **argv)
{
	/* A WRITE's payload begins on a page, as healfs's does. */
	struct iovec parts[] = { { message + 4096 - 80, 80 }, { message + 4096, MAX_WRITE } };
	const struct fuse_in_header *in = parts[0].iov_base;
	char options[128];

	if (argc != 3) {
		fprintf(stderr, "usage: limit FILE MOUNTPOINT\n");
		return 2;
	}
	file = open(argv[1], O_RDWR);
	fuse = open("/dev/fuse", O_RDWR);
	snprintf(options, sizeof options, "fd=%d,rootmode=40000,user_id=0,group_id=0", fuse);
	if (file < 0 || fuse < 0 || fstat(file, &file_stat) < 0 ||
	    mount("limit", argv[2], "fuse", MS_NODEV | MS_NOSUID, options) < 0) {
		perror(argv[0]);
		return 1;
	}
	while (readv(fuse, parts, 2) >= 0 || errno == EINTR || errno == ENOENT)
		serve(in, in + 1);
	return errno == ENODEV ? 0 : 1;
}
