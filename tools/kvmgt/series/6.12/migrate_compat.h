/* SPDX-License-Identifier: MIT */
/* What kernel 6.12 calls otherwise, or lacks: nothing. */
