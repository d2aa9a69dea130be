// SPDX-License-Identifier: MIT
/*
 * What the guest of a vGPU does: give the GPU work through i915's render node, in a loop, and look at every result.
 *
 * A round submits DEPTH batches to each engine and then waits for all of them. A batch stores two values into two
 * objects: its number into the slot of a large one, and the same into the engine's word of a small one. What is right is
 * known beforehand, and the slots keep it: each SWEEP rounds all of them are looked at again, so a result that is lost
 * later, when the guest is migrated for example, is found too.
 *
 * It prints lines, each with "load: " in front:
 *   ready ENGINE...              once, before the first round
 *   right N wrong N late N       so often as INTERVAL says, N counted from the start; late are waits of a second in vain
 *   wrong ...                    what was read instead of what, for the first WRONG_MAX of them
 *   failed ...                   a request that failed, and the errno; the program ends with 1
 */
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

#include <i915_drm.h>

#define NODE		"/dev/dri/renderD128"
#define PAGE		4096u
#define SLOTS		4096u
#define SLOTS_SIZE	(SLOTS * sizeof(uint32_t))
#define LAST_SIZE	PAGE
#define BATCH_BYTES	64u
#define DEPTH		2u
#define SWEEP		64u
#define INTERVAL	0.5		/* seconds */
#define SECOND		1000000000ll	/* nanoseconds */
#define WRONG_MAX	16u

/* Graphics addresses of the objects in the context's own page tables, below 4 GiB and far from each other. */
#define SLOTS_AT	0x10000000ull
#define LAST_AT		0x20000000ull
#define BATCHES_AT	0x30000000ull

/* Intel's open-source PRM for Skylake, volume 2a: MI_STORE_DATA_IMM of one dword, MI_BATCH_BUFFER_END. */
#define STORE_DWORD	(0x20u << 23 | 2)
#define BATCH_END	(0x0au << 23)

/* The upper half of what is stored: by it the values are known in the GPU's own record. */
#define SIGNATURE	0x4c320000u

struct engine {
	const char *name;
	uint64_t flag;
	int number;		/* of I915_PARAM_HAS_...; 0: every GPU has it */
};

static const struct engine known[] = {
	{ "rcs0", I915_EXEC_RENDER, 0 },
	{ "bcs0", I915_EXEC_BLT, I915_PARAM_HAS_BLT },
	{ "vcs0", I915_EXEC_BSD, I915_PARAM_HAS_BSD },
	{ "vecs0", I915_EXEC_VEBOX, I915_PARAM_HAS_VEBOX },
};

#define ENGINES	(sizeof(known) / sizeof(known[0]))

struct object {
	uint32_t handle;
	uint32_t *words;
	uint64_t at;
};

static const struct engine *engines[ENGINES];
static unsigned int nr_engines;
static int fd;
static struct object slots, last, batches;
static uint32_t expected[SLOTS];
static unsigned long right, wrong, late;
static double told_at;

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

static void tell(double at)
{
	printf("load: right %lu wrong %lu late %lu\n", right, wrong, late);
	told_at = at;
}

static void __attribute__((noreturn)) failed(const char *what)
{
	printf("load: failed %s: %s\n", what, strerror(errno));
	exit(1);
}

static int request(unsigned long number, void *argument)
{
	int result;

	do {
		result = ioctl(fd, number, argument);
	} while (result < 0 && errno == EINTR);
	return result;
}

static int parameter(int number)
{
	int value = 0;
	struct drm_i915_getparam asked = { .param = number, .value = &value };

	return request(DRM_IOCTL_I915_GETPARAM, &asked) ? 0 : value;
}

static struct object make_object(uint64_t size, uint64_t at)
{
	struct drm_i915_gem_create made = { .size = size };
	struct drm_i915_gem_mmap_offset mapped = { .flags = I915_MMAP_OFFSET_WB };
	void *words;

	if (request(DRM_IOCTL_I915_GEM_CREATE, &made))
		failed("I915_GEM_CREATE");
	mapped.handle = made.handle;
	if (request(DRM_IOCTL_I915_GEM_MMAP_OFFSET, &mapped))
		failed("I915_GEM_MMAP_OFFSET");
	words = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, mapped.offset);
	if (words == MAP_FAILED)
		failed("mmap");
	memset(words, 0, size);
	return (struct object){ .handle = made.handle, .words = words, .at = at };
}

