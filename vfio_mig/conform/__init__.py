# SPDX-License-Identifier: MIT
"""Does a device's migration driver keep the rules of the kernel's header? Check by check, each with its source."""
