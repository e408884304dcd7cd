"""Formats of requests and responses, one protocol per file. Requests are validated by these models. Responses are built as
plain dictionaries; their models only describe them in the OpenAPI schema."""
