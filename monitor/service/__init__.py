"""Every run under a folder, read by whoever asks over HTTP: `phasewatch serve`."""

from monitor.service.serving import Service

__all__ = ["Service"]
