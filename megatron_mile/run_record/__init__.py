"""What a run was: command, versions, commits, data and tokenizer, beside its checkpoints."""
