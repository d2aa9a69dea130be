// SPDX-License-Identifier: GPL-2.0-only
/*
 * A stream of the migration protocol v2, as mig.h has it: what read() gives and
 * write() takes, PRE_COPY's dirty bytes included.
 */
#include <linux/ktime.h>
#include <linux/math64.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#ifdef GVT_SINCE_6_12
#include <linux/unaligned.h>
#else
#include <asm/unaligned.h>
#endif

#include "mig.h"
#include "lab/lab.h"

#define GVT_MIG_SPAN_MAX	(3600 * NSEC_PER_SEC)	/* keeps products small */

/* --- filler ---------------------------------------------------------- */

static u64 gvt_filler_word(u64 seed, u64 index)
{
	u64 z = seed + index * 0x9e3779b97f4a7c15ULL;

	z = (z ^ z >> 32) * 0xd6e8feb86659fd93ULL;
	return z ^ z >> 32;
}

static void gvt_filler(u64 seed, u64 at, u8 *buf, size_t bytes)
{
	size_t skip, part;
	u64 word;

	for (; bytes; bytes -= part, buf += part, at += part) {
		word = gvt_filler_word(seed, at / sizeof(word));
		skip = at % sizeof(word);
		part = min(bytes, sizeof(word) - skip);
		if (part == sizeof(word))
			put_unaligned(word, (u64 *)buf);
		else
			memcpy(buf, (u8 *)&word + skip, part);
	}
}

/* --- a stream's stages; under migf->lock ----------------------------- */

void gvt_stage_enter(struct gvt_mig_file *migf, enum gvt_mig_stage stage,
		     u64 size)
{
	migf->stage = stage;
	migf->pos = 0;
	migf->size = size;
}

/* The stage's bytes; NULL: they are filler */
static void *gvt_stage_memory(struct gvt_mig_file *migf)
{
	switch (migf->stage) {
	case GVT_STAGE_HEADER:
		return &migf->header;
	case GVT_STAGE_RECORD:
		return &migf->record;
	case GVT_STAGE_IMAGE:
		return migf->image;
	default:
		return NULL;
	}
}

/* @bytes of filler from the stage's position on */
static void gvt_stage_filler(struct gvt_mig_file *migf, u8 *buf, size_t bytes)
{
	u64 at = migf->pos;

	if (migf->stage == GVT_STAGE_PAGE)
		at += migf->header.filler + migf->record.seq * GVT_MIG_PAYLOAD;
	gvt_filler(migf->header.seed, at, buf, bytes);
}

static size_t gvt_stage_part(const struct gvt_mig_file *migf, size_t bytes)
{
	return min_t(u64, min_t(size_t, bytes, GVT_MIG_CHUNK),
		     migf->size - migf->pos);
}

/* Nobody who ends a session waits for the whole of a large read() or write() */
static int gvt_stage_interrupted(const struct gvt_mig_file *migf)
{
	if (READ_ONCE(migf->over))
		return -ENODEV;
	return signal_pending(current) ? -ERESTARTSYS : 0;
}

/* --- saving; under migf->lock ---------------------------------------- */

/* A device cannot be dirtier than what of it has been sent already */
u64 gvt_dirty_limit(const struct gvt_mig_file *migf)
{
	u64 sent = migf->header.filler;

	if (migf->stage == GVT_STAGE_HEADER)
		sent = 0;
	else if (migf->stage == GVT_STAGE_FILLER)
		sent = migf->pos;
	return max_t(u64, sent, GVT_MIG_DIRTY_MIN);
}

/* Let what was dirtied since the last call be dirty */
void gvt_dirty_grow(struct gvt_mig_file *migf)
{
	u64 rate = READ_ONCE(migf->vgpu->mig.dirty_rate);
	u64 now = ktime_get_ns();
	u64 span = now - migf->since;
	u64 grown;

	if (!migf->dirtying || !rate || span > GVT_MIG_SPAN_MAX)
		migf->since = now;
	if (!migf->dirtying || !rate)
		return;
	span = min_t(u64, span, GVT_MIG_SPAN_MAX);
	grown = mul_u64_u64_div_u64(span, rate, NSEC_PER_SEC);
	/* what makes no whole byte yet counts the next time */
	if (span < GVT_MIG_SPAN_MAX)
		migf->since += mul_u64_u64_div_u64(grown, NSEC_PER_SEC, rate);
	migf->dirty = min(migf->dirty + grown, gvt_dirty_limit(migf));
}

