"""The command line: one file per group of verbs, `main` puts them together."""
