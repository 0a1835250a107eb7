"""Drives sessions over a chain of stages."""
