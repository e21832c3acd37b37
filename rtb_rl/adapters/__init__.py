"""Foreign models as priors and posteriors; each file needs its extra."""
