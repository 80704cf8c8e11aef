"""`write_record`, by the name of the module that it was in."""

from .report import write_record as write_record
