"""Faults while two processes train; nothing committed is lost."""
