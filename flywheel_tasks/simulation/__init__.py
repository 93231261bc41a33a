"""Simulated traffic with a known latent truth, for the demo, tests and benchmarks only."""
