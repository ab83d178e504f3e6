"""Models in the formats of others: Hugging Face's and Meta's folders."""
