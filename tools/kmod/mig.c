// SPDX-License-Identifier: GPL-2.0-only
/*
 * Mainline's migration protocol, v2 of <linux/vfio.h>: states, data fds,
 * PRE_COPY, and DMA logging.
 *
 * A stream, host-endian: struct gvt_mig_header; filler bytes, as many as the
 * header says; records, each with a struct gvt_mig_record in front. A record
 * DIRTY, only in a stream that began in PRE_COPY, is a page of the filler that
 * was dirtied after it had been sent; the one record IMAGE is the last and
 * holds an image as of the RFC. Filler is a sequence computed from a seed:
 * nothing of it is ever stored, and whoever loads it can tell every wrong byte.
 */
#include <linux/anon_inodes.h>
#include <linux/build_bug.h>
#include <linux/compat.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/iova_bitmap.h>
#include <linux/ktime.h>
#include <linux/math64.h>
#include <linux/module.h>
#include <linux/random.h>
#include <linux/sched/signal.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/version.h>
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 12, 0)
#include <linux/unaligned.h>
#else
#include <asm/unaligned.h>
#endif

#include "gvt_sample.h"

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 2, 0)
#define GVT_V2_FLAGS	(VFIO_MIGRATION_STOP_COPY | VFIO_MIGRATION_P2P | \
			 VFIO_MIGRATION_PRE_COPY)
#else	/* no PRE_COPY: its states are never reached */
#define GVT_V2_FLAGS	(VFIO_MIGRATION_STOP_COPY | VFIO_MIGRATION_P2P)
#define VFIO_DEVICE_STATE_PRE_COPY	6
#define VFIO_DEVICE_STATE_PRE_COPY_P2P	7
#define VFIO_MIG_GET_PRECOPY_INFO	_IO(VFIO_TYPE, VFIO_BASE + 21)
struct vfio_precopy_info {
	__u32	argsz;
	__u32	flags;
	__aligned_u64	initial_bytes;
	__aligned_u64	dirty_bytes;
};
#endif

/* <linux/vfio.h> of Linux 7.1 */
#define GVT_FEATURE_PRECOPY_INFO2	12
#define GVT_PRECOPY_INFO_REINIT		BIT(0)
#define GVT_FLAG_PRE_COPY		BIT(2)	/* not there before 6.2 */

/*
 * iova_bitmap_set() is vfio's until 6.6. Then it is a part of iommufd, and
 * where that is not built there is a stub, and REPORT is EOPNOTSUPP.
 */
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 7, 0)
#define GVT_LOGGING
#elif IS_ENABLED(CONFIG_IOMMUFD_DRIVER)
#define GVT_LOGGING
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 13, 0)
MODULE_IMPORT_NS(IOMMUFD);
#else
MODULE_IMPORT_NS("IOMMUFD");
#endif
#endif

#define GVT_MIG_MAGIC		0x32765f747667ULL	/* "gvt_v2" */
#define GVT_MIG_VERSION		1
#define GVT_MIG_PRE_COPY	BIT(0)

struct gvt_mig_header {
	u64	magic;
	u32	version;
	u32	flags;
	char	type[16];	/* the vGPU's, padded with 0 */
	u64	total;		/* bytes of the stream; 0: PRE_COPY, unknown */
	u64	filler;		/* bytes of it, without pages sent again */
	u64	seed;
	u64	check;		/* of nothing: 0 */
};

enum gvt_mig_record_type {
	GVT_MIG_DIRTY = 1,
	GVT_MIG_IMAGE = 2,
};

struct gvt_mig_record {
	u32	type;
	u32	size;		/* bytes that follow */
	u64	seq;		/* records before this one */
};

#define GVT_MIG_PAGE		SZ_4K	/* a dirty page's record as a whole */
#define GVT_MIG_PAYLOAD		(GVT_MIG_PAGE - sizeof(struct gvt_mig_record))
#define GVT_MIG_DIRTY_MIN	SZ_64K	/* may be dirty whatever was sent */
#define GVT_MIG_CHUNK		SZ_32K
#define GVT_MIG_SPAN_MAX	(3600 * NSEC_PER_SEC)	/* keeps products small */

/* Where a stream is */
enum gvt_mig_stage {
	GVT_STAGE_HEADER,
	GVT_STAGE_FILLER,
	GVT_STAGE_RECORD,	/* the head of one */
	GVT_STAGE_PAGE,
	GVT_STAGE_IMAGE,
	GVT_STAGE_END,
};

struct gvt_mig_file {
	struct file		*filp;		/* the vGPU has a reference */
	bool			over;		/* set before lock is waited for */
	struct mutex		lock;		/* everything below */
	struct vgpu		*vgpu;		/* NULL: the session is over */
	u8			*chunk;		/* two of GVT_MIG_CHUNK */

	enum gvt_mig_stage	stage;
	u64			pos;		/* in the stage */
	u64			size;		/* of the stage */
	struct gvt_mig_header	header;
	struct gvt_mig_record	record;
	u64			seq;		/* of the next record */
	void			*image;
	u32			image_size;

	/* saving */
	bool			saving;
	bool			precopy;	/* the end is not there yet */
	bool			dirtying;
	u64			dirty;		/* bytes, not in a record yet */
	u64			since;		/* dirty is right at, ns */
	u64			again;		/* of dirty: initial data, anew */
	bool			reinit;		/* and nobody has read of it */
	bool			reinit_done;

	/* loading */
	int			broken;		/* errno of the refusal */
	struct gvt_image	*parsed;
};

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

