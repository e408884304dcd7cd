"""The graph of a model: values and nodes, fusion rules, validation, planning of buffers, and a text form."""
