"""Guarded methods: a wrapper at inference time; the weights stay."""
