// SPDX-License-Identifier: MIT
/*
 * What the same work costs in C: the same requests and the same bytes, without any check of what comes back beyond
 * its errno. Prints one line of "name number" pairs; times are seconds.
 *
 * GROUP is a number, or PID:FD, the group's file that another process has open: the device is borrowed as vfio-mig
 * does. "stop", "bitmap", "read", "load" and "start" are what the requests to the device took, and nothing else;
 * "stopped" and "downtime" are all of the time in which it stood still.
 *
 *   reference rfc-save GROUP DEVICE FILE	stop, fetch the dirty bitmap of 4 GiB, read the state region, start; then write
 *					and sync FILE
 *   reference rfc-load GROUP DEVICE FILE	stop, write FILE to the state region (timed), start
 *   reference window FILE			what rfc-save does while the device is stopped, with FILE for a region
 *   reference window-move rfc|v2 FILE		what rfc-move or v2-move does with the state while the device is stopped
 *   reference dirty GROUP DEVICE PAGES		fetch the dirty bitmap of PAGES pages and count them
 *   reference v2-save GROUP DEVICE FILE	stop, copy the stream to FILE, stop again ("copy"), start; then sync FILE
 *   reference v2-load GROUP DEVICE FILE	stop, copy FILE to the device, have it loaded (timed so far), start
 *   reference rfc-move GROUP DEVICE GROUP DEVICE	save into a pipe, from which a second process loads the other device and
 *					starts it; the first one stays stopped
 *   reference v2-move GROUP DEVICE GROUP DEVICE	the same by protocol v2
 *   reference decode BITMAP		count the dirty pages of a bitmap, and find their runs
 *   reference copy SOURCE TARGET BITMAP	copy the dirty pages of a file to a sparse one, zeros left out
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/vfio.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define STATUS_SET	_IO(VFIO_TYPE, VFIO_BASE + 14)	/* VFIO_DEVICE_PCI_STATUS_SET of the 2017 RFC */
#define GET_DIRTY	_IO(VFIO_TYPE, VFIO_BASE + 15)	/* VFIO_DEVICE_PCI_GET_DIRTY_BITMAP */
#define DIRTY_PAGES	(1 << 20)			/* of one request */
#define STATE_REGION	9
#define CHUNK		(1 << 20)
#define PAGE		4096

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static void *take(size_t size)
{
	void *memory = malloc(size);

	if (!memory)
		err(1, "malloc");
	return memory;
}

static void write_all(int fd, const char *from, size_t size)
{
	while (size) {
		ssize_t done = write(fd, from, size);

		if (done < 0)
			err(1, "write");
		from += done;
		size -= done;
	}
}

static int create(const char *path)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);

	if (fd < 0)
		err(1, "%s", path);
	return fd;
}

static int borrow(int pid, int fd)
{
	int process = syscall(SYS_pidfd_open, pid, 0), copy;

	if (process < 0)
		err(1, "process %d", pid);
	copy = syscall(SYS_pidfd_getfd, process, fd, 0);
	if (copy < 0)
		err(1, "fd %d of process %d", fd, pid);
	close(process);
	return copy;
}

static int open_group(const char *number)
{
	char path[64];
	int container = open("/dev/vfio/vfio", O_RDWR), group;

	snprintf(path, sizeof(path), "/dev/vfio/%s", number);
	group = open(path, O_RDWR);
	if (container < 0 || group < 0 || ioctl(group, VFIO_GROUP_SET_CONTAINER, &container) ||
	    ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU))
		err(1, "%s", path);
	return group;
}

static int open_device(const char *number, const char *name)
{
	const char *fd = strchr(number, ':');
	int group = fd ? borrow(atoi(number), atoi(fd + 1)) : open_group(number);
	int device = ioctl(group, VFIO_GROUP_GET_DEVICE_FD, name);

	if (device < 0)
		err(1, "%s", name);
	return device;
}

static void set_status(int device, uint32_t flags)
{
	uint32_t request[2] = { sizeof(request), flags };

	if (ioctl(device, STATUS_SET, request))
		err(1, "status");
}

