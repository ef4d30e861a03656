"""Tuned methods: gradient steps on terms over named splits. Each file is a plan that reads like its paper's formula."""
