"""How a program is kept apart: what `sandbox` begins, and what runs in it."""