struct dirty {
	uint64_t address;
	uint64_t pages;
	uint64_t bits[DIRTY_PAGES / 64 + 1];		/* the kernel copies one word more than it needs */
};

static unsigned long long fetch_dirty(int device, struct dirty *dirty, uint64_t page, uint64_t count)
{
	unsigned long long pages = 0;

	memset(dirty->bits, 0, (count + 63) / 64 * 8);
	dirty->address = page * PAGE;
	dirty->pages = count;
	if (ioctl(device, GET_DIRTY, dirty))
		err(1, "dirty bitmap");
	for (uint64_t at = 0; at < (count + 63) / 64; at++)
		pages += __builtin_popcountll(dirty->bits[at]);
	return pages;
}

static void dirty(int device, uint64_t total)
{
	struct dirty *request = take(sizeof(*request));
	unsigned long long pages = 0;
	double began = now();

	for (uint64_t at = 0; at < total; at += DIRTY_PAGES)
		pages += fetch_dirty(device, request, at, total - at < DIRTY_PAGES ? total - at : DIRTY_PAGES);
	printf("fetch %.6f pages %llu\n", now() - began, pages);
}

static struct vfio_region_info state_region(int device)
{
	struct vfio_region_info info = { .argsz = sizeof(info), .index = STATE_REGION };

	if (ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &info))
		err(1, "region");
	return info;
}

/* Moments of a save, each the end of what it is named after */
struct moments {
	double began, stop, bitmap, read, start;
};

struct region {
	struct vfio_region_info info;
	struct dirty *dirty;
	char *state;
};

static struct region prepare(int device)
{
	struct region region = { .info = state_region(device), .dirty = take(sizeof(*region.dirty)) };

	region.state = take(region.info.size);
	memset(region.state, 0, region.info.size);
	memset(region.dirty, 0, sizeof(*region.dirty));
	return region;
}

static uint32_t rfc_read(int device, struct region *region, struct moments *at)
{
	uint32_t size;

	at->began = now();
	set_status(device, 1);
	at->stop = now();
	fetch_dirty(device, region->dirty, 0, DIRTY_PAGES);
	at->bitmap = now();
	if (pread(device, region->state, region->info.size, region->info.offset) != (ssize_t)region->info.size)
		err(1, "state");
	at->read = now();
	memcpy(&size, region->state + 12, sizeof(size));	/* data_size of the HEAD record */
	return size;
}

static void rfc_save(int device, const char *file)
{
	struct region region = prepare(device);
	struct moments at;
	int out = create(file);
	uint32_t size = rfc_read(device, &region, &at);

	set_status(device, 2);
	at.start = now();
	write_all(out, region.state, size);
	fsync(out);
	printf("stopped %.6f stop %.6f bitmap %.6f read %.6f start %.6f total %.6f bytes %u\n", at.start - at.began,
	       at.stop - at.began, at.bitmap - at.stop, at.read - at.bitmap, at.start - at.read, now() - at.began, size);
}

static void rfc_load(int device, const char *file)
{
	struct vfio_region_info info = state_region(device);
	char *state = take(info.size);
	int in = open(file, O_RDONLY);
	double began;

	memset(state, 0, info.size);
	if (in < 0 || read(in, state, info.size) <= 0)
		err(1, "%s", file);
	set_status(device, 1);
	began = now();
	if (pwrite(device, state, info.size, info.offset) != (ssize_t)info.size)
		err(1, "state");
	printf("write %.6f\n", now() - began);
	set_status(device, 2);
}

static void window(const char *path)
{
	struct dirty *request = take(sizeof(*request));
	unsigned long long pages = 0;
	struct stat status;
	int fd = open(path, O_RDONLY);
	char *state;
	double began;

	if (fd < 0 || fstat(fd, &status))
		err(1, "%s", path);
	state = take(status.st_size);
	memset(state, 0, status.st_size);
	memset(request, 0, sizeof(*request));
	began = now();
	for (int at = 0; at < DIRTY_PAGES / 64; at++)
		pages += __builtin_popcountll(request->bits[at]);
	if (pread(fd, state, status.st_size, 0) != status.st_size)
		err(1, "%s", path);
	printf("stopped %.6f pages %llu\n", now() - began, pages);
}

