"""The server: blobs under unlinkable keys, paid with anonymous credentials.

cli -> service -> handler -> {epochs, ledger}. Of the client it imports hpkvfs.protocol only.
"""
