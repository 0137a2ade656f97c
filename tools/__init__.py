"""The tools before and after a run: a command a file here, all that they are made of in folders."""
