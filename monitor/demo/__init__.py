"""The demo: a small transformer grows induction heads on the Python library's own source code."""
