"""The network: layers, heads, and the model that joins them."""
