"""What a job would need."""
