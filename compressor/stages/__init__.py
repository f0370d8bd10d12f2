"""The verbs of a run, in running order: stream, assemble, evaluate."""
