"""Measurements that anyone can make: latency, throughput, load on a server."""
