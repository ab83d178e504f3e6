"""Instruments: programs compiled for absent TPUs, and their costs."""
