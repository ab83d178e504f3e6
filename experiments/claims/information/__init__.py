"""What two-token prediction weighs: information theory, and trained heads."""
