"""The ledger: what was tried, measured and decided, as an append-only, hash-chained JSON Lines file.

Start at ``ledger.store.Ledger``; the events are declared in ``ledger.records``.
"""
