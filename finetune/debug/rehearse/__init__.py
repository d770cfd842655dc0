"""Rehearsal of a planned run: proves exact resume on this machine."""
