"""Each side against one that wants to cheat it: whole vaults and lying servers, real servers and
forging clients."""
