"""How a program is kept apart: what `sandbox` begins, and what runs in it.

backends   the commands that begin a sandbox
seccomp    the filter of system calls in it
checker    the tests, in a process of their own
untrusted  the program, in another
messages   what the two processes write to each other
"""
