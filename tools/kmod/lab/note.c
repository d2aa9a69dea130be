// SPDX-License-Identifier: GPL-2.0-only
/* last_error: what the driver says of the last thing that it refused. */

#include <linux/kernel.h>
#include <linux/spinlock.h>
#include <linux/string.h>

#include "lab/lab.h"

static DEFINE_SPINLOCK(gvt_note_lock);	/* every vGPU's last_error */

void gvt_note(struct vgpu *vgpu, const char *fmt, ...)
{
	char text[sizeof(vgpu->last_error)];
	unsigned long flags;
	va_list args;

	va_start(args, fmt);
	vscnprintf(text, sizeof(text), fmt, args);
	va_end(args);
	spin_lock_irqsave(&gvt_note_lock, flags);
	strscpy(vgpu->last_error, text, sizeof(vgpu->last_error));
	spin_unlock_irqrestore(&gvt_note_lock, flags);
}

/* Copy it out, at most size bytes with the terminating zero. */
void gvt_note_read(struct vgpu *vgpu, char *text, size_t size)
{
	unsigned long flags;

	spin_lock_irqsave(&gvt_note_lock, flags);
	strscpy(text, vgpu->last_error, size);
	spin_unlock_irqrestore(&gvt_note_lock, flags);
}
