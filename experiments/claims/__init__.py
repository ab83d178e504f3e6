"""The paper's claims, and what follows from them: one folder each."""
