"""Instruments: time, bandwidth, FLOPs, plans for absent TPUs, results."""