static int set_state(int device, uint32_t state)
{
	uint64_t buffer[2];
	struct vfio_device_feature *feature = (void *)buffer;
	struct vfio_device_feature_mig_state *mig = (void *)feature->data;

	feature->argsz = sizeof(buffer);
	feature->flags = VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE;
	mig->device_state = state;
	mig->data_fd = -1;
	if (ioctl(device, VFIO_DEVICE_FEATURE, feature))
		err(1, "state %u", state);
	return mig->data_fd;
}

/* Copy a device's stream to @out; @read gets the seconds that the device took for it. */
static unsigned long long v2_read(int device, int out, char *chunk, double *read_time)
{
	unsigned long long total = 0;
	double began = now();
	int data = set_state(device, VFIO_DEVICE_STATE_STOP_COPY);
	ssize_t size;

	for (;;) {
		size = read(data, chunk, CHUNK);
		*read_time += now() - began;
		if (size <= 0)
			break;
		write_all(out, chunk, size);
		total += size;
		began = now();
	}
	if (size < 0)
		err(1, "data");
	began = now();
	close(data);
	set_state(device, VFIO_DEVICE_STATE_STOP);
	*read_time += now() - began;
	return total;
}

static char *take_chunk(void)
{
	char *chunk = take(CHUNK);

	memset(chunk, 0, CHUNK);
	return chunk;
}

static void v2_save(int device, const char *file)
{
	char *chunk = take_chunk();
	int out = create(file);
	unsigned long long total;
	double began = now(), stopped, copied, end, read_time = 0;

	set_state(device, VFIO_DEVICE_STATE_STOP);
	stopped = now();
	total = v2_read(device, out, chunk, &read_time);
	copied = now();
	set_state(device, VFIO_DEVICE_STATE_RUNNING);
	end = now();
	fsync(out);
	printf("stopped %.6f stop %.6f read %.6f copy %.6f start %.6f total %.6f bytes %llu\n", end - began,
	       stopped - began, read_time, copied - stopped, end - copied, now() - began, total);
}

static void v2_load(int device, const char *file)
{
	char *chunk = take(CHUNK);
	int in = open(file, O_RDONLY), data;
	unsigned long long total = 0;
	double began, write_time;
	ssize_t size;

	set_state(device, VFIO_DEVICE_STATE_STOP);
	began = now();
	data = set_state(device, VFIO_DEVICE_STATE_RESUMING);
	while ((size = read(in, chunk, CHUNK)) > 0) {
		write_all(data, chunk, size);
		total += size;
	}
	if (size < 0)
		err(1, "%s", file);
	close(data);
	set_state(device, VFIO_DEVICE_STATE_STOP);
	write_time = now() - began;
	set_state(device, VFIO_DEVICE_STATE_RUNNING);
	printf("write %.6f bytes %llu\n", write_time, total);
}

/* What the second process says when its device runs */
struct arrival {
	double load, start, end;
};

static void rfc_receive(int device, int in, struct region *region, struct arrival *said)
{
	size_t filled = 0;
	double began;
	ssize_t size;

	while ((size = read(in, region->state + filled, region->info.size - filled)) > 0)
		filled += size;
	if (size < 0)
		err(1, "pipe");
	began = now();
	set_status(device, 1);
	if (pwrite(device, region->state, region->info.size, region->info.offset) != (ssize_t)region->info.size)
		err(1, "state");
	said->load = now() - began;
	began = now();
	set_status(device, 2);
	said->end = now();
	said->start = said->end - began;
}

