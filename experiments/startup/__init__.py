"""How a program starts: its flags, config, signals, and errors in one line."""
