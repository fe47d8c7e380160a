"""Read-only views of the store for people: the analysis of a search, its HTML report, the live page."""