static void find_engines(void)
{
	unsigned int i;

	printf("load: ready");
	for (i = 0; i < ENGINES; i++) {
		if (known[i].number && !parameter(known[i].number))
			continue;
		engines[nr_engines++] = &known[i];
		printf(" %s", known[i].name);
	}
	printf("\n");
}

static uint32_t *store(uint32_t *words, uint64_t at, uint32_t value)
{
	*words++ = STORE_DWORD;
	*words++ = (uint32_t)at;
	*words++ = (uint32_t)(at >> 32);
	*words++ = value;
	return words;
}

static void fill_in(struct drm_i915_gem_exec_object2 *entry, const struct object *object, uint64_t flags)
{
	*entry = (struct drm_i915_gem_exec_object2){
		.handle = object->handle,
		.offset = object->at,
		.flags = EXEC_OBJECT_PINNED | EXEC_OBJECT_SUPPORTS_48B_ADDRESS | flags,
	};
}

/* Give an engine the batch with this number; it is the index-th of its round. */
static void submit(unsigned int engine, unsigned int index, uint32_t number)
{
	unsigned int slot = number % SLOTS;
	uint32_t value = SIGNATURE | (number & 0xffff);
	uint32_t *words = batches.words + index * BATCH_BYTES / sizeof(uint32_t);
	struct drm_i915_gem_exec_object2 entries[3];
	struct drm_i915_gem_execbuffer2 work = {
		.buffers_ptr = (uintptr_t)entries,
		.buffer_count = 3,
		.batch_start_offset = index * BATCH_BYTES,
		.batch_len = BATCH_BYTES,
		.flags = engines[engine]->flag | I915_EXEC_NO_RELOC,
	};

	slots.words[slot] = ~value;
	expected[slot] = value;
	words = store(words, slots.at + slot * sizeof(uint32_t), value);
	words = store(words, last.at + engine * sizeof(uint32_t), value);
	*words++ = BATCH_END;
	*words = 0;
	/*
	 * Not EXEC_OBJECT_WRITE: the engines would wait for each other. The CPU's caches and the GPU's are one, and the
	 * batch's object is what is waited for.
	 */
	fill_in(&entries[0], &slots, 0);
	fill_in(&entries[1], &last, 0);
	fill_in(&entries[2], &batches, 0);
	if (request(DRM_IOCTL_I915_GEM_EXECBUFFER2, &work))
		failed(engines[engine]->name);
}

static void wait_for_all(void)
{
	for (;;) {
		struct drm_i915_gem_wait wait = { .bo_handle = batches.handle, .timeout_ns = SECOND };

		if (!request(DRM_IOCTL_I915_GEM_WAIT, &wait))
			return;
		if (errno != ETIME)
			failed("I915_GEM_WAIT");
		late++;
		tell(now());
	}
}

static void judge(const char *what, unsigned int index, uint32_t found, uint32_t want)
{
	if (found == want) {
		right++;
		return;
	}
	if (wrong++ < WRONG_MAX)
		printf("load: wrong %s %u is %#x and not %#x\n", what, index, found, want);
}

static void sweep(void)
{
	unsigned int slot;

	for (slot = 0; slot < SLOTS; slot++)
		if (expected[slot] && slots.words[slot] != expected[slot]) {
			judge("kept slot", slot, slots.words[slot], expected[slot]);
			expected[slot] = slots.words[slot];	/* once is enough */
		}
}

static void do_round(uint32_t first)
{
	unsigned int index, count = nr_engines * DEPTH;

	for (index = 0; index < count; index++)
		submit(index % nr_engines, index, first + index);
	wait_for_all();
	__sync_synchronize();
	for (index = 0; index < count; index++) {
		unsigned int slot = (first + index) % SLOTS;

		judge("slot", slot, slots.words[slot], expected[slot]);
	}
	for (index = 0; index < nr_engines; index++) {
		uint32_t want = SIGNATURE | ((first + count - nr_engines + index) & 0xffff);

		judge(engines[index]->name, index, last.words[index], want);
	}
}

int main(void)
{
	uint32_t number = 0, rounds = 0;

	setvbuf(stdout, NULL, _IOLBF, 0);
	fd = open(NODE, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		failed(NODE);
	slots = make_object(SLOTS_SIZE, SLOTS_AT);
	last = make_object(LAST_SIZE, LAST_AT);
	batches = make_object(PAGE, BATCHES_AT);
	find_engines();
	for (;;) {
		do_round(number);
		number += nr_engines * DEPTH;
		if (++rounds % SWEEP == 0)
			sweep();
		if (now() - told_at >= INTERVAL)
			tell(now());
	}
}
