"""Exact and certified methods: the result equals training without the forget rows, or is bounded against it."""
