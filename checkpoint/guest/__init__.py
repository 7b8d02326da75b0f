# SPDX-License-Identifier: Apache-2.0
"""What the engine must know of a Linux guest's kernel, read out of the guest's own memory.

Pure readers over :class:`~checkpoint.guest.memory.PhysicalMemory`: page tables
(:mod:`~checkpoint.guest.paging`), the kernel's symbol table
(:mod:`~checkpoint.guest.kallsyms`), its type information (:mod:`~checkpoint.guest.btf`), and what
these lead to (:mod:`~checkpoint.guest.linux`).  No call into the hypervisor, no file, nothing
installed in the guest; a guest that cannot be read gets an
:class:`~checkpoint.errors.UnsupportedGuest`.
"""