static void gvt_stage_enter(struct gvt_mig_file *migf, enum gvt_mig_stage stage,
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
static u64 gvt_dirty_limit(const struct gvt_mig_file *migf)
{
	u64 sent = migf->header.filler;

	if (migf->stage == GVT_STAGE_HEADER)
		sent = 0;
	else if (migf->stage == GVT_STAGE_FILLER)
		sent = migf->pos;
	return max_t(u64, sent, GVT_MIG_DIRTY_MIN);
}

/* Let what was dirtied since the last call be dirty */
static void gvt_dirty_grow(struct gvt_mig_file *migf)
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

static void gvt_dirty_go(struct gvt_mig_file *migf, bool on)
{
	gvt_dirty_grow(migf);
	migf->dirtying = on;
	migf->since = ktime_get_ns();
}

static u64 gvt_left_initial(const struct gvt_mig_file *migf)
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
static u64 gvt_left_dirty(const struct gvt_mig_file *migf)
{
	u64 left = round_down(migf->dirty, GVT_MIG_PAGE);

	if (migf->stage == GVT_STAGE_PAGE)
		left += migf->size - migf->pos;
	else if (migf->stage == GVT_STAGE_RECORD &&
		 migf->record.type == GVT_MIG_DIRTY)
		left += migf->size - migf->pos + GVT_MIG_PAYLOAD;
	return left;
}

static u64 gvt_left_image(const struct gvt_mig_file *migf)
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
static void gvt_save_restart(struct gvt_mig_file *migf)
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

static ssize_t gvt_save(struct gvt_mig_file *migf, char __user *buf,
			size_t count)
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
static ssize_t gvt_load(struct gvt_mig_file *migf, const char __user *buf,
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

/* --- the data fd ----------------------------------------------------- */

/* Before a read or write. What a fault makes of it happens with no lock held. */
static ssize_t gvt_data_begin(struct gvt_mig_file *migf, enum gvt_fault_op op,
			      struct gvt_fault *fault, size_t *count)
{
	struct gvt_counters *counters;

	mutex_lock(&migf->lock);
	if (!migf->vgpu) {
		mutex_unlock(&migf->lock);
		return -ENODEV;
	}
	counters = &migf->vgpu->counters;
	atomic64_inc(op == GVT_FAULT_DATA_READ ? &counters->v2_read :
						 &counters->v2_write);
	gvt_fault_take(migf->vgpu, op, fault);
	mutex_unlock(&migf->lock);
	if (fault->kind == GVT_FAULT_SHORT)
		*count = min_t(size_t, *count, fault->value);
	return gvt_fault_act(op, fault);
}

static ssize_t gvt_data_read(struct file *filp, char __user *buf, size_t count,
			     loff_t *pos)
{
	struct gvt_mig_file *migf = filp->private_data;
	struct gvt_fault fault;
	ssize_t ret;

	if (pos)
		return -ESPIPE;
	ret = gvt_data_begin(migf, GVT_FAULT_DATA_READ, &fault, &count);
	if (ret)
		return ret;
	mutex_lock(&migf->lock);
	ret = migf->vgpu ? gvt_save(migf, buf, count) : -ENODEV;
	mutex_unlock(&migf->lock);
	return gvt_fault_end(&fault, ret);
}

static ssize_t gvt_data_write(struct file *filp, const char __user *buf,
			      size_t count, loff_t *pos)
{
	struct gvt_mig_file *migf = filp->private_data;
	struct gvt_fault fault;
	ssize_t ret;

	if (pos)
		return -ESPIPE;
	ret = gvt_data_begin(migf, GVT_FAULT_DATA_WRITE, &fault, &count);
	if (ret)
		return ret;
	mutex_lock(&migf->lock);
	ret = migf->vgpu ? gvt_load(migf, buf, count) : -ENODEV;
	mutex_unlock(&migf->lock);
	return gvt_fault_end(&fault, ret);
}

/*
 * As if what was sent as initial data had become useless: some of it has to be
 * sent again, and before a stop. Once in a session, for who can be told of it.
 */
static void gvt_reinit(struct gvt_mig_file *migf)
{
	const struct gvt_mig *mig = &migf->vgpu->mig;
	u64 bytes = READ_ONCE(mig->reinit_bytes);

	if (!bytes || !READ_ONCE(mig->info2) || migf->reinit_done ||
	    gvt_left_initial(migf))
		return;
	bytes = min(round_down(bytes, GVT_MIG_PAGE), gvt_dirty_limit(migf));
	migf->dirty = max(migf->dirty, bytes);
	migf->again = bytes;
	migf->reinit = true;
	migf->reinit_done = true;
}

static void gvt_precopy_bytes(struct gvt_mig_file *migf,
			      struct vfio_precopy_info *info)
{
	u64 again;

	gvt_dirty_grow(migf);
	gvt_reinit(migf);
	again = min(migf->again, gvt_left_dirty(migf));
	info->flags = migf->reinit ? GVT_PRECOPY_INFO_REINIT : 0;
	info->initial_bytes = gvt_left_initial(migf) + again;
	info->dirty_bytes = gvt_left_dirty(migf) - again;
	if (gvt_defect(migf->vgpu, GVT_DEFECT_PRECOPY_INITIAL_STUCK))
		info->initial_bytes = sizeof(migf->header) + migf->header.filler;
}

static long gvt_precopy_info(struct gvt_mig_file *migf, void __user *arg)
{
	const size_t minsz = offsetofend(struct vfio_precopy_info, dirty_bytes);
	struct vfio_precopy_info info;
	long ret = 0;

	if (copy_from_user(&info, arg, minsz))
		return -EFAULT;
	mutex_lock(&migf->lock);
	if (!migf->vgpu)
		ret = -ENODEV;
	else if (info.argsz < minsz &&
		 !gvt_defect(migf->vgpu, GVT_DEFECT_PRECOPY_INFO_ARGSZ))
		ret = -EINVAL;
	else if (!migf->precopy &&
		 !gvt_defect(migf->vgpu, GVT_DEFECT_PRECOPY_INFO_LATE))
		ret = -EINVAL;
	else
		gvt_precopy_bytes(migf, &info);
	mutex_unlock(&migf->lock);
	if (!ret && copy_to_user(arg, &info, minsz))
		ret = -EFAULT;
	return ret;
}

static long gvt_data_other_ioctl(struct gvt_mig_file *migf)
{
	bool fine;

	mutex_lock(&migf->lock);
	fine = migf->vgpu && gvt_defect(migf->vgpu, GVT_DEFECT_FD_ANY_IOCTL);
	mutex_unlock(&migf->lock);
	return fine ? 0 : -ENOTTY;
}

static long gvt_data_ioctl(struct file *filp, unsigned int cmd,
			   unsigned long arg)
{
	struct gvt_mig_file *migf = filp->private_data;

	if (cmd != VFIO_MIG_GET_PRECOPY_INFO || !migf->saving)
		return gvt_data_other_ioctl(migf);
	return gvt_precopy_info(migf, (void __user *)arg);
}

static void gvt_mig_file_empty(struct gvt_mig_file *migf)
{
	gvt_image_free(migf->parsed);
	migf->parsed = NULL;
	kvfree(migf->image);
	migf->image = NULL;
}

static void gvt_mig_file_free(struct gvt_mig_file *migf)
{
	gvt_mig_file_empty(migf);
	kvfree(migf->chunk);
	mutex_destroy(&migf->lock);
	kfree(migf);
}

static int gvt_data_release(struct inode *inode, struct file *filp)
{
	gvt_mig_file_free(filp->private_data);
	return 0;
}

static const struct file_operations gvt_save_fops = {
	.owner		= THIS_MODULE,
	.read		= gvt_data_read,
	.unlocked_ioctl	= gvt_data_ioctl,
	.compat_ioctl	= compat_ptr_ioctl,
	.llseek		= noop_llseek,		/* never reached: a stream */
	.release	= gvt_data_release,
};

static const struct file_operations gvt_load_fops = {
	.owner		= THIS_MODULE,
	.write		= gvt_data_write,
	.llseek		= noop_llseek,		/* never reached: a stream */
	.release	= gvt_data_release,
};

/* --- sessions; under state_mutex ------------------------------------- */

static int gvt_data_flags(const struct vgpu *vgpu, bool saving)
{
	if (gvt_defect(vgpu, GVT_DEFECT_FD_BOTH_WAYS))
		return O_RDWR;
	return saving ? O_RDONLY : O_WRONLY;
}

static struct gvt_mig_file *gvt_mig_file_new(struct vgpu *vgpu, bool saving)
{
	struct gvt_mig_file *migf;
	struct file *filp;

	migf = kzalloc(sizeof(*migf), GFP_KERNEL_ACCOUNT);
	if (!migf)
		return ERR_PTR(-ENOMEM);
	mutex_init(&migf->lock);
	migf->vgpu = vgpu;
	migf->saving = saving;
	gvt_stage_enter(migf, GVT_STAGE_HEADER, sizeof(migf->header));
	migf->chunk = kvmalloc(2 * GVT_MIG_CHUNK, GFP_KERNEL_ACCOUNT);
	if (!migf->chunk) {
		gvt_mig_file_free(migf);
		return ERR_PTR(-ENOMEM);
	}
	filp = anon_inode_getfile(GVT_NAME "_mig",
				  saving ? &gvt_save_fops : &gvt_load_fops,
				  migf, gvt_data_flags(vgpu, saving));
	if (IS_ERR(filp)) {
		gvt_mig_file_free(migf);
		return ERR_CAST(filp);
	}
	stream_open(filp->f_inode, filp);
	if (gvt_defect(vgpu, GVT_DEFECT_FD_SEEKABLE))
		filp->f_mode |= FMODE_LSEEK;
	migf->filp = filp;
	return migf;
}

static void gvt_session_end(struct vgpu *vgpu)
{
	struct gvt_mig_file *migf = vgpu->mig.file;

	if (!migf)
		return;
	vgpu->mig.file = NULL;
	WRITE_ONCE(migf->over, true);
	mutex_lock(&migf->lock);
	migf->vgpu = NULL;
	gvt_mig_file_empty(migf);
	mutex_unlock(&migf->lock);
	fput(migf->filp);
}

/* But with the mistake it lives on, until another begins or the vGPU ends */
static void gvt_session_end_unless(struct vgpu *vgpu, enum gvt_defect mistake)
{
	if (!gvt_defect(vgpu, mistake))
		gvt_session_end(vgpu);
}

/* The vGPU's session from now on; what is returned is the caller's reference */
static struct file *gvt_session_begin(struct vgpu *vgpu,
				      struct gvt_mig_file *migf)
{
	gvt_session_end(vgpu);		/* there is none, but for a mistake */
	get_file(migf->filp);
	vgpu->mig.file = migf;
	return migf->filp;
}

/* What the device is behind the filler. It must not run any more. */
static int gvt_take_image(struct gvt_mig_file *migf, void *buf, u32 room)
{
	int ret = gvt_image_take(migf->vgpu, buf, room);

	if (ret < 0)
		return ret;
	migf->image = buf;
	migf->image_size = ret;
	return 0;
}

static void gvt_fill_header(struct gvt_mig_file *migf, bool precopy)
{
	const struct gvt_mig *mig = &migf->vgpu->mig;
	struct gvt_mig_header *header = &migf->header;

	BUILD_BUG_ON(sizeof(struct gvt_mig_header) != 64);
	BUILD_BUG_ON(sizeof(struct gvt_mig_record) != 16);
	header->magic = GVT_MIG_MAGIC;
	header->version = GVT_MIG_VERSION;
	header->flags = precopy ? GVT_MIG_PRE_COPY : 0;
	strscpy(header->type, migf->vgpu->type->name, sizeof(header->type));
	header->filler = READ_ONCE(mig->extra_bytes);
	header->seed = mig->seed;
	if (!precopy)
		header->total = sizeof(*header) + header->filler +
				sizeof(migf->record) + migf->image_size;
}

static struct file *gvt_stop_copy(struct vgpu *vgpu)
{
	struct gvt_mig_file *migf = gvt_mig_file_new(vgpu, true);
	u32 room = gvt_image_max(vgpu);
	int ret = -ENOMEM;
	void *buf;

	if (IS_ERR(migf))
		return ERR_CAST(migf);
	buf = kvmalloc(room, GFP_KERNEL_ACCOUNT);
	if (buf)
		ret = gvt_take_image(migf, buf, room);
	if (ret) {
		kvfree(buf);
		fput(migf->filp);
		return ERR_PTR(ret);
	}
	gvt_fill_header(migf, false);
	return gvt_session_begin(vgpu, migf);
}

static struct file *gvt_pre_copy(struct vgpu *vgpu, bool dirtying)
{
	struct gvt_mig_file *migf = gvt_mig_file_new(vgpu, true);

	if (IS_ERR(migf))
		return ERR_CAST(migf);
	gvt_fill_header(migf, true);
	migf->precopy = true;
	migf->dirtying = dirtying;
	migf->since = ktime_get_ns();
	return gvt_session_begin(vgpu, migf);
}

static int gvt_pre_copy_stop(struct vgpu *vgpu)
{
	struct gvt_mig_file *migf = vgpu->mig.file;
	int ret;

	ret = gvt_submit_stop(vgpu);
	if (ret)
		return ret;
	mutex_lock(&migf->lock);
	gvt_dirty_go(migf, false);
	mutex_unlock(&migf->lock);
	return 0;
}

static void gvt_pre_copy_start(struct vgpu *vgpu)
{
	struct gvt_mig_file *migf = vgpu->mig.file;

	mutex_lock(&migf->lock);
	gvt_dirty_go(migf, true);
	if (gvt_defect(vgpu, GVT_DEFECT_PRECOPY_RESTARTS))
		gvt_save_restart(migf);
	mutex_unlock(&migf->lock);
	gvt_submit_start(vgpu);
}

static int gvt_pre_copy_last(struct vgpu *vgpu, bool running)
{
	struct gvt_mig_file *migf = vgpu->mig.file;
	u32 room = gvt_image_max(vgpu);
	void *buf;
	int ret;

	buf = kvmalloc(room, GFP_KERNEL_ACCOUNT);
	if (!buf)
		return -ENOMEM;
	ret = gvt_pre_copy_stop(vgpu);
	if (ret) {
		kvfree(buf);
		return ret;
	}
	mutex_lock(&migf->lock);
	ret = gvt_take_image(migf, buf, room);
	if (!ret)
		migf->precopy = false;
	mutex_unlock(&migf->lock);
	if (ret) {
		kvfree(buf);
		if (running)
			gvt_pre_copy_start(vgpu);
	}
	return ret;
}

/* PRE_COPY is over: the same session goes on, and will come to an end */
static struct file *gvt_pre_copy_end(struct vgpu *vgpu, bool running)
{
	int ret = gvt_pre_copy_last(vgpu, running);

	if (ret)
		return ERR_PTR(ret);
	if (gvt_defect(vgpu, GVT_DEFECT_PRECOPY_NEW_FD))
		return get_file(vgpu->mig.file->filp);
	return NULL;
}

static struct file *gvt_resuming(struct vgpu *vgpu)
{
	struct gvt_mig_file *migf = gvt_mig_file_new(vgpu, false);

	if (IS_ERR(migf))
		return ERR_CAST(migf);
	return gvt_session_begin(vgpu, migf);
}

/* The whole state has come: the vGPU becomes what it says */
static int gvt_resumed_apply(struct vgpu *vgpu, struct gvt_mig_file *migf)
{
	int ret;

	if (gvt_defect(vgpu, GVT_DEFECT_LOAD_NOTHING))
		return 0;
	ret = gvt_image_apply(vgpu, migf->parsed);
	if (ret)
		return ret;
	WRITE_ONCE(vgpu->mig.extra_bytes, migf->header.filler);
	if (!gvt_defect(vgpu, GVT_DEFECT_LOAD_LOSES_SEED))
		vgpu->mig.seed = migf->header.seed;
	return 0;
}

/*
 * Leaving RESUMING. Nothing of the device has changed so far; without a whole
 * state nothing does, and the device is in state ERROR.
 */
static int gvt_resumed(struct vgpu *vgpu)
{
	struct gvt_mig_file *migf = vgpu->mig.file;
	int ret = -EINVAL;

	mutex_lock(&migf->lock);
	if (migf->parsed && !migf->broken)
		ret = gvt_resumed_apply(vgpu, migf);
	else if (gvt_defect(vgpu, migf->broken ? GVT_DEFECT_LOAD_REFUSED :
						 GVT_DEFECT_LOAD_TRUNCATED))
		ret = 0;
	else if (!migf->broken)
		gvt_note(vgpu, "v2: not a whole state");
	mutex_unlock(&migf->lock);
	gvt_session_end(vgpu);
	if (ret)
		WRITE_ONCE(vgpu->mig.state, VFIO_DEVICE_STATE_ERROR);
	return ret;
}

/* A mistake: a session that may not end before it was read to its end */
static bool gvt_saved_unread(struct vgpu *vgpu)
{
	struct gvt_mig_file *migf = vgpu->mig.file;
	bool unread;

	if (!gvt_defect(vgpu, GVT_DEFECT_STOP_UNREAD))
		return false;
	mutex_lock(&migf->lock);
	unread = migf->stage != GVT_STAGE_END;
	mutex_unlock(&migf->lock);
	return unread;
}

/* --- states; under state_mutex --------------------------------------- */

#define GVT_ARC(from, to)	((from) << 8 | (to))

/* The vGPU begins all its DMA itself, so in a P2P state it stands still */
static struct file *gvt_mig_arc(struct vgpu *vgpu, u32 from, u32 to)
{
	switch (GVT_ARC(from, to)) {
	case GVT_ARC(VFIO_DEVICE_STATE_RUNNING, VFIO_DEVICE_STATE_RUNNING_P2P):
	case GVT_ARC(VFIO_DEVICE_STATE_RUNNING, VFIO_DEVICE_STATE_STOP):
		return ERR_PTR(gvt_submit_stop(vgpu));
	case GVT_ARC(VFIO_DEVICE_STATE_RUNNING_P2P, VFIO_DEVICE_STATE_STOP):
	case GVT_ARC(VFIO_DEVICE_STATE_STOP, VFIO_DEVICE_STATE_RUNNING_P2P):
		return NULL;
	case GVT_ARC(VFIO_DEVICE_STATE_RUNNING_P2P, VFIO_DEVICE_STATE_RUNNING):
	case GVT_ARC(VFIO_DEVICE_STATE_STOP, VFIO_DEVICE_STATE_RUNNING):
		return ERR_PTR(gvt_submit_start(vgpu));

	case GVT_ARC(VFIO_DEVICE_STATE_STOP, VFIO_DEVICE_STATE_STOP_COPY):
		return gvt_stop_copy(vgpu);
	case GVT_ARC(VFIO_DEVICE_STATE_STOP, VFIO_DEVICE_STATE_RESUMING):
		return gvt_resuming(vgpu);
	case GVT_ARC(VFIO_DEVICE_STATE_RESUMING, VFIO_DEVICE_STATE_STOP):
		return ERR_PTR(gvt_resumed(vgpu));

	case GVT_ARC(VFIO_DEVICE_STATE_RUNNING, VFIO_DEVICE_STATE_PRE_COPY):
		return gvt_pre_copy(vgpu, true);
	case GVT_ARC(VFIO_DEVICE_STATE_RUNNING_P2P,
		     VFIO_DEVICE_STATE_PRE_COPY_P2P):
		return gvt_pre_copy(vgpu, false);
	case GVT_ARC(VFIO_DEVICE_STATE_PRE_COPY, VFIO_DEVICE_STATE_PRE_COPY_P2P):
		return ERR_PTR(gvt_pre_copy_stop(vgpu));
	case GVT_ARC(VFIO_DEVICE_STATE_PRE_COPY_P2P, VFIO_DEVICE_STATE_PRE_COPY):
		gvt_pre_copy_start(vgpu);
		return NULL;
	case GVT_ARC(VFIO_DEVICE_STATE_PRE_COPY, VFIO_DEVICE_STATE_STOP_COPY):
		return gvt_pre_copy_end(vgpu, true);
	case GVT_ARC(VFIO_DEVICE_STATE_PRE_COPY_P2P,
		     VFIO_DEVICE_STATE_STOP_COPY):
		return gvt_pre_copy_end(vgpu, false);

	case GVT_ARC(VFIO_DEVICE_STATE_PRE_COPY, VFIO_DEVICE_STATE_RUNNING):
	case GVT_ARC(VFIO_DEVICE_STATE_PRE_COPY_P2P,
		     VFIO_DEVICE_STATE_RUNNING_P2P):
		gvt_session_end_unless(vgpu, GVT_DEFECT_PRECOPY_KEEPS_FD);
		return NULL;
	case GVT_ARC(VFIO_DEVICE_STATE_STOP_COPY, VFIO_DEVICE_STATE_STOP):
		if (gvt_saved_unread(vgpu))
			return ERR_PTR(-EBUSY);
		gvt_session_end_unless(vgpu, GVT_DEFECT_STOP_KEEPS_FD);
		return NULL;
	}
	return ERR_PTR(-EINVAL);
}

/*
 * The kernel warns about a device that is in state ERROR. And there are kernels
 * whose table leads from STOP_COPY to PRE_COPY by way of STOP_COPY, for ever.
 */
static int gvt_mig_next(struct vgpu *vgpu, u32 target, u32 *next)
{
	enum vfio_device_mig_state found;
	u32 state = vgpu->mig.state;
	int ret;

	if (state == VFIO_DEVICE_STATE_ERROR)
		return -EINVAL;
	if (state == VFIO_DEVICE_STATE_STOP_COPY &&
	    (target == VFIO_DEVICE_STATE_PRE_COPY ||
	     target == VFIO_DEVICE_STATE_PRE_COPY_P2P))
		return -EINVAL;
	ret = vfio_mig_get_next_state(&vgpu->vdev, state, target, &found);
	if (ret)
		return ret;
	*next = found;
	return *next == state ? -EINVAL : 0;
}

static void gvt_log_off(struct vgpu *vgpu)
{
	WRITE_ONCE(vgpu->mig.logging, false);
	xa_destroy(&vgpu->mig.log);
}

static struct file *gvt_mig_go(struct vgpu *vgpu, u32 target)
{
	struct file *filp = NULL;
	u32 next;
	int ret;

	while (vgpu->mig.state != target) {
		ret = gvt_mig_next(vgpu, target, &next);
		if (ret)
			return ERR_PTR(ret);
		filp = gvt_mig_arc(vgpu, vgpu->mig.state, next);
		if (IS_ERR(filp))
			return filp;
		WRITE_ONCE(vgpu->mig.state, next);
		if (next == VFIO_DEVICE_STATE_STOP &&
		    gvt_defect(vgpu, GVT_DEFECT_LOG_ENDS_AT_STOP))
			gvt_log_off(vgpu);
		if (WARN_ON(filp && next != target)) {
			fput(filp);
			return ERR_PTR(-EINVAL);
		}
	}
	return filp;
}

/* A step of gvt_mig_go() that comes with no data fd, by mistake */
static struct file *gvt_mig_go_without(struct vgpu *vgpu, u32 target)
{
	struct file *filp = gvt_mig_go(vgpu, target);

	if (IS_ERR_OR_NULL(filp))
		return filp;
	fput(filp);
	return NULL;
}

/* The mistakes that are made for a whole request; false: none is */
static bool gvt_mig_mistake(struct vgpu *vgpu, u32 target, struct file **filp)
{
	struct gvt_mig *mig = &vgpu->mig;

	*filp = NULL;
	if (target > VFIO_DEVICE_STATE_PRE_COPY_P2P)
		return gvt_defect(vgpu, GVT_DEFECT_STATE_UNKNOWN);
	if (target == VFIO_DEVICE_STATE_ERROR &&
	    gvt_defect(vgpu, GVT_DEFECT_STATE_ERROR)) {
		gvt_session_end(vgpu);
		WRITE_ONCE(mig->state, target);
		return true;
	}
	switch (GVT_ARC(mig->state, target)) {
	case GVT_ARC(VFIO_DEVICE_STATE_STOP, VFIO_DEVICE_STATE_RUNNING_P2P):
		return vgpu->vdev.migration_flags & VFIO_MIGRATION_P2P &&
		       gvt_defect(vgpu, GVT_DEFECT_STATE_STUCK);
	case GVT_ARC(VFIO_DEVICE_STATE_STOP_COPY, VFIO_DEVICE_STATE_STOP_COPY):
		if (!gvt_defect(vgpu, GVT_DEFECT_STATE_NEW_FD))
			return false;
		*filp = get_file(mig->file->filp);
		return true;
	case GVT_ARC(VFIO_DEVICE_STATE_RESUMING, VFIO_DEVICE_STATE_STOP_COPY):
		if (!gvt_defect(vgpu, GVT_DEFECT_STATE_NO_FD))
			return false;
		*filp = gvt_mig_go_without(vgpu, target);
		return true;
	case GVT_ARC(VFIO_DEVICE_STATE_ERROR, VFIO_DEVICE_STATE_RUNNING):
		if (!gvt_defect(vgpu, GVT_DEFECT_ERROR_LEFT))
			return false;
		WRITE_ONCE(mig->state, target);
		gvt_submit_start(vgpu);
		return true;
	}
	return false;
}

/*
 * The hardware's reset and v2's are one step to whoever changes the state or
 * loads one meanwhile. Who has the mutex may wait for a workload: drop it first.
 */
void gvt_mig_reset(struct vgpu *vgpu)
{
	struct gvt_mig *mig = &vgpu->mig;

	if (!gvt_mig_enabled(vgpu)) {
		gvt_device_reset(vgpu);
		return;
	}
	mutex_lock(&vgpu->lock);
	gvt_submit_reset(vgpu, GENMASK(GVT_RING_COUNT - 1, 0));
	mutex_unlock(&vgpu->lock);
	mutex_lock(&mig->state_mutex);
	gvt_session_end_unless(vgpu, mig->state == VFIO_DEVICE_STATE_RESUMING ?
				     GVT_DEFECT_RESET_KEEPS_RESUMING :
				     GVT_DEFECT_RESET_KEEPS_SAVING);
	gvt_device_reset(vgpu);
	if (mig->state != VFIO_DEVICE_STATE_STOP ||
	    !gvt_defect(vgpu, GVT_DEFECT_RESET_STAYS)) {
		WRITE_ONCE(mig->state, VFIO_DEVICE_STATE_RUNNING);
		gvt_submit_start(vgpu);
	}
	mutex_unlock(&mig->state_mutex);
}

int gvt_mig_set_active(struct vgpu *vgpu, bool active)
{
	struct file *filp;

	if (!gvt_mig_enabled(vgpu))
		return active ? gvt_submit_start(vgpu) : gvt_submit_stop(vgpu);
	mutex_lock(&vgpu->mig.state_mutex);
	switch (vgpu->mig.state) {
	case VFIO_DEVICE_STATE_RUNNING:
	case VFIO_DEVICE_STATE_RUNNING_P2P:
	case VFIO_DEVICE_STATE_STOP:
		filp = gvt_mig_go(vgpu, active ? VFIO_DEVICE_STATE_RUNNING :
						 VFIO_DEVICE_STATE_STOP);
		break;
	default:
		gvt_note(vgpu, "status: v2 is in state %s",
			 gvt_mig_state_name(vgpu));
		filp = ERR_PTR(-EBUSY);
	}
	mutex_unlock(&vgpu->mig.state_mutex);
	return PTR_ERR_OR_ZERO(filp);
}

/* --- VFIO's operations ----------------------------------------------- */

static struct file *gvt_mig_set_state(struct vfio_device *vdev,
				      enum vfio_device_mig_state target)
{
	struct vgpu *vgpu = vdev_to_vgpu(vdev);
	struct gvt_fault fault;
	struct file *filp;
	ssize_t ret;

	atomic64_inc(&vgpu->counters.v2_set_state);
	ret = gvt_fault_begin(vgpu, GVT_FAULT_SET_STATE, &fault);
	if (ret)
		return ERR_PTR(ret);
	mutex_lock(&vgpu->mig.state_mutex);
	if (!gvt_mig_mistake(vgpu, target, &filp))
		filp = gvt_mig_go(vgpu, target);
	mutex_unlock(&vgpu->mig.state_mutex);
	if (IS_ERR(filp))
		return filp;
	ret = gvt_fault_end(&fault, 0);
	if (!ret)
		return filp;
	if (filp)
		fput(filp);
	return ERR_PTR(ret);
}

static int gvt_mig_get_state(struct vfio_device *vdev,
			     enum vfio_device_mig_state *state)
{
	struct vgpu *vgpu = vdev_to_vgpu(vdev);

	mutex_lock(&vgpu->mig.state_mutex);
	*state = vgpu->mig.state;
	mutex_unlock(&vgpu->mig.state_mutex);
	return 0;
}

/* What is left to be read of a state that is being saved, else a state's size */
static int __maybe_unused	/* until 6.1 */
gvt_mig_get_data_size(struct vfio_device *vdev, unsigned long *size)
{
	struct vgpu *vgpu = vdev_to_vgpu(vdev);
	struct gvt_mig_file *migf;
	int ret = 0;

	mutex_lock(&vgpu->mig.state_mutex);
	migf = vgpu->mig.file;
	if (migf && migf->saving) {
		mutex_lock(&migf->lock);
		gvt_dirty_grow(migf);
		*size = gvt_left_initial(migf) + gvt_left_dirty(migf) +
			gvt_left_image(migf);
		mutex_unlock(&migf->lock);
	} else if (gvt_defect(vgpu, GVT_DEFECT_SIZE_REFUSED)) {
		ret = -EINVAL;
	} else {
		*size = sizeof(struct gvt_mig_header) +
			READ_ONCE(vgpu->mig.extra_bytes) +
			sizeof(struct gvt_mig_record) + gvt_image_now(vgpu);
	}
	mutex_unlock(&vgpu->mig.state_mutex);
	return ret;
}

static const struct vfio_migration_ops gvt_mig_ops = {
	.migration_set_state	= gvt_mig_set_state,
	.migration_get_state	= gvt_mig_get_state,
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 2, 0)
	.migration_get_data_size = gvt_mig_get_data_size,
#endif
};

/* --- DMA logging ----------------------------------------------------- */

/* After the write: a report between the two must not forget it */
void gvt_mig_wrote(struct vgpu *vgpu, u64 iova, u64 len)
{
	struct gvt_mig *mig = &vgpu->mig;
	unsigned long gfn, last;

	if (!READ_ONCE(mig->logging) || !len)
		return;
	last = (iova + len - 1) >> GVT_PAGE_SHIFT;
	for (gfn = iova >> GVT_PAGE_SHIFT; gfn <= last; gfn++)
		if (xa_err(xa_store(&mig->log, gfn, xa_mk_value(0),
				    GFP_KERNEL_ACCOUNT)))
			WRITE_ONCE(mig->log_lost, true);
}

#ifdef GVT_LOGGING
/* All of what the vGPU writes is logged: it can hold any number of ranges */
static int gvt_log_start(struct vfio_device *vdev,
			 struct rb_root_cached *ranges, u32 nnodes,
			 u64 *page_size)
{
	struct vgpu *vgpu = vdev_to_vgpu(vdev);
	int ret = -EINVAL;

	mutex_lock(&vgpu->mig.state_mutex);
	if (!vgpu->mig.logging ||
	    gvt_defect(vgpu, GVT_DEFECT_LOG_START_TWICE)) {
		gvt_log_off(vgpu);	/* what came late into the last log */
		vgpu->mig.log_lost = false;
		WRITE_ONCE(vgpu->mig.logging, true);
		*page_size = GVT_PAGE_SIZE;
		ret = 0;
	}
	mutex_unlock(&vgpu->mig.state_mutex);
	return ret;
}

static int gvt_log_stop(struct vfio_device *vdev)
{
	struct vgpu *vgpu = vdev_to_vgpu(vdev);

	mutex_lock(&vgpu->mig.state_mutex);
	gvt_log_off(vgpu);
	mutex_unlock(&vgpu->mig.state_mutex);
	return 0;
}

static void gvt_log_move(struct vgpu *vgpu, unsigned long iova,
			 unsigned long length, struct iova_bitmap *dirty)
{
	unsigned long first = iova >> GVT_PAGE_SHIFT;
	unsigned long last = (iova + length - 1) >> GVT_PAGE_SHIFT;
	unsigned long gfn;
	void *entry;

	xa_for_each_range(&vgpu->mig.log, gfn, entry, first, last) {
		xa_erase(&vgpu->mig.log, gfn);
		iova_bitmap_set(dirty, max(gfn << GVT_PAGE_SHIFT, iova), 1);
		cond_resched();
	}
}

static int gvt_log_read_and_clear(struct vfio_device *vdev, unsigned long iova,
				  unsigned long length,
				  struct iova_bitmap *dirty)
{
	struct vgpu *vgpu = vdev_to_vgpu(vdev);
	int ret = 0;

	mutex_lock(&vgpu->mig.state_mutex);
	if (!vgpu->mig.logging)
		ret = gvt_defect(vgpu, GVT_DEFECT_LOG_UNSTARTED) ? 0 : -EINVAL;
	else if (READ_ONCE(vgpu->mig.log_lost))
		ret = -EIO;
	else if (length && gvt_defect(vgpu, GVT_DEFECT_LOG_ALL))
		iova_bitmap_set(dirty, iova, length);
	else if (length)
		gvt_log_move(vgpu, iova, length, dirty);
	mutex_unlock(&vgpu->mig.state_mutex);
	return ret;
}

static const struct vfio_log_ops gvt_log_ops = {
	.log_start		= gvt_log_start,
	.log_stop		= gvt_log_stop,
	.log_read_and_clear	= gvt_log_read_and_clear,
};
#endif

/* --- debugfs' side --------------------------------------------------- */

/* QEMU's names */
static const char * const gvt_mig_names[] = {
	[VFIO_DEVICE_STATE_ERROR]	 = "error",
	[VFIO_DEVICE_STATE_STOP]	 = "stop",
	[VFIO_DEVICE_STATE_RUNNING]	 = "running",
	[VFIO_DEVICE_STATE_STOP_COPY]	 = "stop-copy",
	[VFIO_DEVICE_STATE_RESUMING]	 = "resuming",
	[VFIO_DEVICE_STATE_RUNNING_P2P]	 = "running-p2p",
	[VFIO_DEVICE_STATE_PRE_COPY]	 = "pre-copy",
	[VFIO_DEVICE_STATE_PRE_COPY_P2P] = "pre-copy-p2p",
};

const char *gvt_mig_state_name(struct vgpu *vgpu)
{
	return gvt_mig_names[READ_ONCE(vgpu->mig.state)];
}

/*
 * The opt-in to PRECOPY_INFO.flags, which vfio itself knows from Linux 7.1 on;
 * until then it is the driver's, as every feature that vfio does not know.
 */
int gvt_feature(struct vfio_device *vdev, u32 flags, void __user *arg,
		size_t argsz)
{
	struct vgpu *vgpu = vdev_to_vgpu(vdev);
	int ret;

	if ((flags & VFIO_DEVICE_FEATURE_MASK) != GVT_FEATURE_PRECOPY_INFO2 ||
	    !gvt_mig_enabled(vgpu) ||
	    !(vdev->migration_flags & GVT_FLAG_PRE_COPY))
		return -ENOTTY;
	ret = vfio_check_feature(flags, argsz, VFIO_DEVICE_FEATURE_SET, 0);
	if (ret == 1)
		WRITE_ONCE(vgpu->mig.info2, true);
	return ret == 1 ? 0 : ret;
}

/* What was dirtied until now was dirtied at the old rate */
void gvt_mig_set_rate(struct vgpu *vgpu, u64 rate)
{
	struct gvt_mig_file *migf;

	mutex_lock(&vgpu->mig.state_mutex);
	migf = vgpu->mig.file;
	if (migf && migf->saving) {
		mutex_lock(&migf->lock);
		gvt_dirty_grow(migf);
		mutex_unlock(&migf->lock);
	}
	WRITE_ONCE(vgpu->mig.dirty_rate, rate);
	mutex_unlock(&vgpu->mig.state_mutex);
}

/* --- life ------------------------------------------------------------ */

bool gvt_mig_enabled(const struct vgpu *vgpu)
{
	return vgpu->vdev.mig_ops;
}

/* The next user finds the vGPU running, as behind a driver of a PCI function */
void gvt_mig_close(struct vgpu *vgpu)
{
	if (!gvt_mig_enabled(vgpu))
		return;
	mutex_lock(&vgpu->mig.state_mutex);
	gvt_session_end_unless(vgpu, GVT_DEFECT_CLOSE_KEEPS_FD);
	if (!gvt_defect(vgpu, GVT_DEFECT_LOG_SURVIVES))
		gvt_log_off(vgpu);
	WRITE_ONCE(vgpu->mig.state, VFIO_DEVICE_STATE_RUNNING);
	WRITE_ONCE(vgpu->mig.info2, false);
	mutex_unlock(&vgpu->mig.state_mutex);
}

void gvt_mig_init(struct vgpu *vgpu)
{
	struct gvt_mig *mig = &vgpu->mig;
	unsigned int flags = READ_ONCE(gvt_v2);

	mutex_init(&mig->state_mutex);
	xa_init_flags(&mig->log, XA_FLAGS_ACCOUNT);
	mig->state = VFIO_DEVICE_STATE_RUNNING;
	mig->extra_bytes = min_t(u64, READ_ONCE(gvt_v2_extra_bytes),
				 GVT_V2_EXTRA_MAX);
	mig->seed = get_random_u64();
	if (!flags)
		return;
	vgpu->vdev.migration_flags = (flags | VFIO_MIGRATION_STOP_COPY) &
				     GVT_V2_FLAGS;
	vgpu->vdev.mig_ops = &gvt_mig_ops;
#ifdef GVT_LOGGING
	vgpu->vdev.log_ops = &gvt_log_ops;
#endif
}

void gvt_mig_fini(struct vgpu *vgpu)
{
	gvt_session_end(vgpu);		/* what a mistake has left */
	xa_destroy(&vgpu->mig.log);
	mutex_destroy(&vgpu->mig.state_mutex);
}
