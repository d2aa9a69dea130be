// SPDX-License-Identifier: MIT
/*
 * What the same work costs in C: the same requests and the same bytes, without any check of what comes back beyond
 * its errno. Prints one line of "name number" pairs; times are seconds.
 *
 *   reference rfc-save GROUP DEVICE FILE	stop, fetch the dirty bitmap of 4 GiB, read the state region (timed so far),
 *					start; then write and sync FILE
 *   reference rfc-load GROUP DEVICE FILE	stop, write FILE to the state region (timed), start
 *   reference window FILE			what rfc-save does while the device is stopped, with FILE for a region
 *   reference dirty GROUP DEVICE PAGES		fetch the dirty bitmap of PAGES pages and count them
 *   reference v2-save GROUP DEVICE FILE	stop, copy the stream to FILE, stop again (timed so far), start, sync FILE
 *   reference v2-load GROUP DEVICE FILE	stop, copy FILE to the device, have it loaded (timed so far), start
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

static int open_device(const char *number, const char *name)
{
	char path[64];
	int container = open("/dev/vfio/vfio", O_RDWR), group, device;

	snprintf(path, sizeof(path), "/dev/vfio/%s", number);
	group = open(path, O_RDWR);
	if (container < 0 || group < 0 || ioctl(group, VFIO_GROUP_SET_CONTAINER, &container) ||
	    ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU))
		err(1, "%s", path);
	device = ioctl(group, VFIO_GROUP_GET_DEVICE_FD, name);
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

static void rfc_save(int device, const char *file)
{
	struct vfio_region_info info = state_region(device);
	struct dirty *request = take(sizeof(*request));
	double began, read_time, stopped;
	char *state = take(info.size);
	int out = create(file);
	uint32_t size;

	memset(state, 0, info.size);
	memset(request, 0, sizeof(*request));
	began = now();
	set_status(device, 1);
	fetch_dirty(device, request, 0, DIRTY_PAGES);
	read_time = now();
	if (pread(device, state, info.size, info.offset) != (ssize_t)info.size)
		err(1, "state");
	read_time = now() - read_time;
	set_status(device, 2);
	stopped = now() - began;
	memcpy(&size, state + 12, sizeof(size));	/* data_size of the HEAD record */
	write_all(out, state, size);
	fsync(out);
	printf("stopped %.6f read %.6f total %.6f bytes %u\n", stopped, read_time, now() - began, size);
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

static void v2_save(int device, const char *file)
{
	char *chunk = take(CHUNK);
	int out = create(file), data;
	unsigned long long total = 0;
	double began, read_time;
	ssize_t size;

	set_state(device, VFIO_DEVICE_STATE_STOP);
	began = now();
	data = set_state(device, VFIO_DEVICE_STATE_STOP_COPY);
	while ((size = read(data, chunk, CHUNK)) > 0) {
		write_all(out, chunk, size);
		total += size;
	}
	if (size < 0)
		err(1, "data");
	close(data);
	set_state(device, VFIO_DEVICE_STATE_STOP);
	read_time = now() - began;
	set_state(device, VFIO_DEVICE_STATE_RUNNING);
	fsync(out);
	printf("read %.6f total %.6f bytes %llu\n", read_time, now() - began, total);
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
	else if (argc == 3 && !strcmp(what, "window"))
		window(argv[2]);
	else if (argc == 3 && !strcmp(what, "decode"))
		decode(argv[2]);
	else if (argc == 5 && !strcmp(what, "copy"))
		copy(argv[2], argv[3], argv[4]);
	else
		errx(2, "see the head of reference.c");
	return 0;
}