void gvt_dirty_go(struct gvt_mig_file *migf, bool on)
{
	gvt_dirty_grow(migf);
	migf->dirtying = on;
	migf->since = ktime_get_ns();
}

u64 gvt_left_initial(const struct gvt_mig_file *migf)
{
	u64 left = migf->size - migf->pos;

	switch (migf->stage) {
	case GVT_STAGE_HEADER:
		return left + migf->header.filler;
	case GVT_STAGE_FILLER:
		return left;
	default:
		return 0;
	}
}

/* Bytes that can be read before there is nothing more but the image */
u64 gvt_left_dirty(const struct gvt_mig_file *migf)
{
	u64 left = round_down(migf->dirty, GVT_MIG_PAGE);

	if (migf->stage == GVT_STAGE_PAGE)
		left += migf->size - migf->pos;
	else if (migf->stage == GVT_STAGE_RECORD &&
		 migf->record.type == GVT_MIG_DIRTY)
		left += migf->size - migf->pos + GVT_MIG_PAYLOAD;
	return left;
}

u64 gvt_left_image(const struct gvt_mig_file *migf)
{
	u32 size = migf->image_size ?: gvt_image_now(migf->vgpu);

	switch (migf->stage) {
	case GVT_STAGE_END:
		return 0;
	case GVT_STAGE_IMAGE:
		return migf->size - migf->pos;
	case GVT_STAGE_RECORD:
		if (migf->record.type == GVT_MIG_IMAGE)
			return migf->size - migf->pos + size;
		fallthrough;
	default:
		return sizeof(migf->record) + size;
	}
}

/* The next record, if there is anything to put into one */
static bool gvt_save_record(struct gvt_mig_file *migf)
{
	gvt_dirty_grow(migf);
	if (migf->dirty >= GVT_MIG_PAGE) {
		migf->dirty -= GVT_MIG_PAGE;
		migf->again -= min_t(u64, migf->again, GVT_MIG_PAGE);
		migf->reinit = false;
		migf->record.type = GVT_MIG_DIRTY;
		migf->record.size = GVT_MIG_PAYLOAD;
	} else if (!migf->precopy) {
		migf->record.type = GVT_MIG_IMAGE;
		migf->record.size = migf->image_size;
	} else {
		return false;
	}
	migf->record.seq = migf->seq++;
	gvt_stage_enter(migf, GVT_STAGE_RECORD, sizeof(migf->record));
	return true;
}

/* A stage is over: false when there is nothing more, or not now */
static bool gvt_save_next(struct gvt_mig_file *migf)
{
	switch (migf->stage) {
	case GVT_STAGE_HEADER:
		if (!migf->header.filler)
			return gvt_save_record(migf);
		gvt_stage_enter(migf, GVT_STAGE_FILLER, migf->header.filler);
		return true;
	case GVT_STAGE_FILLER:
	case GVT_STAGE_PAGE:
		return gvt_save_record(migf);
	case GVT_STAGE_RECORD:
		gvt_stage_enter(migf, migf->record.type == GVT_MIG_DIRTY ?
				GVT_STAGE_PAGE : GVT_STAGE_IMAGE,
				migf->record.size);
		return true;
	case GVT_STAGE_IMAGE:
		gvt_stage_enter(migf, GVT_STAGE_END, 0);
		return false;
	default:
		return false;
	}
}

/* A mistake: the stream from its first byte on once more */
void gvt_save_restart(struct gvt_mig_file *migf)
{
	migf->seq = 0;
	gvt_stage_enter(migf, GVT_STAGE_HEADER, sizeof(migf->header));
}

static int gvt_save_part(struct gvt_mig_file *migf, char __user *buf,
			 size_t bytes)
{
	const u8 *memory = gvt_stage_memory(migf);

	if (memory) {
		memory += migf->pos;
	} else {
		gvt_stage_filler(migf, migf->chunk, bytes);
		memory = migf->chunk;
	}
	return copy_to_user(buf, memory, bytes) ? -EFAULT : 0;
}

