"""The first minute of a planned run, as a test of the machine it will run on."""
