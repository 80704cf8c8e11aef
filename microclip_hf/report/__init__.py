"""A finished run for somebody without labels: what it left in its folder, and a page to look at."""

from .page import write_report
from .record import write_record


__all__ = ["write_record", "write_report"]
