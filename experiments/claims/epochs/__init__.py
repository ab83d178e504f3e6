"""Several epochs over one corpus."""
