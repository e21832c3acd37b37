"""The behaviour prior, its posteriors under a critic, and critics that look at its actions only."""