static void v2_receive(int device, int in, char *chunk, struct arrival *said)
{
	int data = -1;
	double began;
	ssize_t size;

	while ((size = read(in, chunk, CHUNK)) > 0) {
		began = now();
		if (data < 0)
			data = set_state(device, VFIO_DEVICE_STATE_RESUMING);
		write_all(data, chunk, size);
		said->load += now() - began;
	}
	if (size < 0 || data < 0)
		err(1, "pipe");
	began = now();
	close(data);
	set_state(device, VFIO_DEVICE_STATE_STOP);
	said->load += now() - began;
	began = now();
	set_state(device, VFIO_DEVICE_STATE_RUNNING);
	said->end = now();
	said->start = said->end - began;
}

static void receive(int device, int in, int answer, int is_v2)
{
	struct region region = is_v2 ? (struct region){ .state = take_chunk() } : prepare(device);
	struct arrival said = { 0 };

	write_all(answer, "r", 1);
	if (is_v2)
		v2_receive(device, in, region.state, &said);
	else
		rfc_receive(device, in, &region, &said);
	write_all(answer, (char *)&said, sizeof(said));
	exit(0);
}

static unsigned long long send_state(int device, int out, int is_v2, struct moments *at)
{
	struct region region = { 0 };
	unsigned long long total;
	double read_time = 0;

	if (!is_v2) {
		region = prepare(device);
		total = rfc_read(device, &region, at);
		write_all(out, region.state, total);
		return total;
	}
	region.state = take_chunk();
	at->began = now();
	set_state(device, VFIO_DEVICE_STATE_STOP);
	at->stop = at->bitmap = now();
	total = v2_read(device, out, region.state, &read_time);
	at->read = at->bitmap + read_time;
	return total;
}

static void move(int source, int target, int is_v2)
{
	int data[2], answer[2], status;
	unsigned long long total;
	struct arrival said;
	struct moments at;
	char ready;
	pid_t child;

	if (pipe(data) || pipe(answer) || fcntl(data[1], F_SETPIPE_SZ, CHUNK) < 0)
		err(1, "pipe");
	child = fork();
	if (child < 0)
		err(1, "fork");
	if (!child) {
		close(data[1]);
		receive(target, data[0], answer[1], is_v2);
	}
	close(data[0]);
	close(answer[1]);
	if (read(answer[0], &ready, 1) != 1)
		err(1, "target");
	total = send_state(source, data[1], is_v2, &at);
	close(data[1]);
	if (read(answer[0], &said, sizeof(said)) != sizeof(said) || waitpid(child, &status, 0) != child || status)
		errx(1, "target: failed");
	printf("downtime %.6f stop %.6f bitmap %.6f read %.6f load %.6f start %.6f bytes %llu\n", said.end - at.began,
	       at.stop - at.began, at.bitmap - at.stop, at.read - at.bitmap, said.load, said.start, total);
}

static void window_receive(int in, int answer, char *state, size_t size)
{
	int sink = open("/dev/null", O_WRONLY);
	size_t filled = 0;
	ssize_t part;
	double end;

	write_all(answer, "r", 1);
	while ((part = read(in, state + filled, size - filled)) > 0) {
		if (size == CHUNK)
			write_all(sink, state, part);	/* a stream goes on at once, a region in one piece */
		else
			filled += part;
	}
	if (filled)
		write_all(sink, state, size);
	end = now();
	write_all(answer, (char *)&end, sizeof(end));
	exit(0);
}

static void window_move(const char *path, int is_v2)
{
	int data[2], answer[2], fd = open(path, O_RDONLY);
	struct stat status;
	double began, end;
	ssize_t part;
	size_t size;
	char *state, ready;

	if (fd < 0 || fstat(fd, &status) || pipe(data) || pipe(answer) || fcntl(data[1], F_SETPIPE_SZ, CHUNK) < 0)
		err(1, "%s", path);
	size = is_v2 ? CHUNK : status.st_size;
	state = take(size);
	memset(state, 0, size);
	if (!fork()) {
		close(data[1]);
		memset(state, 1, size);		/* pages of its own */
		window_receive(data[0], answer[1], state, size);
	}
	close(data[0]);
	close(answer[1]);
	if (read(answer[0], &ready, 1) != 1)
		err(1, "target");
	began = now();
	while ((part = read(fd, state, size)) > 0) {
		uint32_t whole;

		memcpy(&whole, state + 12, sizeof(whole));	/* data_size of the HEAD record */
		write_all(data[1], state, is_v2 ? (size_t)part : whole);
	}
	close(data[1]);
	if (part < 0 || read(answer[0], &end, sizeof(end)) != sizeof(end))
		err(1, "%s", path);
	printf("stopped %.6f\n", end - began);
}

