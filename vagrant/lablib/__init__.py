# SPDX-License-Identifier: Apache-2.0
"""Two real Xen hosts in QEMU's software emulation, on one ordinary Linux machine.

Only the Python standard library is used.  ``Lab`` in :mod:`vagrant.lablib.lab` is the whole lab as
an object; ``vagrant/lab`` is the same as a command.
"""
