"""HumanEval by a real model: three ways to decode, and pass@10."""
