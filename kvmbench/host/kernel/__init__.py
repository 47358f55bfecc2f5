"""The host kernel: its memory, types and symbols, read and never written."""
