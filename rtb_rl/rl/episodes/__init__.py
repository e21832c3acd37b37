"""Environments, and episodes of policies in them: returns, scores, curves, films."""
