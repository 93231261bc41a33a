"""Benchmarks: every number beside a named peer, measured in one run on one machine."""
