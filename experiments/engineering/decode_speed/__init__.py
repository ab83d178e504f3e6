"""How fast decoding is: ordinary, blockwise, by trees, and beside a peer."""
