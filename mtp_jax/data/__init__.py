"""Documents, and how they become batches."""
