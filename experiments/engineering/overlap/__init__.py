"""What heads run one by one cost under FSDP, read from the TPU's schedule."""
