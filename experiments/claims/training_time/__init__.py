"""What several heads cost in training time."""
