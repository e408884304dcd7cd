"""A Transformers model joined to an execution plan: modules that hold packed weights, the graph, the runtime."""
