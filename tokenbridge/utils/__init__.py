"""Files, provenance, devices, console output."""
