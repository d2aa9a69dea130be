/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the files of the migration protocol v2 share: mig.c has states and
 * VFIO's operations, mig_stream.c what a stream is made of, mig_file.c its data
 * fd, mig_log.c DMA logging.
 *
 * A stream, host-endian: struct gvt_mig_header; filler bytes, as many as the
 * header says; records, each with a struct gvt_mig_record in front. A record
 * DIRTY, only in a stream that began in PRE_COPY, is a page of the filler that
 * was dirtied after it had been sent; the one record IMAGE is the last and
 * holds an image as of the RFC. Filler is a sequence computed from a seed:
 * nothing of it is ever stored, and whoever loads it can tell every wrong byte.
 */
#ifndef GVT_MIG_H
#define GVT_MIG_H

#include <linux/bits.h>
#include <linux/fs.h>
#include <linux/mutex.h>
#include <linux/sizes.h>
#include <linux/vfio.h>

#include "vfio/vfio.h"

#ifdef GVT_SINCE_6_2
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

/* mig_stream.c; all under migf->lock */
void gvt_stage_enter(struct gvt_mig_file *migf, enum gvt_mig_stage stage,
		     u64 size);
u64 gvt_dirty_limit(const struct gvt_mig_file *migf);
void gvt_dirty_grow(struct gvt_mig_file *migf);
void gvt_dirty_go(struct gvt_mig_file *migf, bool on);
u64 gvt_left_initial(const struct gvt_mig_file *migf);
u64 gvt_left_dirty(const struct gvt_mig_file *migf);
u64 gvt_left_image(const struct gvt_mig_file *migf);
void gvt_save_restart(struct gvt_mig_file *migf);
ssize_t gvt_save(struct gvt_mig_file *migf, char __user *buf, size_t count);
ssize_t gvt_load(struct gvt_mig_file *migf, const char __user *buf,
		 size_t count);

/* mig_file.c */
struct gvt_mig_file *gvt_mig_file_new(struct vgpu *vgpu, bool saving);
void gvt_mig_file_empty(struct gvt_mig_file *migf);

/* mig_log.c */
void gvt_mig_log_init(struct vgpu *vgpu);

#endif
