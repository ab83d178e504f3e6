"""The smallest TPU slice that holds each of the paper's training runs."""
