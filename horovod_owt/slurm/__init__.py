"""What Slurm is told and asked. No torch here: it runs on login nodes."""
