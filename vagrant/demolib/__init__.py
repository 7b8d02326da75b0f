# SPDX-License-Identifier: Apache-2.0
"""The demonstration: a client outside both hosts, what it saw, the verdict and the picture."""
