"""Byte models: several heads at equal data."""
