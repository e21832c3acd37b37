"""Tasks, one modality a file; each returns a Task that fine-tuning takes."""
