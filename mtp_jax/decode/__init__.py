"""Generation: pure functions over a frozen state."""
