"""Data: from text to token shards, and back to batches and byte counts. No module in here imports torch.

``corpus`` reads documents, ``build`` turns them into shards + tokenizer + manifest, ``check`` inspects any
data folder, ``loader`` serves batches, ``bytecount`` says how many bytes of text a target token stands for.
"""
