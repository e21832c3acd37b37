"""Image posteriors: classifier guidance and inverse problems."""
