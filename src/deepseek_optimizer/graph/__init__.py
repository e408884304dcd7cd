"""The graph of a model: values and nodes, rules that rewrite it, a checker, a planner of buffers, a text form."""
