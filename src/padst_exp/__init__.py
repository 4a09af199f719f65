"""Structured sparse training: dynamic topologies, learned permutations, real sparse storage."""

__version__ = "0.1.0"