/* Bytes that a read of @part bytes takes away */
static size_t gvt_save_taken(const struct gvt_mig_file *migf, size_t part)
{
	if (part < sizeof(u64) && gvt_defect(migf->vgpu, GVT_DEFECT_READ_LOSES))
		return min_t(u64, sizeof(u64), migf->size - migf->pos);
	return part;
}

/* At the end, and nothing was read: what does read() return? */
static int gvt_save_end(struct gvt_mig_file *migf)
{
	if (migf->precopy || (migf->header.flags & GVT_MIG_PRE_COPY &&
			      gvt_defect(migf->vgpu, GVT_DEFECT_PRECOPY_ENOMSG)))
		return -ENOMSG;
	if (gvt_defect(migf->vgpu, GVT_DEFECT_READ_RESTARTS))
		gvt_save_restart(migf);
	return 0;
}

ssize_t gvt_save(struct gvt_mig_file *migf, char __user *buf, size_t count)
{
	size_t done = 0, part;
	int ret = 0;

	while (done < count) {
		if (migf->pos == migf->size && !gvt_save_next(migf))
			break;
		ret = gvt_stage_interrupted(migf);
		if (ret)
			break;
		part = gvt_stage_part(migf, count - done);
		ret = gvt_save_part(migf, buf + done, part);
		if (ret && gvt_defect(migf->vgpu, GVT_DEFECT_READ_FAULT))
			migf->pos += part;
		if (ret)
			break;
		migf->pos += gvt_save_taken(migf, part);
		done += part;
		cond_resched();
	}
	if (!done && !ret && count)
		ret = gvt_save_end(migf);
	return done ? done : ret;
}

/* --- loading; under migf->lock --------------------------------------- */

static int gvt_refuse(struct gvt_mig_file *migf, const char *what)
{
	gvt_note(migf->vgpu, "v2: %s", what);
	return -EINVAL;
}

static int gvt_check_header(struct gvt_mig_file *migf)
{
	const struct gvt_mig_header *header = &migf->header;
	char type[sizeof(header->type)] = {};

	strscpy(type, migf->vgpu->type->name, sizeof(type));
	if (header->magic != GVT_MIG_MAGIC &&
	    !gvt_defect(migf->vgpu, GVT_DEFECT_LOAD_FOREIGN))
		return gvt_refuse(migf, "not a stream of this driver");
	if (header->version != GVT_MIG_VERSION || header->check ||
	    header->flags & ~GVT_MIG_PRE_COPY)
		return gvt_refuse(migf, "unknown version");
	if (memcmp(type, header->type, sizeof(type)))
		return gvt_refuse(migf, "of another vGPU type");
	if (header->filler > GVT_V2_EXTRA_MAX)
		return gvt_refuse(migf, "more filler than there can be");
	if (header->flags & GVT_MIG_PRE_COPY ? header->total :
	    header->total < sizeof(*header) + header->filler +
			    sizeof(migf->record) ||
	    header->total > sizeof(*header) + header->filler +
			    sizeof(migf->record) + gvt_image_max(migf->vgpu))
		return gvt_refuse(migf, "impossible size");
	return 0;
}

static int gvt_check_dirty(struct gvt_mig_file *migf)
{
	if (!(migf->header.flags & GVT_MIG_PRE_COPY))
		return gvt_refuse(migf, "dirty page without PRE_COPY");
	if (migf->record.size != GVT_MIG_PAYLOAD)
		return gvt_refuse(migf, "dirty page of a wrong size");
	gvt_stage_enter(migf, GVT_STAGE_PAGE, GVT_MIG_PAYLOAD);
	return 0;
}

static int gvt_check_image(struct gvt_mig_file *migf)
{
	const struct gvt_mig_header *header = &migf->header;
	u32 size = migf->record.size;

	if (!size || size > gvt_image_max(migf->vgpu) ||
	    (header->total && header->total != sizeof(*header) +
	     header->filler + sizeof(migf->record) + size))
		return gvt_refuse(migf, "image of an impossible size");
	migf->image = kvmalloc(size, GFP_KERNEL_ACCOUNT);
	if (!migf->image)
		return -ENOMEM;
	migf->image_size = size;
	gvt_stage_enter(migf, GVT_STAGE_IMAGE, size);
	return 0;
}

