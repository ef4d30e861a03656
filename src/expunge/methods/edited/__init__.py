"""Edited methods: one-shot or closed-form changes of the weights."""
