"""Policies of finished runs as files that run without this package."""

from rtb_rl.rl.export.exported import LoadedPolicy, load_exported
from rtb_rl.rl.export.exporting import Export, export_policy

__all__ = ["Export", "LoadedPolicy", "export_policy", "load_exported"]
