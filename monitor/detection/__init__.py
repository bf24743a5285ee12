"""What changes in a run, noticed while it is measured."""

from monitor.detection.noticing import Noticed, Noticing
from monitor.detection.series import SERIES, Series
from monitor.detection.table import SPEC, Notice, reading

__all__ = ["SERIES", "SPEC", "Notice", "Noticed", "Noticing", "Series", "reading"]
