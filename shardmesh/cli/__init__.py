"""The commands: click and rich, no protocol and no engine."""
