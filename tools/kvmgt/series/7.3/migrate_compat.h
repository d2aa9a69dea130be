/* SPDX-License-Identifier: MIT */
/* What kernel 7.3 calls otherwise, or lacks: nothing. */
