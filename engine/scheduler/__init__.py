"""Scheduler of steps and allocator of cache pages: plain Python, without torch."""
