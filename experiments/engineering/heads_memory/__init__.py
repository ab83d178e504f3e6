"""Memory, work and time of the loss against the number of heads."""
