"""The top layer: the LangGraph state machine, proposers, the decision rule and the command line."""
