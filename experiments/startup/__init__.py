"""How a program starts: its config, its signals, its errors in one line."""
