"""Metrics: how far the unlearned model is from the retrained one. Functions of arrays first, then the check."""
