"""Bytes to messages and back: no trio, no input or output."""
