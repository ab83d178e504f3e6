"""Saving and restoring with orbax; a checksum per array.

checkpoints  what others use: save, restore, list
fallback     which step is read: the newest that is whole
reader       reads one step and tells damage from a failed read
storage      paths, listings, orbax's writer, what an error means
integrity    names, shapes, dtypes and checksums of arrays
"""