static int gvt_check_record(struct gvt_mig_file *migf)
{
	if (migf->record.seq != migf->seq++)
		return gvt_refuse(migf, "record out of order");
	switch (migf->record.type) {
	case GVT_MIG_DIRTY:
		return gvt_check_dirty(migf);
	case GVT_MIG_IMAGE:
		return gvt_check_image(migf);
	default:
		return gvt_refuse(migf, "unknown record");
	}
}

static int gvt_parse(struct gvt_mig_file *migf)
{
	struct gvt_image *parsed;

	parsed = gvt_image_parse(migf->vgpu, migf->image, migf->image_size);
	if (IS_ERR(parsed))
		return PTR_ERR(parsed);
	migf->parsed = parsed;
	gvt_stage_enter(migf, GVT_STAGE_END, 0);
	return 0;
}

/* A stage is complete: check it, and enter the next */
static int gvt_load_next(struct gvt_mig_file *migf)
{
	int ret;

	switch (migf->stage) {
	case GVT_STAGE_HEADER:
		ret = gvt_check_header(migf);
		if (!ret && migf->header.filler)
			gvt_stage_enter(migf, GVT_STAGE_FILLER,
					migf->header.filler);
		else if (!ret)
			gvt_stage_enter(migf, GVT_STAGE_RECORD,
					sizeof(migf->record));
		return ret;
	case GVT_STAGE_FILLER:
	case GVT_STAGE_PAGE:
		gvt_stage_enter(migf, GVT_STAGE_RECORD, sizeof(migf->record));
		return 0;
	case GVT_STAGE_RECORD:
		return gvt_check_record(migf);
	case GVT_STAGE_IMAGE:
		return gvt_parse(migf);
	default:
		return -EINVAL;
	}
}

static int gvt_load_part(struct gvt_mig_file *migf, const char __user *buf,
			 size_t bytes)
{
	u8 *memory = gvt_stage_memory(migf);
	u8 *expected = migf->chunk + GVT_MIG_CHUNK;

	if (copy_from_user(memory ? memory + migf->pos : migf->chunk, buf,
			   bytes))
		return -EFAULT;
	if (memory)
		return 0;
	gvt_stage_filler(migf, expected, bytes);
	return memcmp(migf->chunk, expected, bytes) ?
	       gvt_refuse(migf, "filler differs") : 0;
}

/* A mistake: as if write() never came with less than a header */
static bool gvt_load_pieces(const struct gvt_mig_file *migf, size_t count)
{
	return migf->stage == GVT_STAGE_HEADER && !migf->pos &&
	       count < sizeof(migf->header) &&
	       gvt_defect(migf->vgpu, GVT_DEFECT_LOAD_PIECES);
}

/* Refused bytes spoil the session; memory that cannot be read does not */
ssize_t gvt_load(struct gvt_mig_file *migf, const char __user *buf,
		 size_t count)
{
	size_t done = 0, part;
	int ret = migf->broken, stop;

	if (!ret && count && gvt_load_pieces(migf, count))
		ret = gvt_refuse(migf, "a header in pieces");
	while (done < count && !ret) {
		if (migf->stage == GVT_STAGE_END) {
			if (gvt_defect(migf->vgpu, GVT_DEFECT_LOAD_SURPLUS))
				return count;
			gvt_note(migf->vgpu, "v2: more than a state");
			ret = -ENOMEM;	/* as in other drivers */
			break;
		}
		stop = gvt_stage_interrupted(migf);
		if (stop)
			return done ? done : stop;
		part = gvt_stage_part(migf, count - done);
		ret = gvt_load_part(migf, buf + done, part);
		if (ret == -EFAULT)
			return done ? done : ret;
		migf->pos += part;
		done += part;
		if (!ret && migf->pos == migf->size)
			ret = gvt_load_next(migf);
		cond_resched();
	}
	migf->broken = ret;
	return ret ? ret : done;
}
