"""The stages of a run, one file each: a function of the `Run`, which finds its finished result or makes it."""
