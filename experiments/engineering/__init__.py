"""Measurements of this implementation: memory, speed, faults."""
