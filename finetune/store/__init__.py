"""Everything on disk: durable files, run directories, checkpoints, caches. Never imports torch."""
