"""Benchmarks, and what breaks runs on purpose: `python -m headwater.benchmarks` lists them.

Whole ways of a value are measured by the modules here, one layer each in gpu/ (kernels), storage/ and training/; peers/
holds what others make of the same work, breaking/ the trials of faults, lib/ what they share, results/ the figures.
"""

from headwater.benchmarks.registry import BENCHMARKS, RESULTS, load

__all__ = ["BENCHMARKS", "RESULTS", "load"]
