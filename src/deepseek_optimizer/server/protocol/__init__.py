"""What requests and answers look like: one file a protocol. Requests are checked by these models; answers are written by hand,
as dictionaries of these shapes, and the models describe them in the OpenAPI schema."""
