# SPDX-License-Identifier: MIT
"""The saved archive, and files that are whole or not there.

Works on bytes and files alone: nothing in here knows a device.

- An archive: ``layout`` specifies it, ``tar`` is the form, ``writer`` writes, ``archive`` reads and verifies,
  ``digests`` hashes beside the job, ``kept`` has what came through a pipe.
- Files: ``places`` (directories as fds), ``files`` (output that is whole or not there), ``directory`` (the same for
  several), ``bytesource`` (bytes that may be too many for memory), ``forms`` (what a file is that is not an archive),
  ``wrapped`` (compression, libvirt's header).
- Guest memory: ``memoryplan`` (what is written when one or several archives are loaded).
- Looking inside: ``extract`` (taken apart and put together), ``guestpages`` (single pages).
"""
