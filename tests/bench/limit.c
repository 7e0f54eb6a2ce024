/*
 * limit FILE|SOCKET MOUNTPOINT: what /dev/fuse allows. One file, MOUNTPOINT/disk.img, served by one
 * thread. Of a FILE: a message is read, done with pread or pwrite, and answered. Of the Unix SOCKET
 * of an NBD server (its default export, one connection, simple replies): all messages there are go
 * out in one sendmsg, and all replies there are come in by one recv and are answered from where they
 * lie. No promise of healfs's is kept here; it is the least that a server of one file has to do.
 * Needs root; ends when it is unmounted, or the NBD server goes.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#define MAX_WRITE (1 << 20)
#define FILE_NODE 2

static int fuse;
static uint64_t size;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

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
	attr.size = node == FILE_NODE ? size : 0;
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

/* All but READ, WRITE and FSYNC. */
static void serve(const struct fuse_in_header *in)
{
	const void *arg = in + 1;
	struct fuse_entry_out entry = { .nodeid = FILE_NODE, .attr_valid = 3600 };
	struct fuse_attr_out attr = { .attr_valid = 3600 };
	struct fuse_open_out open_out = { 0 };

	switch (in->opcode) {
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

/* --- /dev/fuse: a message lies so that a WRITE's payload begins on a page, as healfs's does --- */

#define FIXED (sizeof(struct fuse_in_header) + sizeof(struct fuse_write_in))
#define MESSAGE_BYTES (4096 + MAX_WRITE)

static struct fuse_in_header *header(char *message)
{
	return (void *)(message + 4096 - FIXED);
}

/* False: there is none now. Exits when it is unmounted. */
static int receive(char *message)
{
	struct iovec parts[] = { { header(message), FIXED }, { message + 4096, MAX_WRITE } };

	while (readv(fuse, parts, 2) < 0) {
		if (errno == EAGAIN)
			return 0;
		if (errno == ENODEV)
			exit(0);
		if (errno != EINTR && errno != ENOENT) /* ENOENT: interrupted before it was read */
			die("/dev/fuse");
	}
	return 1;
}

/* --- a file ------------------------------------------------------------------------------------ */

static void serve_file(int file)
{
	static char message[MESSAGE_BYTES] __attribute__((aligned(4096)));
	static char data[MAX_WRITE] __attribute__((aligned(4096)));
	const struct fuse_in_header *in = header(message);
	const struct fuse_read_in *read_in = (void *)(in + 1);
	const struct fuse_write_in *write_in = (void *)(in + 1);
	struct fuse_write_out written = { 0 };
	ssize_t count;

	while (receive(message))
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
		default:
			serve(in);
		}
}

/* --- NBD (doc/proto.md of the NBD project) ----------------------------------------------------- */

#define NBD_OPT_EXPORT_NAME 1
#define NBD_FLAG_SEND_FLUSH (1 << 2)
#define NBD_REQUEST_MAGIC 0x25609513
#define NBD_SIMPLE_REPLY_MAGIC 0x67446698

enum { NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_DISC, NBD_CMD_FLUSH };

struct nbd_request {
	uint32_t magic;
	uint16_t flags, type;
	uint64_t cookie, offset;
	uint32_t length;
} __attribute__((packed));

struct nbd_simple_reply {
	uint32_t magic, error;
	uint64_t cookie;
} __attribute__((packed));

_Static_assert(sizeof(struct nbd_simple_reply) == sizeof(struct fuse_out_header),
	       "a READ is answered in the place of the server's reply");

#define SLOTS 128 /* requests in flight; a cookie is a slot's number */
#define READ_AHEAD (256 << 10) /* bytes of replies by one recv, unless a single one is longer */

static int server, can_flush;
static char *messages[SLOTS];
static int idle[SLOTS], idle_count; /* the last one first: its memory is warm */
static struct nbd_request requests[SLOTS];
static struct iovec batch[2 * SLOTS]; /* what is to be sent: from batch_first, to batch_count */
static int request_count, batch_first, batch_count;

static void to_server(int slot, int type, uint64_t offset, uint32_t length)
{
	struct iovec *last = batch + batch_count - 1;
	struct nbd_request *request = &requests[request_count++];

	*request = (struct nbd_request){ htobe32(NBD_REQUEST_MAGIC), 0, htobe16(type), htobe64(slot),
					 htobe64(offset), htobe32(length) };
	if (batch_count > batch_first && last->iov_base + last->iov_len == request)
		last->iov_len += sizeof *request;
	else
		batch[batch_count++] = (struct iovec){ request, sizeof *request };
	if (type == NBD_CMD_WRITE)
		batch[batch_count++] = (struct iovec){ messages[slot] + 4096, length };
	idle_count--;
}

/* From /dev/fuse to the batch, all there is room for. */
static void take(void)
{
	while (idle_count && request_count < SLOTS) {
		int slot = idle[idle_count - 1];
		struct fuse_in_header *in = header(messages[slot]);
		/* offset and size are at the same places in fuse_write_in */
		struct fuse_read_in *arg = (void *)(in + 1);

		if (!receive(messages[slot]))
			return;
		if (in->opcode == FUSE_READ && arg->offset < size) {
			if (arg->size > size - arg->offset)
				arg->size = size - arg->offset;
			to_server(slot, NBD_CMD_READ, arg->offset, arg->size);
		} else if (in->opcode == FUSE_WRITE) {
			to_server(slot, NBD_CMD_WRITE, arg->offset, arg->size);
		} else if (in->opcode == FUSE_FSYNC && can_flush) {
			to_server(slot, NBD_CMD_FLUSH, 0, 0);
		} else if (in->opcode == FUSE_READ || in->opcode == FUSE_FSYNC) {
			reply(in, 0, NULL, 0);
		} else {
			serve(in);
		}
	}
}

static void send_batch(void)
{
	while (batch_first < batch_count) {
		struct msghdr message = { .msg_iov = batch + batch_first,
					  .msg_iovlen = batch_count - batch_first };
		ssize_t sent = sendmsg(server, &message, MSG_DONTWAIT | MSG_NOSIGNAL);

		if (sent < 0 && errno == EAGAIN)
			return;
		if (sent < 0)
			die("sendmsg");
		while (batch_first < batch_count && (size_t)sent >= batch[batch_first].iov_len)
			sent -= batch[batch_first++].iov_len;
		if (sent) {
			batch[batch_first].iov_base += sent;
			batch[batch_first].iov_len -= sent;
		}
	}
	request_count = batch_first = batch_count = 0;
}

/* One reply of the server's, if it is whole: its length. Else as much as it wants. */
static size_t answer(char *at, size_t have, size_t *wanted)
{
	struct nbd_simple_reply nbd = *(struct nbd_simple_reply *)at;
	uint64_t slot = be64toh(nbd.cookie);
	int error = be32toh(nbd.error); /* NBD's are Linux's numbers */

	if (be32toh(nbd.magic) != NBD_SIMPLE_REPLY_MAGIC || slot >= SLOTS) {
		fprintf(stderr, "limit: the server sent what is no simple reply\n");
		exit(1);
	}
	const struct fuse_in_header *in = header(messages[slot]);
	const struct fuse_read_in *arg = (void *)(in + 1);

	*wanted = sizeof nbd + (in->opcode == FUSE_READ && !error ? arg->size : 0);
	if (have < *wanted)
		return 0;
	if (in->opcode == FUSE_READ && !error) {
		*(struct fuse_out_header *)at = (struct fuse_out_header){ *wanted, 0, in->unique };
		if (write(fuse, at, *wanted) < 0 && errno != ENOENT && errno != ENODEV)
			perror("write");
	} else {
		struct fuse_write_out written = { .size = arg->size };

		reply(in, -error, &written, in->opcode == FUSE_WRITE && !error ? sizeof written : 0);
	}
	idle[idle_count++] = slot;
	return *wanted;
}

/* From the server to /dev/fuse, all there is. */
static void answers(void)
{
	static char data[sizeof(struct nbd_simple_reply) + MAX_WRITE] __attribute__((aligned(4096)));
	static size_t have, wanted;
	size_t room, done, next;
	ssize_t got;

	do {
		/* No more than one long reply: the next one begins where this one does. */
		room = (wanted > READ_AHEAD ? wanted : READ_AHEAD) - have;
		got = recv(server, data + have, room, MSG_DONTWAIT);
		if (got < 0 && errno == EAGAIN)
			return;
		if (got < 0)
			die("recv");
		if (!got)
			exit(1);
		have += got;
		wanted = 0;
		for (done = 0; have - done >= sizeof(struct nbd_simple_reply); done += next)
			if (!(next = answer(data + done, have - done, &wanted)))
				break;
			else
				wanted = 0;
		have -= done;
		memmove(data, data + done, have);
	} while ((size_t)got == room);
}

static void get(void *into, size_t length)
{
	if (recv(server, into, length, MSG_WAITALL) != (ssize_t)length)
		die("the server's handshake");
}

static void negotiate(const char *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	struct {
		char magic[16];
		uint16_t flags;
	} __attribute__((packed)) greeting;
	struct {
		uint32_t flags;
		char magic[8];
		uint32_t option, length;
	} __attribute__((packed)) chosen = { htobe32(3), "IHAVEOPT", htobe32(NBD_OPT_EXPORT_NAME), 0 };
	struct {
		uint64_t size;
		uint16_t flags;
	} __attribute__((packed)) export;
	int bytes = 4 << 20;

	strncpy(address.sun_path, path, sizeof address.sun_path - 1);
	server = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (server < 0 || connect(server, (void *)&address, sizeof address) < 0)
		die(path);
	setsockopt(server, SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof bytes);
	get(&greeting, sizeof greeting);
	if (memcmp(greeting.magic, "NBDMAGICIHAVEOPT", 16) || (be16toh(greeting.flags) & 3) != 3) {
		fprintf(stderr, "limit: no fixed newstyle handshake without zeroes\n");
		exit(1);
	}
	if (send(server, &chosen, sizeof chosen, MSG_NOSIGNAL) < 0)
		die("send");
	get(&export, sizeof export);
	size = be64toh(export.size);
	can_flush = be16toh(export.flags) & NBD_FLAG_SEND_FLUSH;
}

static void serve_nbd(void)
{
	struct pollfd ready[] = { { .fd = fuse }, { .fd = server } };
	char *memory = mmap(NULL, (size_t)SLOTS * MESSAGE_BYTES, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED)
		die("mmap");
	for (; idle_count < SLOTS; idle_count++) {
		messages[idle_count] = memory + (size_t)idle_count * MESSAGE_BYTES;
		idle[idle_count] = idle_count;
	}
	for (;;) {
		ready[0].events = idle_count && request_count < SLOTS ? POLLIN : 0;
		ready[1].events = POLLIN | (batch_count ? POLLOUT : 0);
		if (poll(ready, 2, -1) < 0 && errno != EINTR)
			die("poll");
		if (ready[0].revents)
			take();
		if (batch_count)
			send_batch();
		if (ready[1].revents & ~POLLOUT)
			answers();
	}
}

int main(int argc, char **argv)
{
	struct stat status;
	char options[128];
	int nbd, file = -1;

	if (argc != 3) {
		fprintf(stderr, "usage: limit FILE|SOCKET MOUNTPOINT\n");
		return 2;
	}
	if (stat(argv[1], &status) < 0)
		die(argv[1]);
	nbd = S_ISSOCK(status.st_mode);
	size = status.st_size;
	if (nbd)
		negotiate(argv[1]);
	else if ((file = open(argv[1], O_RDWR)) < 0)
		die(argv[1]);
	fuse = open("/dev/fuse", nbd ? O_RDWR | O_NONBLOCK : O_RDWR);
	snprintf(options, sizeof options, "fd=%d,rootmode=40000,user_id=0,group_id=0", fuse);
	if (fuse < 0 || mount("limit", argv[2], "fuse", MS_NODEV | MS_NOSUID, options) < 0)
		die(argv[2]);
	if (nbd)
		serve_nbd();
	else
		serve_file(file);
}
