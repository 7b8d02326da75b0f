# SPDX-License-Identifier: Apache-2.0
"""The checkpoint engine: capture, code, send | receive, apply, revive.

Data goes one way: a :class:`~checkpoint.driver.Source` captures a guest into staging, the codec
turns staging into frames, a session carries them, and a :class:`~checkpoint.driver.Shell` on the
standby takes them whole or not at all.  Nothing here knows of the daemon or of output buffers.
"""
