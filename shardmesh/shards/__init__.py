"""Model files: reading, planning, cutting, storing."""
