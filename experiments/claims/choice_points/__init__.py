"""How much more choice points weigh when more tokens are predicted."""
