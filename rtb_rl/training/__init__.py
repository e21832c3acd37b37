"""From mathematics to a job: pretraining, fine-tuning, runs, checkpoints."""
