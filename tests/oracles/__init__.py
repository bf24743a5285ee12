"""Slow, obvious implementations of what `monitor` computes fast, written from the definitions."""
