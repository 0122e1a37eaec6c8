"""Every decoder of both sides, given what no encoder writes: tests here, coverage in tools/fuzz."""
