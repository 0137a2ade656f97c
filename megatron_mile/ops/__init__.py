"""How the statistics are computed on one shard of the vocabulary.

Each operation has a folder with implementations of one signature: a plain torch reference, and
faster ones beside it; `dispatch` picks one, and `threads` shares out work on a CPU. No
configuration object, no process group, no objective and nothing of Megatron may live here: what is
imported of this package lies in this folder.
"""