static uint64_t *map(const char *path, size_t *size)
{
	struct stat status;
	int fd = open(path, O_RDONLY);
	void *mapped;

	if (fd < 0 || fstat(fd, &status))
		err(1, "%s", path);
	*size = status.st_size;
	mapped = mmap(NULL, *size, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, 0);
	if (mapped == MAP_FAILED)
		err(1, "%s", path);
	return mapped;
}

static void decode(const char *path)
{
	size_t size, words, at;
	const uint64_t *bitmap = map(path, &size);
	unsigned long long pages = 0, runs = 0;
	double began = now(), counted;
	uint64_t before = 0;

	words = size / sizeof(*bitmap);
	for (at = 0; at < words; at++)
		pages += __builtin_popcountll(bitmap[at]);
	counted = now() - began;
	began = now();
	for (at = 0; at < words; at++) {	/* a run begins where a bit is set and the one before is not */
		runs += __builtin_popcountll(bitmap[at] & ~(bitmap[at] << 1 | before));
		before = bitmap[at] >> 63;
	}
	printf("count %.6f runs %.6f pages %llu found %llu\n", counted, now() - began, pages, runs);
}

static void copy(const char *source, const char *target, const char *path)
{
	static const char zero[PAGE];
	size_t size, length, page;
	const uint64_t *bitmap = map(path, &size);
	const char *memory = (void *)map(source, &length);
	int out = create(target);
	unsigned long long pages = 0;
	double began = now();

	for (page = 0; page < length / PAGE; page++) {
		const char *from = memory + page * PAGE;

		if (!(bitmap[page / 64] >> page % 64 & 1) || !memcmp(from, zero, PAGE))
			continue;
		if (pwrite(out, from, PAGE, page * PAGE) != PAGE)
			err(1, "%s", target);
		pages++;
	}
	if (ftruncate(out, length) || fsync(out))
		err(1, "%s", target);
	printf("total %.6f pages %llu\n", now() - began, pages);
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";

	if (argc == 5 && !strcmp(what, "rfc-save"))
		rfc_save(open_device(argv[2], argv[3]), argv[4]);
	else if (argc == 5 && !strcmp(what, "rfc-load"))
		rfc_load(open_device(argv[2], argv[3]), argv[4]);
	else if (argc == 5 && !strcmp(what, "dirty"))
		dirty(open_device(argv[2], argv[3]), strtoull(argv[4], NULL, 10));
	else if (argc == 5 && !strcmp(what, "v2-save"))
		v2_save(open_device(argv[2], argv[3]), argv[4]);
	else if (argc == 5 && !strcmp(what, "v2-load"))
		v2_load(open_device(argv[2], argv[3]), argv[4]);
	else if (argc == 6 && (!strcmp(what, "rfc-move") || !strcmp(what, "v2-move")))
		move(open_device(argv[2], argv[3]), open_device(argv[4], argv[5]), !strcmp(what, "v2-move"));
	else if (argc == 3 && !strcmp(what, "window"))
		window(argv[2]);
	else if (argc == 4 && !strcmp(what, "window-move"))
		window_move(argv[3], !strcmp(argv[2], "v2"));
	else if (argc == 3 && !strcmp(what, "decode"))
		decode(argv[2]);
	else if (argc == 5 && !strcmp(what, "copy"))
		copy(argv[2], argv[3], argv[4]);
	else
		errx(2, "see the head of reference.c");
	return 0;
}
