"""Methods: one file per published method, in five families, and the registry that finds them."""

from expunge.methods.registry import Configured, Method, find, method, methods, setting

__all__ = ["Configured", "Method", "find", "method", "methods", "setting"]
