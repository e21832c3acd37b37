"""Recorded transitions: read, downloaded, checked, summarised; and collected anew."""
