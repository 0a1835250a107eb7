"""Encrypted TCP connections between neighbouring stages."""
