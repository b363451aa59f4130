"""Many runs of one config file: their notation, where they run, how they went."""
