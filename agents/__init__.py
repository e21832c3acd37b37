"""Programs: each file is one complete training job."""
